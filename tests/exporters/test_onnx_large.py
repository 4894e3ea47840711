"""A decoder of more than 2 GB, which no protobuf message holds: `-m slow`; 7 GB of memory and 3 GB of disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lte_compile.config import Grouping, TransformConfig
from lte_compile.exporters.runtime import greedy_generate, open_session
from lte_compile.routing.router import routers, set_stage
from lte_compile.serving.onnx_file import export_onnx
from lte_compile.transform import transform

NEW_TOKENS = 8


@pytest.mark.slow
def test_decoder_beyond_2_gb(tmp_path: Path, ort_library: str) -> None:
    # Two layers of 3 x 4096 x 24576 weights in float32: 1.2 GB each, so that the second begins and ends past 2 GB.
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=24576,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=1,
        vocab_size=512,
    )
    torch.manual_seed(0)
    model: Any = transform(
        LlamaForCausalLM(config).eval(), TransformConfig(expert_size=128, grouping=Grouping.CONTIGUOUS)
    )
    set_stage(model, "hard")
    for router in routers(model):  # as drawn they select about half
        router.load_initial(torch.randn_like(router.weight), torch.zeros(router.num_experts))

    report = export_onnx(model, tmp_path / "model.onnx", kv_cache=True)
    assert report.data is not None
    assert report.data.stat().st_size > 2**31
    assert report.path.stat().st_size < 2**20
    assert [node.name for node in report.sparse] == ["model.layers.0.mlp", "model.layers.1.mlp"]

    ids = torch.randint(3, 512, (2, 6))
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": 512}
    wanted = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options).numpy()
    for library in (None, ort_library):
        session = open_session(report.path, custom_ops=library)
        np.testing.assert_array_equal(greedy_generate(session, ids.numpy(), max_new_tokens=NEW_TOKENS), wanted)
