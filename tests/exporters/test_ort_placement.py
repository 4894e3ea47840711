"""Whole exported models in ONNX Runtime with the library: our kernel runs every FFN."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

from lte_compile.exporters.runtime import OrtGenerator, run
from lte_compile.routing.router import Router
from lte_compile.serving.onnx_file import export_onnx
from tests.exporters.hard import prompts, shallow

# Tracing these for coverage takes half of their time again; other tests run the same lines.
pytestmark = pytest.mark.no_cover

DECODERS = ("llama", "gpt2")
FAMILIES = ("bert", "llama", pytest.param("gpt2", marks=pytest.mark.slow), "vit")


def run_once(family: str, session: ort.InferenceSession, inputs: dict[str, Any]) -> None:
    if family not in DECODERS:
        run(session, {name: value.numpy() for name, value in inputs.items()})
        return
    generator = OrtGenerator(session)
    ids, mask = (value.numpy() for value in prompts(1, 4))
    generator.step(ids, mask, generator.empty_cache(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_our_kernel_runs_every_ffn(family: str, tmp_path: Path, ort_library: str) -> None:
    """By the runtime's own profile, which names the operator and the provider of every node it ran."""
    model, inputs = shallow(family)
    export_onnx(model, tmp_path / "model.onnx", kv_cache=family in DECODERS)
    options = ort.SessionOptions()
    options.register_custom_ops_library(ort_library)
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / family)
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    run_once(family, session, dict(inputs))
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = [event["args"] for event in events if event.get("args", {}).get("op_name") == "SparseFFN"]
    assert len(ran) == sum(isinstance(module, Router) for module in model.modules())
    assert {args["provider"] for args in ran} == {"CPUExecutionProvider"}
