"""Encoder-decoder models of text and speech."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.architectures.row import (
    GROUPED,
    HEADS,
    HIDDEN,
    LAYERS,
    SMALL,
    UNSET,
    VOCAB,
    WIDTH,
    Inputs,
    Row,
    pretrained,
    text_to_text,
)

_BART: dict[str, Any] = {
    "d_model": WIDTH,
    "encoder_ffn_dim": HIDDEN,
    "decoder_ffn_dim": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "decoder_start_token_id": 2,
}
_GEMMA: dict[str, Any] = {**SMALL, **GROUPED, "head_dim": 8}
_SPEECH: dict[str, Any] = {**_BART, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32}


def _bart_like(name: str, model: str, **settings: Any) -> Row:
    downs = ("model.encoder.layers.{}.fc2", "model.decoder.layers.{}.fc2")
    return pretrained(name, model, *downs, inputs=text_to_text, **{**_BART, **settings})


def _t5_like(name: str, model: str, inputs: Callable[[], Inputs] = text_to_text, **settings: Any) -> Row:
    downs = ("encoder.block.{}.layer.1.DenseReluDense.wo", "decoder.block.{}.layer.2.DenseReluDense.wo")
    sizes = {"d_ff": HIDDEN, "d_kv": 8, "num_decoder_layers": LAYERS, "decoder_start_token_id": 0}
    return pretrained(name, model, *downs, inputs=inputs, **{**sizes, **settings})


def _text_to_padded_text() -> Inputs:
    """With a mask for the decoder: without one, UMT5 of transformers 5.17 loses its causality when exported."""
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, -2:] = 0
    return {**text_to_text(), "decoder_attention_mask": mask}


def _mel_features(frames: int = 32) -> Inputs:
    return {"input_features": torch.randn(2, 8, frames), "decoder_input_ids": torch.randint(3, VOCAB, (2, 6))}


def _frames_first() -> Inputs:
    return {"input_features": torch.randn(2, 32, 8), "decoder_input_ids": torch.randint(3, VOCAB, (2, 6))}


ROWS: tuple[Row, ...] = (
    _t5_like("t5", "T5ForConditionalGeneration", feed_forward_proj="relu", in_default_run=True),
    _t5_like("t5_gated", "T5ForConditionalGeneration", feed_forward_proj="gated-gelu"),
    _t5_like("mt5", "MT5ForConditionalGeneration"),
    _t5_like("umt5", "UMT5ForConditionalGeneration", inputs=_text_to_padded_text),
    _t5_like("longt5", "LongT5ForConditionalGeneration", encoder_attention_type="local", local_radius=4),
    _bart_like("bart", "BartForConditionalGeneration", onnx=True),
    _bart_like("mbart", "MBartForConditionalGeneration"),
    _bart_like("pegasus", "PegasusForConditionalGeneration"),
    _bart_like("pegasus_x", "PegasusXForConditionalGeneration", num_global_tokens=2, block_size=4),
    _bart_like("marian", "MarianMTModel"),
    _bart_like("blenderbot", "BlenderbotForConditionalGeneration"),
    _bart_like("blenderbot_small", "BlenderbotSmallForConditionalGeneration"),
    _bart_like("m2m_100", "M2M100ForConditionalGeneration"),
    _bart_like("plbart", "PLBartForConditionalGeneration"),
    _bart_like("mvp", "MvpForConditionalGeneration"),
    _bart_like("bigbird_pegasus", "BigBirdPegasusForConditionalGeneration", attention_type="original_full"),
    pretrained(
        "led",
        "LEDForConditionalGeneration",
        "led.encoder.layers.{}.fc2",
        "led.decoder.layers.{}.fc2",
        inputs=text_to_text,
        **_BART,
        attention_window=4,
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
        exportable=False,
    ),
    pretrained(
        "prophetnet",
        "ProphetNetForConditionalGeneration",
        "prophetnet.encoder.layers.{}.feed_forward.output",
        "prophetnet.decoder.layers.{}.feed_forward.output",
        dtype=torch.float32,  # in float64 its mask, float32 times the lowest float64, is NaN everywhere
        inputs=text_to_text,
        encoder_ffn_dim=HIDDEN,
        decoder_ffn_dim=HIDDEN,
        num_encoder_layers=LAYERS,
        num_decoder_layers=LAYERS,
        num_encoder_attention_heads=HEADS,
        num_decoder_attention_heads=HEADS,
        num_hidden_layers=UNSET,
    ),
    pretrained(
        "nllb_moe",
        "NllbMoeForConditionalGeneration",
        "model.encoder.layers.{}.ffn.fc2",
        "model.decoder.layers.{}.ffn.fc2",
        inputs=text_to_text,
        **_BART,
        encoder_sparse_step=0,
        decoder_sparse_step=0,
    ),
    pretrained(
        "whisper",
        "WhisperForConditionalGeneration",
        "model.encoder.layers.{}.fc2",
        "model.decoder.layers.{}.fc2",
        inputs=_mel_features,
        **_SPEECH,
        onnx=True,
        in_default_run=True,
    ),
    pretrained(
        "speech_to_text",
        "Speech2TextForConditionalGeneration",
        "model.encoder.layers.{}.fc2",
        "model.decoder.layers.{}.fc2",
        inputs=_frames_first,
        **{**_SPEECH, "max_source_positions": 64},
        input_feat_per_channel=8,
        conv_channels=16,
    ),
    pretrained(
        "t5gemma",
        "T5GemmaForConditionalGeneration",
        "model.encoder.layers.{}.mlp.down_proj",
        "model.decoder.layers.{}.mlp.down_proj",
        inputs=text_to_text,
        encoder=_GEMMA,
        decoder=_GEMMA,
    ),
    pretrained(
        "seamless_m4t",
        "SeamlessM4TForTextToText",
        "text_encoder.layers.{}.ffn.fc2",
        "text_decoder.layers.{}.ffn.fc2",
        inputs=text_to_text,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_ffn_dim=HIDDEN,
        decoder_ffn_dim=HIDDEN,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        speech_encoder_layers=1,
        t2u_encoder_layers=1,
        t2u_decoder_layers=1,
        decoder_start_token_id=3,
        max_new_tokens=8,
    ),
)
