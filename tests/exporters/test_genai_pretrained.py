"""SmolLM2-135M with its trained weights in ONNX Runtime GenAI on a CPU: `-m slow`, with and without the library."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from lte_compile.data.models import resolve_model
from lte_compile.routing.router import routers
from lte_compile.serving.folders import export_folder
from tests.exporters.test_onnx_decoders import tokens_of_genai
from tests.exporters.test_ort_pretrained import DTYPES, NEW_TOKENS, NO_TOKEN, PROMPTS, SMOLLM2, encode, routed


@pytest.mark.slow
@pytest.mark.no_cover
@pytest.mark.parametrize("precision", DTYPES)
def test_smollm2(precision: str, ort_library: str, tmp_path: Path) -> None:
    """32 tokens after one prompt, and after three at once: GenAI takes prompts of one length only."""
    pytest.importorskip("onnxruntime_genai", reason="needs onnxruntime-genai")
    model, tokenizer = routed(SMOLLM2)
    report = export_folder(
        model,
        tmp_path / "served",
        kv_cache=True,
        dtype=DTYPES[precision],
        tokenizer=resolve_model(SMOLLM2),
        custom_ops=ort_library,
    )
    assert len(report.models[0].sparse) == len(list(routers(model)))
    one_BT = encode(SMOLLM2, tokenizer, PROMPTS[:1])["input_ids"]
    batches = (one_BT, one_BT.repeat(3, 1))
    model = deepcopy(model).to(DTYPES[precision])
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": NO_TOKEN}
    with torch.no_grad():
        wanted = [model.generate(input_ids=ids_BT, **options).tolist() for ids_BT in batches]
    assert [tokens_of_genai(report.path, ids_BT) for ids_BT in batches] == wanted
    drop_library(report.path / "genai_config.json")
    assert [tokens_of_genai(report.path, ids_BT) for ids_BT in batches] == wanted


def drop_library(config: Path) -> None:
    """The folder then runs the body that the file brings along."""
    content = json.loads(config.read_text(encoding="utf-8"))
    del content["model"]["decoder"]["session_options"]["custom_ops_library"]
    config.write_text(json.dumps(content), encoding="utf-8")
