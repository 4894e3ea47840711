"""A row of the zoo: how to build one tiny model, and the FFNs it has by construction.

Every size is small but distinct where the matcher could confuse them: D = 32, F = 80, a vocabulary of 96.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

WIDTH, HIDDEN, LAYERS, HEADS, KEY_HEADS, VOCAB, TOKENS, IMAGE = 32, 80, 2, 4, 2, 96, 10, 32

# Every transformers configuration takes these names, its own or the common ones it maps to them.
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: dict[str, Any] = {"num_key_value_heads": KEY_HEADS}  # attention heads that share keys

Inputs = dict[str, Tensor]
Build = Callable[[], tuple[nn.Module, Inputs]]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One architecture.

    `downs` are the names of the down-projections' modules, `{}` standing for each of the `LAYERS` layers: what a
    correct search finds, no more and no less. `native` are the down parameters of experts that the model has of itself.
    Models that are not `exportable` look at their data, which torch.export does not trace.
    """

    name: str
    build: Build
    downs: tuple[str, ...] = ()
    native: tuple[str, ...] = ()
    exportable: bool = True
    onnx: bool = False
    in_default_run: bool = False
    dtype: torch.dtype = torch.float64  # that of the weights; some models only work in float32

    @property
    def expected(self) -> frozenset[str]:
        """Names of the down weights of all FFNs."""
        return frozenset(f"{down}.weight" for down in _each_layer(self.downs))

    @property
    def expected_native(self) -> frozenset[str]:
        return frozenset(_each_layer(self.native))


def _each_layer(patterns: tuple[str, ...]) -> list[str]:
    return [pattern.format(layer) for pattern in patterns for layer in range(LAYERS if "{}" in pattern else 1)]


def text() -> Inputs:
    """Two sequences, the second one padded."""
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, -3:] = 0
    return {"input_ids": torch.randint(3, VOCAB, (2, TOKENS)), "attention_mask": mask}


def unmasked_text() -> Inputs:
    return {"input_ids": torch.randint(3, VOCAB, (2, TOKENS))}


def text_to_text() -> Inputs:
    return {**text(), "decoder_input_ids": torch.randint(3, VOCAB, (2, 6))}


def image() -> Inputs:
    return {"pixel_values": torch.randn(2, 3, IMAGE, IMAGE)}


def image_and_text() -> Inputs:
    return {**text(), **image()}


def waveform() -> Inputs:
    return {"input_values": torch.randn(2, 4000)}


def video() -> Inputs:
    return {"pixel_values": torch.randn(2, 4, 3, IMAGE, IMAGE)}


@dataclass(frozen=True)
class Pretrained:
    """Builds a transformers model of a class by its name, from `SMALL` and the settings that differ."""

    model: str
    inputs: Callable[[], Inputs]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self) -> tuple[nn.Module, Inputs]:
        model_class = getattr(tf, self.model)
        settings = {key: value for key, value in {**SMALL, **self.settings}.items() if value is not UNSET}
        return model_class(model_class.config_class(**settings)), self.inputs()


UNSET = object()  # a setting of SMALL that a configuration should not be given


def pretrained(
    name: str,
    model: str,
    *downs: str,
    inputs: Callable[[], Inputs] = text,
    native: tuple[str, ...] = (),
    exportable: bool = True,
    onnx: bool = False,
    in_default_run: bool = False,
    dtype: torch.dtype = torch.float64,
    **settings: Any,
) -> Row:
    """A row for a transformers model."""
    return Row(
        name=name,
        build=Pretrained(model, inputs, settings),
        downs=downs,
        native=native,
        exportable=exportable,
        onnx=onnx,
        in_default_run=in_default_run,
        dtype=dtype,
    )
