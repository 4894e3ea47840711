"""A causal language model with its key/value cache as flat inputs and outputs, named as ONNX Runtime GenAI expects.

Shape suffixes: B batch, T new tokens, P past tokens, H key/value heads, K head width.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

# Distinct and at least 2: torch.export takes sizes 0 and 1 for constants, and equal sizes are easy to mistake.
_BATCH, _NEW, _PAST = 2, 3, 5

Past = list[tuple[Tensor, Tensor]]


class CachedDecoder(nn.Module):
    """`model` called with a cache built from `past`; returns the logits and the grown cache.

    inputs: input_ids int64 [B, T], attention_mask int64 [B, P + T] and, where the model takes them, position_ids
    int64 [B, T]. past: keys and values [B, H, P, K] of every layer. Returns logits [B, T, V] and the same with P + T.
    """

    PREFIX: ClassVar[str] = "model."

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor], past: Past) -> tuple[Tensor, Past]:
        from transformers import DynamicCache

        output = self.model(**inputs, past_key_values=DynamicCache(past), use_cache=True)
        return output.logits, [(layer.keys, layer.values) for layer in output.past_key_values.layers]


@dataclass(frozen=True)
class CachedExample:
    """Arguments for tracing a model with its cache, and the names of its flat inputs, their axes and its outputs."""

    args: tuple[Any, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    axis_names: tuple[dict[int, str], ...]


def example_of(model: nn.Module) -> CachedExample:
    """Tracing arguments for `CachedDecoder(model)`. Runs the model once on two tokens to see its cache.

    Raises:
        ValueError: the model is not a decoder whose state is one pair of key and value tensors per layer.
    """
    layers = _cache_layers(model)
    device = next(model.parameters()).device
    ids_BT = torch.ones(_BATCH, _NEW, dtype=torch.int64, device=device)
    inputs = {"input_ids": ids_BT, "attention_mask": ids_BT.new_ones(_BATCH, _PAST + _NEW)}
    axes = [{0: "batch", 1: "sequence"}, {0: "batch", 1: "total_sequence"}]
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = torch.arange(_PAST, _PAST + _NEW, device=device).repeat(_BATCH, 1)
        axes.append({0: "batch", 1: "sequence"})
    past = [(_past_like(keys), _past_like(values)) for keys, values in layers]
    suffixes = [f"{layer}.{kind}" for layer in range(len(past)) for kind in ("key", "value")]
    return CachedExample(
        args=(inputs, past),
        input_names=(*inputs, *(f"past_key_values.{suffix}" for suffix in suffixes)),
        output_names=("logits", *(f"present.{suffix}" for suffix in suffixes)),
        axis_names=(*axes, *({0: "batch", 2: "past_sequence"} for _ in suffixes)),
    )


def _past_like(tensor: Tensor) -> Tensor:
    _, heads, _, width = tensor.shape
    return tensor.new_zeros(_BATCH, heads, _PAST, width)


def _cache_layers(model: nn.Module) -> Past:
    """Keys and values [1, H, 2, K] that the model makes of two tokens."""
    from transformers import DynamicCache, PreTrainedModel

    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise ValueError(
            f"kv_cache=True needs a transformers decoder with a language-model head; got {type(model).__name__}"
        )
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} reads and writes: with a cache that is two files; "
            "write a folder (export_folder), or leave kv_cache out"
        )
    ids = torch.ones(1, 2, dtype=torch.int64, device=model.device)
    with torch.no_grad():
        cache: Any = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None)
    layers = getattr(cache, "layers", [])
    pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    is_plain = isinstance(cache, DynamicCache) and all(
        isinstance(tensor, Tensor) and tensor.dim() == 4 for pair in pairs for tensor in pair
    )
    if not pairs or not is_plain:
        where = "inside its layers" if cache is None else f"in a {type(cache).__name__}"
        raise ValueError(
            f"{type(model).__name__} keeps its state {where}, not as keys and values per layer; "
            "export it without kv_cache"
        )
    return pairs  # type: ignore[return-value]
