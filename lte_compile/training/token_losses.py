"""The next-token loss that transformers models share, computed together with the distance to a teacher.

Shapes: B sequences, T tokens, N of all sequences together, C vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lte_compile.kernels.token_losses import IGNORED, row_losses

# Arguments of transformers' loss that change what it computes; models pass them on from their callers.
_UNUSUAL = ("num_items_in_batch", "ignore_index", "shift_labels")


class NextTokens:
    """What a model would have computed its loss from; None until it ran, or where it asked for more than usual."""

    def __init__(self, usual: Callable[..., Tensor] | None) -> None:
        self.usual = usual
        self.logits_BTC: Tensor | None = None
        self.labels_BT: Tensor | None = None

    def __call__(self, logits: Tensor, labels: Tensor, vocab_size: int, **others: Any) -> Tensor:
        is_usual = not any(others.get(name) is not None for name in _UNUSUAL) and logits.shape[:-1] == labels.shape
        if not is_usual and self.usual is not None:
            return self.usual(logits, labels, vocab_size, **others)
        self.logits_BTC, self.labels_BT = logits, labels
        return logits.new_zeros(())


@contextmanager
def deferred_loss(model: nn.Module) -> Iterator[NextTokens]:
    """Models that leave their loss to transformers' next-token loss leave it to the block's end instead."""
    of_model: Any = model
    usual = getattr(model, "loss_function", None)
    found = NextTokens(usual)
    if getattr(usual, "__qualname__", "") != "ForCausalLMLoss":
        yield found
        return
    of_model.loss_function = found
    try:
        yield found
    finally:
        of_model.loss_function = usual


def token_losses(
    logits_BTC: Tensor, labels_BT: Tensor, taught_BTC: Tensor | None, counted_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Cross entropy of the next tokens and KL(teacher || model), means in nats; in float32 at least.

    Args:
        labels_BT: the tokens themselves; -100 is left out.
        taught_BTC: the teacher's logits; without them the second mean is 0.
        counted_BT: nonzero where the second mean counts; None counts all.
    """
    next_N = F.pad(labels_BT, (0, 1), value=IGNORED)[:, 1:].flatten()
    taught_NC = None if taught_BTC is None else taught_BTC.flatten(0, 1)
    entropy_N, distance_N = row_losses(logits_BTC.flatten(0, 1), next_N, taught_NC)
    entropy = entropy_N.sum() / (next_N != IGNORED).sum().clamp(min=1)
    if counted_BT is None:
        return entropy, distance_N.mean()
    counted_N = counted_BT.flatten().to(distance_N.dtype)
    return entropy, (distance_N * counted_N).sum() / counted_N.sum().clamp(min=1)
