"""Kernels generated from region programs, on a GPU: against float64, through torch.compile, and in a CUDA graph."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lte_compile
from lte_compile.config import TransformConfig
from lte_compile.kernels.lowering import choose, describe
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall, sparse_ffn_reference
from tests.kernels.problems import (
    PROGRAMS,
    TOLERANCE,
    Shape,
    in_float64,
    interleaved,
    make_call,
    make_program_call,
    relative_error,
    run_op,
)
from tests.kernels.test_gpu import on_gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [Shape((1,), 576, 1536, 32), Shape((1, 1), 37, 61, 12)]
CONTINUOUS = [
    name for name in PROGRAMS if name != "every other operation"
]  # that one jumps: rounding moves values across


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def with_constants(call: SparseFfnCall) -> SparseFfnCall:
    return on_gpu(call)._replace(constants=tuple(constant.cuda() for constant in call.constants))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CONTINUOUS)
def test_generated_kernels_match_float64(name: str, shape: Shape, dtype: torch.dtype) -> None:
    call = with_constants(make_program_call(shape, PROGRAMS[name], dtype=dtype))
    assert choose(describe(call)).lowering.name == "triton-decode"
    assert relative_error(run_op(call), sparse_ffn_reference(in_float64(call))) < TOLERANCE[dtype]


def test_every_operation_of_the_table_matches_float64() -> None:
    call = with_constants(make_program_call(SHAPES[0], PROGRAMS["every other operation"], dtype=torch.float32))
    assert relative_error(run_op(call), sparse_ffn_reference(in_float64(call))) < 1e-4  # a few values at jumps


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interleaved_halves_match_float64(shape: Shape) -> None:
    call = interleaved(on_gpu(make_call(shape, dtype=torch.float32)))
    assert choose(describe(call)).lowering.name == "triton-decode"
    assert relative_error(run_op(call), sparse_ffn_reference(in_float64(call))) < TOLERANCE[torch.float32]


def test_one_cuda_graph_serves_changing_constants() -> None:
    call = with_constants(make_program_call(SHAPES[0], PROGRAMS["scale and shift of each neuron"], dtype=torch.float32))
    run_op(call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run_op(call)
    for _ in range(3):
        for constant in call.constants:
            constant.normal_()
        call.x_D.normal_()
        graph.replay()
        torch.cuda.synchronize()
        assert relative_error(output, sparse_ffn_reference(in_float64(call))) < TOLERANCE[torch.float32]


class GptOssLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(256, 2048), nn.Linear(1024, 256)

    def forward(self, x: Tensor) -> Tensor:
        both = self.both(x)
        gate, up = both[..., ::2].clamp(max=0.7), both[..., 1::2].clamp(-0.7, 0.7)
        result: Tensor = self.down((up + 1) * (gate * torch.sigmoid(gate * 1.702)))
        return x + result


class LearnableSwish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(256, 1024), nn.Linear(1024, 256)
        self.slope, self.scale = nn.Parameter(torch.ones(1)), nn.Parameter(torch.rand(1024))

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        result: Tensor = self.down(F.dropout(h * torch.sigmoid(self.slope * h) * self.scale, 0.1, self.training))
        return x + result


@pytest.mark.parametrize("layer", [GptOssLayer, LearnableSwish])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_models_generate_their_kernels(layer: type[nn.Module], dtype: torch.dtype) -> None:
    x = torch.randn(1, 1, 256)
    model = lte_compile.transform(layer().eval(), TransformConfig(expert_size=32), (x,))
    lte_compile.set_stage(model, "hard")
    with torch.no_grad():
        expected = model.double()(x.double())
    model = model.to("cuda", dtype)
    compiled = torch.compile(model, backend="lte", fullgraph=True)
    with torch.no_grad():
        actual = compiled(x.to("cuda", dtype))
        eager = model(x.to("cuda", dtype))
    assert relative_error(actual.cpu(), eager.cpu()) < TOLERANCE[dtype]
    if dtype == torch.float32:
        assert relative_error(actual.cpu(), expected) < 1e-5
