"""An encoder-decoder as two programs: one reads the source once, the other takes a step of the decoder with its cache.

Names follow Hugging Face Optimum's: past_key_values.N.decoder.key grows with the text, past_key_values.N.encoder.key is
what cross attention reads of the source and stays.
Shape suffixes: B batch, S source positions, T new tokens, P past tokens, H key/value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lte_compile.exporters.kv_cache import CachedExample, Past

# Distinct and at least 2: torch.export takes sizes 0 and 1 for constants, and equal sizes are easy to mistake.
_BATCH, _NEW, _PAST, _SOURCE = 2, 3, 5, 7


class SourceReader(nn.Module):
    """The encoder of `model`, and the keys and values [B, H, S, K] that cross attention makes of its result.

    The decoder takes one step, in which it fills its cross-attention cache; the rest of that step has no use and does
    not reach the file.
    """

    PREFIX: ClassVar[str] = "model."

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor]) -> Past:
        batch = next(iter(inputs.values())).shape[0]
        first_B1 = torch.zeros(batch, 1, dtype=torch.int64, device=next(self.model.parameters()).device)
        cache = self.model(**inputs, decoder_input_ids=first_B1, use_cache=True).past_key_values
        return [(layer.keys, layer.values) for layer in cache.cross_attention_cache.layers]


class CachedTarget(nn.Module):
    """The decoder of `model` with a cache built from `past` and `source`; returns logits and the grown `past`.

    inputs: input_ids int64 [B, T] of the target and, where the model masks its source, encoder_attention_mask
    int64 [B, S]. past: keys and values [B, H, P, K] of every layer; source: what `SourceReader` returned.
    """

    PREFIX: ClassVar[str] = "model."

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor], past: Past, source: Past) -> tuple[Tensor, Past]:
        from transformers import DynamicCache, EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        keys_BHSK, _ = source[0]
        batch, _, positions, _ = keys_BHSK.shape
        config: Any = self.model.config
        unread_BSD = keys_BHSK.new_zeros(batch, positions, config.hidden_size)  # its keys and values are in the cache
        mask = {"attention_mask": inputs["encoder_attention_mask"]} if "encoder_attention_mask" in inputs else {}
        output = self.model(
            decoder_input_ids=inputs["input_ids"],
            encoder_outputs=BaseModelOutput(last_hidden_state=unread_BSD),
            past_key_values=EncoderDecoderCache(DynamicCache(past), DynamicCache(source)),
            use_cache=True,
            **mask,
        )
        grown = output.past_key_values.self_attention_cache.layers
        return output.logits, [(layer.keys, layer.values) for layer in grown]


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether `model` is an encoder-decoder of transformers with a language-model head."""
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel) and model.can_generate() and model.config.is_encoder_decoder


def source_example(model: nn.Module, inputs: dict[str, Tensor], axes: dict[str, dict[int, str]]) -> CachedExample:
    """Tracing arguments for `SourceReader(model)`, from example inputs of the encoder and their dynamic axes."""
    count = len(_source_caches(model, inputs))
    return CachedExample(
        args=(inputs,),
        input_names=tuple(inputs),
        output_names=tuple(_names("present", count, "encoder")),
        axis_names=tuple(axes[name] for name in inputs),
    )


def target_example(model: nn.Module, inputs: dict[str, Tensor]) -> CachedExample:
    """Tracing arguments for `CachedTarget(model)`. Runs `SourceReader` once to see the sizes of its caches."""
    caches = _source_caches(model, inputs)
    is_masked = "attention_mask" in inputs
    keys, _ = caches[0]
    source = _SOURCE if is_masked else keys.shape[2]  # speech models take a fixed number of frames
    ids_BT = torch.ones(_BATCH, _NEW, dtype=torch.int64, device=keys.device)
    feed = {"input_ids": ids_BT} | ({"encoder_attention_mask": ids_BT.new_ones(_BATCH, source)} if is_masked else {})
    past = [(_zeros(k, _PAST), _zeros(v, _PAST)) for k, v in caches]
    read = [(_zeros(k, source), _zeros(v, source)) for k, v in caches]
    source_axes = {0: "batch", 2: "encoder_sequence"} if is_masked else {0: "batch"}
    feed_axes = [{0: "batch", 1: "sequence"}, {0: "batch", 1: "encoder_sequence"}][: len(feed)]
    flat = 2 * len(caches)
    return CachedExample(
        args=(feed, past, read),
        input_names=(
            *feed,
            *_names("past_key_values", len(caches), "decoder"),
            *_names("past_key_values", len(caches), "encoder"),
        ),
        output_names=("logits", *_names("present", len(caches), "decoder")),
        axis_names=(*feed_axes, *[{0: "batch", 2: "past_sequence"}] * flat, *[source_axes] * flat),
    )


def _names(head: str, layers: int, side: str) -> Iterable[str]:
    return (f"{head}.{layer}.{side}.{kind}" for layer in range(layers) for kind in ("key", "value"))


def _zeros(like: Tensor, length: int) -> Tensor:
    _, heads, _, width = like.shape
    return like.new_zeros(_BATCH, heads, length, width)


def _source_caches(model: nn.Module, inputs: dict[str, Tensor]) -> Past:
    """Keys and values that the model's cross attention makes of example inputs."""
    with torch.no_grad():
        caches: Past = SourceReader(model)(inputs)
    return caches
