"""What labels are to a model: what an encoder-decoder reads, the next tokens of its input, or of each position.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lte_compile.running.tracing import unwrapped

# transformers' losses that compare the logits of every position with the label at that position.
_IN_PLACE = ("ForMaskedLM", "ForTokenClassification")


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model makes its decoder's inputs of labels, as transformers' encoder-decoders do."""
    return bool(getattr(getattr(unwrapped(model), "config", None), "is_encoder_decoder", False))


def without_labels(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch for a call that needs no loss. An encoder-decoder keeps its labels: its decoder reads them, and its
    padding is where they are -100."""
    return {name: value for name, value in batch.items() if name != "labels" or is_encoder_decoder(model)}


def are_next_tokens(model: nn.Module, labels: Tensor) -> bool:
    """Whether labels [B, T] are the input's tokens, each to be predicted from the position before it."""
    in_place = getattr(unwrapped(model), "loss_type", None) in _IN_PLACE
    return labels.dim() == 2 and not in_place and not is_encoder_decoder(model)
