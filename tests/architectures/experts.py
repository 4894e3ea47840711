"""Models with experts of their own: the dense FFNs and shared experts are sites, the experts are native ones."""

from __future__ import annotations

from typing import Any

from tests.architectures.row import GROUPED, HEADS, HIDDEN, Row, pretrained

_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "experts_implementation": "batched_mm",  # torch's grouped product has no float64
}
_BANK = "mlp.experts.down_proj"
_LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": HEADS,
    "head_dim": 8,
}


def _mixture(name: str, model: str, *downs: str, bank: str = _BANK, first: int = 0, **settings: Any) -> Row:
    """A decoder whose layers from the `first` on hold experts."""
    native = tuple(f"model.layers.{layer}.{bank}" for layer in range(first, 2))
    paths = tuple(f"model.layers.{down}" for down in downs)
    return pretrained(name, model, *paths, native=native, **{**GROUPED, **_EXPERTS, **settings})


_FIRST_LAYER_DENSE: dict[str, Any] = {"first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
_DENSE_THEN_SHARED = ("0.mlp.down_proj", "1.mlp.shared_experts.down_proj")

ROWS: tuple[Row, ...] = (
    _mixture("qwen2_moe", "Qwen2MoeForCausalLM", "{}.mlp.shared_expert.down_proj", shared_expert_intermediate_size=40),
    _mixture(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        "0.mlp.down_proj",
        first=1,
        mlp_only_layers=[0],
        head_dim=8,
        in_default_run=True,
    ),
    _mixture("mixtral", "MixtralForCausalLM", bank="mlp.experts.down_proj"),
    _mixture("olmoe", "OlmoeForCausalLM"),
    _mixture("phimoe", "PhimoeForCausalLM"),
    _mixture("gpt_oss", "GptOssForCausalLM", head_dim=8),
    _mixture("minimax", "MiniMaxForCausalLM", layer_types=["full_attention", "full_attention"], head_dim=8),
    _mixture("granitemoe", "GraniteMoeForCausalLM", bank="block_sparse_moe.experts.down_proj"),
    _mixture(
        "jamba",
        "JambaForCausalLM",
        "0.feed_forward.down_proj",
        bank="feed_forward.experts.down_proj",
        first=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        use_mamba_kernels=False,
        mamba_d_state=8,
        mamba_dt_rank=4,
    ),
    _mixture("glm4_moe", "Glm4MoeForCausalLM", *_DENSE_THEN_SHARED, first=1, head_dim=8, **_FIRST_LAYER_DENSE),
    _mixture("dots1", "Dots1ForCausalLM", *_DENSE_THEN_SHARED, first=1, head_dim=8, **_FIRST_LAYER_DENSE),
    _mixture("deepseek_v2", "DeepseekV2ForCausalLM", *_DENSE_THEN_SHARED, first=1, **_FIRST_LAYER_DENSE, **_LATENT),
    _mixture("deepseek_v3", "DeepseekV3ForCausalLM", *_DENSE_THEN_SHARED, first=1, **_FIRST_LAYER_DENSE, **_LATENT),
    _mixture(
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM",
        *_DENSE_THEN_SHARED,
        first=1,
        moe_num_experts=4,
        moe_k=2,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        moe_layer_end_index=1,
    ),
    _mixture("hunyuan_moe", "HunYuanMoEV1ForCausalLM", "{}.mlp.shared_mlp.down_proj", head_dim=8, moe_topk=2),
    _mixture(
        "llama4",
        "Llama4ForCausalLM",
        "0.feed_forward.down_proj",
        "1.feed_forward.shared_expert.down_proj",
        bank="feed_forward.experts.down_proj",
        first=1,
        intermediate_size_mlp=HIDDEN,
        moe_layers=[1],
        head_dim=8,
        intermediate_size=48,
        attention_chunk_size=8,
    ),
)
