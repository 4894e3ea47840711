"""Example inputs for transformers models, built from their configuration."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

BATCH, TEXT_TOKENS, TARGET_TOKENS = 2, 8, 5
_WHISPER_FRAMES_PER_POSITION = 2  # stride of the second convolution in Whisper's encoder


def dummy_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Keyword arguments for one forward pass of a transformers model: text, text to text, images or audio.

    Raises:
        ValueError: the model is not a transformers model, or reads something this function does not know.
    """
    config = getattr(model, "config", None)
    main_input = getattr(model, "main_input_name", None)
    if config is None or main_input is None:
        raise ValueError(
            f"{type(model).__name__} is not a transformers model, so its inputs cannot be guessed; pass "
            "example_inputs: a dict of keyword arguments, a tuple of positional arguments, or one tensor"
        )
    accepted = inspect.signature(_inner(model).forward).parameters
    builders = {"input_ids": _text, "pixel_values": _image, "input_features": _features, "input_values": _waveform}
    if main_input not in builders:
        raise ValueError(
            f"{type(model).__name__} reads {main_input!r}, for which no example can be built from its config; "
            f"pass example_inputs (known inputs: {', '.join(builders)})"
        )
    anchor = next(model.parameters(), torch.empty(0))
    inputs = builders[main_input](config)
    if main_input != "pixel_values" and "pixel_values" in accepted and hasattr(config, "vision_config"):
        inputs |= _image(config.vision_config)
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = _token_ids(config, TARGET_TOKENS)
    return {name: _like(value, anchor) for name, value in inputs.items() if name in accepted or name == main_input}


def _inner(model: nn.Module) -> nn.Module:
    """The model inside a wrapper such as peft's, whose own forward takes anything."""
    base: Callable[[], nn.Module] | None = getattr(model, "get_base_model", None)
    return base() if callable(base) else model


def _like(value: Tensor, anchor: Tensor) -> Tensor:
    return value.to(anchor.device, anchor.dtype if value.is_floating_point() else value.dtype)


def _token_ids(config: Any, tokens: int) -> Tensor:
    ids = torch.arange(BATCH * tokens).reshape(BATCH, tokens)
    return (ids + 3) % _vocabulary(config)  # starts past the usual pad, begin and end tokens


def _vocabulary(config: Any) -> int:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(text.vocab_size)


def _text(config: Any) -> dict[str, Tensor]:
    ids = _token_ids(config, TEXT_TOKENS)
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < _vocabulary(config):  # a small GPT2Config keeps the large one's 50256
        ids[:, -1] = end  # encoder-decoder classifiers read the position of the last end token
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _image(config: Any) -> dict[str, Tensor]:
    size = getattr(config, "image_size", 224)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return {"pixel_values": torch.zeros(BATCH, getattr(config, "num_channels", 3), height, width)}


def _features(config: Any) -> dict[str, Tensor]:
    frames = _WHISPER_FRAMES_PER_POSITION * getattr(config, "max_source_positions", 512)
    return {"input_features": torch.zeros(BATCH, getattr(config, "num_mel_bins", 80), frames)}


def _waveform(config: Any) -> dict[str, Tensor]:
    one_second = getattr(config, "sampling_rate", 16_000)
    return {"input_values": torch.zeros(BATCH, one_second)}
