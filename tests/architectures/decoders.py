"""Decoder-only language models."""

from __future__ import annotations

from typing import Any

from tests.architectures.row import GROUPED, HEADS, HIDDEN, LAYERS, UNSET, WIDTH, Row, pretrained, unmasked_text

_HEAD_DIM: dict[str, Any] = {"head_dim": WIDTH // HEADS}


def _llama_like(name: str, model: str, down: str = "mlp.down_proj", **settings: Any) -> Row:
    """Models that lay out their layers as Llama does, `model.layers.N`."""
    return pretrained(name, model, f"model.layers.{{}}.{down}", **{**GROUPED, **settings})


ROWS: tuple[Row, ...] = (
    _llama_like("llama", "LlamaForCausalLM", onnx=True, in_default_run=True),
    _llama_like("mistral", "MistralForCausalLM", onnx=True),
    _llama_like("ministral3", "Ministral3ForCausalLM"),
    _llama_like("qwen2", "Qwen2ForCausalLM"),
    _llama_like("qwen3", "Qwen3ForCausalLM", **_HEAD_DIM),
    _llama_like("gemma", "GemmaForCausalLM", **_HEAD_DIM),
    _llama_like("gemma2", "Gemma2ForCausalLM", **_HEAD_DIM),
    _llama_like("gemma3", "Gemma3ForCausalLM", **_HEAD_DIM),
    _llama_like("phi3", "Phi3ForCausalLM", onnx=True, in_default_run=True),
    _llama_like("stablelm", "StableLmForCausalLM"),
    _llama_like("olmo", "OlmoForCausalLM"),
    _llama_like("olmo2", "Olmo2ForCausalLM"),
    _llama_like("olmo3", "Olmo3ForCausalLM"),
    _llama_like("cohere", "CohereForCausalLM"),
    _llama_like("cohere2", "Cohere2ForCausalLM", **_HEAD_DIM),
    _llama_like("nemotron", "NemotronForCausalLM"),
    _llama_like("granite", "GraniteForCausalLM"),
    _llama_like("smollm3", "SmolLM3ForCausalLM"),
    _llama_like("glm", "GlmForCausalLM", **_HEAD_DIM),
    _llama_like("glm4", "Glm4ForCausalLM", **_HEAD_DIM),
    _llama_like("exaone4", "Exaone4ForCausalLM"),
    _llama_like("apertus", "ApertusForCausalLM"),
    _llama_like("arcee", "ArceeForCausalLM"),
    _llama_like("helium", "HeliumForCausalLM", **_HEAD_DIM),
    _llama_like("ernie4_5", "Ernie4_5ForCausalLM", **_HEAD_DIM),
    _llama_like("seed_oss", "SeedOssForCausalLM", **_HEAD_DIM),
    _llama_like("hunyuan", "HunYuanDenseV1ForCausalLM", **_HEAD_DIM),
    _llama_like("diffllama", "DiffLlamaForCausalLM"),
    _llama_like("doge", "DogeForCausalLM"),
    _llama_like("vaultgemma", "VaultGemmaForCausalLM", **_HEAD_DIM),
    _llama_like("nanochat", "NanoChatForCausalLM", "mlp.fc2", **_HEAD_DIM),
    _llama_like("starcoder2", "Starcoder2ForCausalLM", "mlp.c_proj"),
    _llama_like(
        "lfm2",
        "Lfm2ForCausalLM",
        "feed_forward.w2",
        layer_types=["conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
    ),
    _llama_like(
        "falcon_h1",
        "FalconH1ForCausalLM",
        "feed_forward.down_proj",
        mamba_d_ssm=64,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=8,
    ),
    _llama_like(
        "bamba",
        "BambaForCausalLM",
        "feed_forward.down_proj",
        attn_layer_indices=[1],
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=8,
    ),
    _llama_like(
        "recurrent_gemma",
        "RecurrentGemmaForCausalLM",
        "mlp_block.down_proj",
        intermediate_size=2 * HIDDEN,
        lru_width=WIDTH,
        block_types=["recurrent", "attention"],
        **_HEAD_DIM,
    ),
    pretrained("phi", "PhiForCausalLM", "model.layers.{}.mlp.fc2"),
    pretrained(
        "gpt2", "GPT2LMHeadModel", "transformer.h.{}.mlp.c_proj", n_inner=HIDDEN, onnx=True, in_default_run=True
    ),
    pretrained(
        "gpt_neo",
        "GPTNeoForCausalLM",
        "transformer.h.{}.mlp.c_proj",
        num_layers=LAYERS,
        attention_types=[[["global", "local"], 1]],
        num_heads=HEADS,
    ),
    pretrained("gpt_neox", "GPTNeoXForCausalLM", "gpt_neox.layers.{}.mlp.dense_4h_to_h", onnx=True),
    pretrained("gpt_neox_japanese", "GPTNeoXJapaneseForCausalLM", "gpt_neox_japanese.layers.{}.mlp.dense_4h_to_h"),
    pretrained("gptj", "GPTJForCausalLM", "transformer.h.{}.mlp.fc_out", n_inner=HIDDEN, rotary_dim=4),
    pretrained("gpt_bigcode", "GPTBigCodeForCausalLM", "transformer.h.{}.mlp.c_proj", n_inner=HIDDEN),
    pretrained("codegen", "CodeGenForCausalLM", "transformer.h.{}.mlp.fc_out", n_inner=HIDDEN, rotary_dim=4),
    pretrained(
        "opt",
        "OPTForCausalLM",
        "model.decoder.layers.{}.fc2",
        ffn_dim=HIDDEN,
        word_embed_proj_dim=WIDTH,
        onnx=True,
        in_default_run=True,
    ),
    pretrained("bloom", "BloomForCausalLM", "transformer.h.{}.mlp.dense_4h_to_h"),
    pretrained("falcon", "FalconForCausalLM", "transformer.h.{}.mlp.dense_4h_to_h", ffn_hidden_size=HIDDEN),
    pretrained(
        "mpt", "MptForCausalLM", "transformer.blocks.{}.ffn.down_proj", n_heads=HEADS, n_layers=LAYERS, d_model=WIDTH
    ),
    pretrained("persimmon", "PersimmonForCausalLM", "model.layers.{}.mlp.dense_4h_to_h"),
    pretrained("biogpt", "BioGptForCausalLM", "biogpt.layers.{}.fc2"),
    pretrained("ctrl", "CTRLLMHeadModel", "transformer.h.{}.ffn.2", dff=HIDDEN, inputs=unmasked_text),
    pretrained("openai_gpt", "OpenAIGPTLMHeadModel", "transformer.h.{}.mlp.c_proj"),
    pretrained(
        "rwkv",
        "RwkvForCausalLM",
        "rwkv.blocks.{}.feed_forward.value",
        attention_hidden_size=WIDTH,
        rescale_every=0,  # the model would divide its weights in its first forward pass
        inputs=unmasked_text,
    ),
    pretrained(
        "cpmant",
        "CpmAntForCausalLM",
        "cpmant.encoder.layers.{}.ffn.ffn.w_out",
        dim_ff=HIDDEN,
        dim_head=8,
        inputs=unmasked_text,
    ),
    pretrained("modernbert_decoder", "ModernBertDecoderForCausalLM", "model.layers.{}.mlp.Wo"),
    pretrained(
        "blenderbot_decoder",
        "BlenderbotForCausalLM",
        "model.decoder.layers.{}.fc2",
        decoder_ffn_dim=HIDDEN,
        decoder_layers=LAYERS,
        decoder_attention_heads=HEADS,
    ),
    pretrained("mamba", "MambaForCausalLM", intermediate_size=UNSET, inputs=unmasked_text),
)
