"""Models with two-layer routers lowered, compiled and exported: the same kernels and nodes as with linear ones."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

import lte_compile as lte
from lte_compile.backend import lte_backend
from lte_compile.config import RouterKind, TransformConfig
from lte_compile.exporters.runtime import open_session, run
from lte_compile.passes.exported import rewrite_exported
from lte_compile.passes.fuse import FuseExperts
from lte_compile.passes.lower import LowerSparse
from lte_compile.rewriting.layouts import set_layout
from lte_compile.routing.router import routers, set_stage
from lte_compile.serving.onnx_file import export_onnx
from lte_compile.transform import transform
from tests import zoo
from tests.passes.test_exported import MODEL_TOLERANCE, count, distance, export, main_output
from tests.passes.test_exported import run as run_program
from tests.routed import stack, tokens

TWO_LAYER = TransformConfig(expert_size=24, router=RouterKind.TWO_LAYER, router_rank=7)


@cache
def _model(family: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = zoo.build(family, dtype)
    return transform(model, TWO_LAYER), inputs


def hard(family: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, dict[str, Any]]:
    """In the hard stage, with features that decide and experts that matter."""
    model, inputs = _model(family, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.std() < 0.1:
                parameter.mul_(4)
    for number, router in enumerate(routers(model)):
        generator = torch.Generator().manual_seed(number)
        router.load_initial(torch.randn(router.weight.shape, generator=generator), torch.zeros(router.num_experts))
    return set_stage(model, "hard"), inputs


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "phi3", "vit", "albert"])
def test_lowered_programs_keep_their_function(family: str) -> None:
    """Conv1D that flattens tokens (gpt2), fused gate and up (phi3), two stacks (t5), shared layers (albert)."""
    model, inputs = hard(family)
    with torch.no_grad():
        expected = main_output(model(**inputs))
        dense = main_output(set_stage(model, "dense")(**inputs))
        set_stage(model, "hard")
    assert distance(dense, expected) > 1e-3
    program, reports = rewrite_exported(export(model, inputs), (FuseExperts(), LowerSparse()))
    assert not any(report.refusals for report in reports)
    assert count(program, "sparse_ffn") > 0
    assert count(program, "route") == 0
    assert distance(run_program(program, inputs), expected) <= MODEL_TOLERANCE


def test_the_graph_names_what_the_router_reads() -> None:
    model = set_stage(transform(stack(1), TWO_LAYER, tokens(3)), "hard")
    text = str(lte.graph(model, tokens(3)))
    assert "w_router=0.up.router.weight" in text
    assert "x_router=cat" in text
    assert "1 changed, 0 left alone" in text


@pytest.mark.parametrize("stage", ["dense", "soft", "hard"])
def test_compiled_models_equal_eager_ones(stage: str) -> None:
    torch._dynamo.reset()
    model, x = transform(stack(), TWO_LAYER, tokens(3)), tokens(2, 3)
    set_stage(model, stage)
    compiled = torch.compile(model, backend=lte_backend, options={"compiler": "aot_eager"}, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-10, atol=1e-10)
    if stage == "soft":
        gradients = []
        for each in (compiled, model):
            model.zero_grad()
            each(x).square().sum().backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_the_kernels_of_a_gpu_serve_it() -> None:
    model, _ = hard("llama")
    set_layout(model, "neuron_major")
    found = lte.explain(model, device="cuda", dtype=torch.bfloat16, tokens=(1, 8))
    assert {each.kernel for each in found if each.tokens == 1} == {"triton-decode"}
    assert all(each.kernel.startswith(("triton-", "masked-dense")) for each in found)


def feed(inputs: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Mixed precision apart, what the file takes of a model's inputs."""
    return {name: np.asarray(inputs[name]) for name in names}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "phi3"])
def test_onnx_files_run_in_plain_onnx_runtime(family: str, tmp_path: Path) -> None:
    model, inputs = hard(family, torch.float32)
    report = export_onnx(model, tmp_path / "m.onnx")
    assert len(report.sparse) == len(list(routers(model)))
    assert not report.masked_dense
    with torch.no_grad():
        expected = main_output(model(**inputs))
    got = run(report.path, feed(inputs, report.inputs))[report.outputs[0]]
    # float32 sums in another order; relative to the largest logit, where another choice of expert shows at 1e-1
    assert distance(torch.from_numpy(got), expected) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_library_skips_experts_of_such_files(dtype: torch.dtype, tmp_path: Path, ort_library: str) -> None:
    model, inputs = hard("llama", torch.float32)
    report = export_onnx(model, tmp_path / "m.onnx", dtype=dtype)
    given = feed(inputs, report.inputs)
    outputs = []
    for library in (None, Path(ort_library)):
        session = open_session(report.path, device="cpu", custom_ops=library)
        outputs.append(np.asarray(session.run(None, given)[0], np.float32))
    tolerance = 1e-4 if dtype is torch.float32 else 2e-2  # 11 bits, and tokens whose score is at the threshold
    assert distance(torch.from_numpy(outputs[1]), torch.from_numpy(outputs[0])) < tolerance


@pytest.mark.parametrize("stage", ["dense", "soft"])
def test_other_stages_export_as_masked_dense(stage: str, tmp_path: Path) -> None:
    model: nn.Module = stack(1, dtype=torch.float32)
    set_stage(transform(model, TWO_LAYER, tokens(3, dtype=torch.float32)), stage)
    report = export_onnx(model, tmp_path / "m.onnx", example_inputs=tokens(3, dtype=torch.float32))
    assert not report.sparse
    x: Tensor = tokens(5, dtype=torch.float32, seed=4)
    with torch.no_grad():
        expected = model(x)
    got = run(report.path, {report.inputs[0]: x})[report.outputs[0]]
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-4, atol=1e-5)
