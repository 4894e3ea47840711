"""Tiny random transformers models, one per FFN spelling, with example inputs: `model, inputs = build("llama")`.

Two layers each, D = 64, F = 128, weights from a fixed seed, batches of two whose second row is padded where the family
has a mask. `EXPECTED` says what a correct search finds in each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers as tf
from torch import Tensor, nn

from lte_compile.passes.ir import Fusion, WeightLayout

WIDTH, HIDDEN, LAYERS, HEADS, VOCAB, TOKENS = 64, 128, 2, 4, 96, 12
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


class Expected(NamedTuple):
    """What the sites of a family look like; `down` are the possible endings of the down weight's name."""

    activation: str
    gated: bool
    biased: bool
    down: tuple[str, ...]
    sites: int = LAYERS
    fusion: Fusion = Fusion.SEPARATE
    layout: WeightLayout = WeightLayout.OUT_IN


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
    """The family's tiny model in eval mode and keyword arguments for its forward. The global RNG is left alone."""
    if name not in _BUILDERS:
        raise ValueError(f"no tiny model named {name!r}; choose from {', '.join(_BUILDERS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = _BUILDERS[name]()
        _spread_biases(model)
    model = model.to(dtype).eval()
    return model, {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def families() -> tuple[str, ...]:
    return tuple(_BUILDERS)


def _spread_biases(model: nn.Module) -> None:
    """Fresh transformers models have zero biases, which would hide a misplaced one."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)


def _text() -> dict[str, Tensor]:
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, -4:] = 0
    return {"input_ids": torch.randint(3, VOCAB, (2, TOKENS)), "attention_mask": mask}


def _encoder_decoder() -> dict[str, Tensor]:
    return {**_text(), "decoder_input_ids": torch.randint(3, VOCAB, (2, 7))}


def _image() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def _llama_like(config: type, model: type, **extra: Any) -> Callable[[], tuple[nn.Module, dict[str, Tensor]]]:
    def make() -> tuple[nn.Module, dict[str, Tensor]]:
        settings = {
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "intermediate_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "max_position_embeddings": 64,
            **extra,
        }
        return model(config(**settings)), _text()

    return make


def _gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    config = tf.GPT2Config(
        vocab_size=VOCAB, n_embd=WIDTH, n_inner=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=64, **_TOKENS
    )
    return tf.GPT2LMHeadModel(config), _text()


def _opt() -> tuple[nn.Module, dict[str, Tensor]]:
    config = tf.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH,
        ffn_dim=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
    )
    return tf.OPTForCausalLM(config), _text()


def _t5(feed_forward: str) -> Callable[[], tuple[nn.Module, dict[str, Tensor]]]:
    def make() -> tuple[nn.Module, dict[str, Tensor]]:
        config = tf.T5Config(
            vocab_size=VOCAB,
            d_model=WIDTH,
            d_kv=WIDTH // HEADS,
            d_ff=HIDDEN,
            num_layers=LAYERS,
            num_heads=HEADS,
            feed_forward_proj=feed_forward,
            decoder_start_token_id=0,
        )
        return tf.T5ForConditionalGeneration(config), _encoder_decoder()

    return make


def _distilbert() -> tuple[nn.Module, dict[str, Tensor]]:
    config = tf.DistilBertConfig(
        vocab_size=VOCAB, dim=WIDTH, hidden_dim=HIDDEN, n_layers=LAYERS, n_heads=HEADS, max_position_embeddings=64
    )
    return tf.DistilBertForSequenceClassification(config), _text()


def _falcon() -> tuple[nn.Module, dict[str, Tensor]]:
    config = tf.FalconConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        ffn_hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        bias=True,
    )
    return tf.FalconForCausalLM(config), _text()


def _vit() -> tuple[nn.Module, dict[str, Tensor]]:
    config = tf.ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_labels=3,
    )
    return tf.ViTForImageClassification(config), _image()


def _bart() -> tuple[nn.Module, dict[str, Tensor]]:
    config = tf.BartConfig(
        vocab_size=VOCAB,
        d_model=WIDTH,
        encoder_ffn_dim=HIDDEN,
        decoder_ffn_dim=HIDDEN,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        max_position_embeddings=64,
    )
    return tf.BartForConditionalGeneration(config), _encoder_decoder()


def _whisper() -> tuple[nn.Module, dict[str, Tensor]]:
    config = tf.WhisperConfig(
        vocab_size=VOCAB,
        d_model=WIDTH,
        num_mel_bins=8,
        encoder_ffn_dim=HIDDEN,
        decoder_ffn_dim=HIDDEN,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        max_source_positions=16,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    inputs = {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": torch.randint(3, VOCAB, (2, 7))}
    return tf.WhisperForConditionalGeneration(config), inputs


_BUILDERS: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {
    "llama": _llama_like(tf.LlamaConfig, tf.LlamaForCausalLM, num_key_value_heads=2),
    "gpt2": _gpt2,
    "bert": _llama_like(tf.BertConfig, tf.BertForSequenceClassification, num_labels=3),
    "opt": _opt,
    "t5": _t5("relu"),
    "phi3": _llama_like(tf.Phi3Config, tf.Phi3ForCausalLM, num_key_value_heads=2, **_TOKENS),
    "vit": _vit,
    "mistral": _llama_like(tf.MistralConfig, tf.MistralForCausalLM, num_key_value_heads=2),
    "gemma": _llama_like(tf.GemmaConfig, tf.GemmaForCausalLM, num_key_value_heads=2, head_dim=WIDTH // HEADS),
    "gpt_neox": _llama_like(tf.GPTNeoXConfig, tf.GPTNeoXForCausalLM),
    "falcon": _falcon,
    "distilbert": _distilbert,
    "albert": _llama_like(tf.AlbertConfig, tf.AlbertForSequenceClassification, embedding_size=32, num_labels=3),
    "t5_gated": _t5("gated-gelu"),
    "bart": _bart,
    "whisper": _whisper,
}

_GATED = ("mlp.down_proj.weight",)
_T5 = ("DenseReluDense.wo.weight",)

EXPECTED: dict[str, Expected] = {
    "llama": Expected("silu", True, False, _GATED),
    "gpt2": Expected("gelu_tanh", False, True, ("mlp.c_proj.weight",), layout=WeightLayout.IN_OUT),
    "bert": Expected("gelu", False, True, ("output.dense.weight",)),
    "opt": Expected("relu", False, True, ("fc2.weight",)),
    "t5": Expected("relu", False, False, _T5, sites=2 * LAYERS),
    "phi3": Expected("silu", True, False, _GATED, fusion=Fusion.GATE_THEN_UP),
    "vit": Expected("gelu", False, True, ("mlp.fc2.weight", "output.dense.weight")),
    "mistral": Expected("silu", True, False, _GATED),
    "gemma": Expected("gelu_tanh", True, False, _GATED),
    "gpt_neox": Expected("gelu", False, True, ("mlp.dense_4h_to_h.weight",)),
    "falcon": Expected("gelu", False, True, ("mlp.dense_4h_to_h.weight",)),
    "distilbert": Expected("gelu", False, True, ("ffn.lin2.weight",)),
    "albert": Expected("gelu_tanh", False, True, ("ffn_output.weight",), sites=1),
    "t5_gated": Expected("gelu_tanh", True, False, _T5, sites=2 * LAYERS),
    "bart": Expected("gelu", False, True, ("fc2.weight",), sites=2 * LAYERS),
    "whisper": Expected("gelu", False, True, ("fc2.weight",), sites=2 * LAYERS),
}
