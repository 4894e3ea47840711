"""Encoders of raw or featurised audio."""

from __future__ import annotations

from typing import Any

import torch

from tests.architectures.row import Inputs, Row, pretrained, waveform

_FEATURE_EXTRACTOR: dict[str, Any] = {
    "conv_dim": [16, 16],
    "conv_kernel": [10, 3],
    "conv_stride": [8, 4],
    "num_feat_extract_layers": 2,
}
_POSITIONS: dict[str, Any] = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}


def _wav2vec2_like(name: str, model: str, prefix: str, **settings: Any) -> Row:
    down = f"{prefix}.encoder.layers.{{}}.feed_forward.output_dense"
    return pretrained(name, model, down, inputs=waveform, **{**_FEATURE_EXTRACTOR, **_POSITIONS, **settings})


def _spectrogram() -> Inputs:
    return {"input_values": torch.randn(2, 32, 16)}


ROWS: tuple[Row, ...] = (
    _wav2vec2_like("wav2vec2", "Wav2Vec2ForCTC", "wav2vec2"),
    _wav2vec2_like("hubert", "HubertForCTC", "hubert"),
    _wav2vec2_like("wavlm", "WavLMForCTC", "wavlm"),
    _wav2vec2_like("unispeech", "UniSpeechForCTC", "unispeech"),
    _wav2vec2_like("unispeech_sat", "UniSpeechSatForCTC", "unispeech_sat"),
    _wav2vec2_like("data2vec_audio", "Data2VecAudioForCTC", "data2vec_audio"),
    _wav2vec2_like("sew", "SEWForCTC", "sew", squeeze_factor=2),
    pretrained(
        "wav2vec2_conformer",
        "Wav2Vec2ConformerForCTC",
        "wav2vec2_conformer.encoder.layers.{}.ffn1.output_dense",
        "wav2vec2_conformer.encoder.layers.{}.ffn2.output_dense",
        inputs=waveform,
        **_FEATURE_EXTRACTOR,
        **_POSITIONS,
        conv_depthwise_kernel_size=3,
    ),
    pretrained(
        "audio_spectrogram_transformer",
        "ASTForAudioClassification",
        "audio_spectrogram_transformer.layers.{}.mlp.fc2",
        inputs=_spectrogram,
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
        max_length=32,
        num_mel_bins=16,
    ),
)
