"""genai_config.json: how ONNX Runtime GenAI finds its way around a decoder that `export_onnx` wrote.

The format is described at https://onnxruntime.ai/docs/genai/reference/config.html.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from lte_compile.exporters.interface import Interface, TensorSpec

CONFIG_NAME: Final = "genai_config.json"

# GenAI has names for some families, which it gives inputs of their own, and this one for any decoder with named
# past and present tensors.
_TYPE: Final = "decoder"

# GenAI cannot run without these.
_REQUIRED_INPUTS: Final = ("input_ids", "attention_mask")
_PAST: Final = re.compile(r"past_key_values\.(\d+)\.(key|value)")


@dataclass(frozen=True, kw_only=True)
class DecoderFacts:
    """What a generation loop must know of a model and its ONNX file does not say."""

    context_length: int
    hidden_size: int
    attention_heads: int
    bos_token_id: int | None
    eos_token_ids: Sequence[int]
    pad_token_id: int | None

    def __post_init__(self) -> None:
        if not self.eos_token_ids:
            raise ValueError("GenAI must know which token ends a text; set generation_config.eos_token_id of the model")


def genai_config(
    interface: Interface, facts: DecoderFacts, *, filename: str = "model.onnx", custom_ops: str | None = None
) -> dict[str, Any]:
    """The configuration as a JSON-able mapping. Decoding is greedy unless the caller of GenAI sets other options.

    Args:
        custom_ops: file name of a library of kernels in the same folder; GenAI loads libraries from nowhere else.

    Raises:
        ValueError: no decoder with a cache, or layers that differ.
    """
    heads, width, layers = _cache_shape(interface)
    session = {"log_id": "onnxruntime-genai", "provider_options": []}
    return {
        "model": {
            "type": _TYPE,
            "vocab_size": _vocab_size(interface),
            "context_length": facts.context_length,
            **_tokens(facts),
            "decoder": {
                "filename": filename,
                "session_options": session | ({} if custom_ops is None else {"custom_ops_library": custom_ops}),
                "head_size": width,
                "hidden_size": facts.hidden_size,
                "num_attention_heads": facts.attention_heads,
                "num_key_value_heads": heads,
                "num_hidden_layers": layers,
                "inputs": _inputs(interface),
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": _search(facts),
    }


def _tokens(facts: DecoderFacts) -> dict[str, Any]:
    ends = list(facts.eos_token_ids)
    return {
        "bos_token_id": ends[0] if facts.bos_token_id is None else facts.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
        "pad_token_id": ends[0] if facts.pad_token_id is None else facts.pad_token_id,
    }


def _inputs(interface: Interface) -> dict[str, str]:
    names = [name for name in (*_REQUIRED_INPUTS, "position_ids") if interface.input(name) is not None]
    return {
        **{name: name for name in names},
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }


def _search(facts: DecoderFacts) -> dict[str, Any]:
    """Greedy. One buffer for past and present would need an attention operator that appends in place."""
    return {
        "do_sample": False,
        "max_length": facts.context_length,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": False,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 1,
        "top_p": 1.0,
    }


def _cache_shape(interface: Interface) -> tuple[int, int, int]:
    """Key/value heads, head width and number of layers."""
    missing = [name for name in _REQUIRED_INPUTS if interface.input(name) is None]
    past = [spec for spec in interface.inputs if _PAST.fullmatch(spec.name)]
    if missing or not past or interface.output("logits") is None:
        raise ValueError(
            f"GenAI runs decoders with a cache; this file takes {[spec.name for spec in interface.inputs][:4]}: "
            "export it with kv_cache=True"
        )
    shapes = {_heads_and_width(spec) for spec in past}
    if len(shapes) > 1:
        raise ValueError(
            f"GenAI takes one number of heads and one head width for all layers; this model has {sorted(shapes)}. "
            "Run it with lte_compile.exporters.runtime instead"
        )
    heads, width = shapes.pop()
    return heads, width, len(past) // 2


def _heads_and_width(spec: TensorSpec) -> tuple[int, int]:
    _, heads, _, width = spec.dims
    assert isinstance(heads, int)
    assert isinstance(width, int)
    return heads, width


def _vocab_size(interface: Interface) -> int:
    logits = interface.output("logits")
    assert logits is not None
    size = logits.dims[-1]
    assert isinstance(size, int)
    return size
