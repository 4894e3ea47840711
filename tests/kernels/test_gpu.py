"""The Triton kernels on a GPU: errors, run-to-run equality, and one CUDA graph for every mask and input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lte_compile.kernels.ops  # noqa: F401
from lte_compile.kernels.activations import ACTIVATIONS
from lte_compile.kernels.ffn import FfnWeights
from lte_compile.kernels.lowering import MAX_BATCH_TOKENS, choose, describe
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall, active_experts, sparse_ffn_reference
from lte_compile.kernels.triton_batch import sparse_ffn_batch
from tests.kernels.problems import (
    TOLERANCE,
    Shape,
    away_from_threshold,
    in_float64,
    make_call,
    relative_error,
    run_op,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [
    Shape((1,), 576, 1536, 32),
    Shape((1, 1), 4096, 11008, 32),
    Shape((1,), 37, 61, 12),
    Shape((1,), 8, 11, 1),
    Shape((1,), 768, 3072, 24),
    Shape((1,), 16, 24, 24),
    Shape((1,), 4096, 4100, 32),  # just large enough for three launches; a last expert of 4
]
BATCHES = [
    Shape((2,), 4096, 4100, 32),
    Shape((5,), 576, 1536, 32),
    Shape((16,), 4096, 11008, 32),
    Shape((64,), 768, 3072, 24),
    Shape((2, 3), 37, 61, 12),
    Shape((17,), 8, 11, 1),
    Shape((4,), 16, 1024, 1024),
]


# What every property is checked on: a shape, and the density that the call is told.
SERVED = [(SHAPES[0], None), (SHAPES[-1], None), (SHAPES[-1], 1.0), (BATCHES[0], None), (BATCHES[1], None)]


def on_gpu(call: SparseFfnCall) -> SparseFfnCall:
    def move(tensor: Tensor | None) -> Any:  # `.cuda()` keeps a transposed layout
        return None if tensor is None else tensor.cuda()

    weights = FfnWeights._make(move(t) for t in call.weights)
    router, bias = move(call.router_ED), move(call.router_bias_E)
    return call._replace(x_D=move(call.x_D), router_ED=router, router_bias_E=bias, weights=weights)


def serve(call: SparseFfnCall) -> Tensor:
    """By the op; a few tokens by their kernel, as the table takes it for large layers only."""
    return sparse_ffn_batch(call) if 2 <= call.x_D.shape[:-1].numel() <= MAX_BATCH_TOKENS else run_op(call)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape: Shape, gated: bool, dtype: torch.dtype) -> None:
    call = on_gpu(away_from_threshold(make_call(shape, gated=gated, dtype=dtype)))
    assert choose(describe(call)).lowering.name == "triton-decode"
    assert relative_error(serve(call), sparse_ffn_reference(in_float64(call))) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", BATCHES, ids=str)
def test_a_few_tokens_match_float64(shape: Shape, gated: bool, dtype: torch.dtype) -> None:
    call = on_gpu(away_from_threshold(make_call(shape, gated=gated, dtype=dtype)))
    assert relative_error(sparse_ffn_batch(call), sparse_ffn_reference(in_float64(call))) < TOLERANCE[dtype]


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, tokens: int) -> None:
    call = on_gpu(make_call(Shape((tokens,), 37, 61, 12), dtype=torch.float32, activation=activation))
    assert relative_error(serve(call), sparse_ffn_reference(in_float64(call))) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.width == 4096], ids=str)
def test_reading_every_expert_matches_float64(shape: Shape, gated: bool, dtype: torch.dtype) -> None:
    call = on_gpu(make_call(shape, gated=gated, dtype=dtype))._replace(density=1.0)
    assert choose(describe(call)).lowering.name == "triton-whole"
    assert relative_error(serve(call), sparse_ffn_reference(in_float64(call))) < TOLERANCE[dtype]


@pytest.mark.parametrize(("shape", "density"), SERVED, ids=str)
@pytest.mark.parametrize("tau", [-1.0, 1.0], ids=["all active", "none active"])
def test_extremes(tau: float, shape: Shape, density: float | None) -> None:
    call = on_gpu(make_call(shape, dtype=torch.float32, tau=tau))._replace(density=density)
    assert relative_error(serve(call), sparse_ffn_reference(in_float64(call))) < TOLERANCE[torch.float32]


def test_experts_that_no_kernel_serves_use_the_reference() -> None:
    call = on_gpu(make_call(Shape((65,), 37, 61, 12, offsets=(0, 20, 61)), dtype=torch.float32))
    call = call._replace(offsets_E1=torch.tensor([0, 20, 61], device="cuda"))
    assert choose(describe(call)).lowering.name == "reference"
    assert relative_error(serve(call), sparse_ffn_reference(in_float64(call))) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(("shape", "density"), SERVED, ids=str)
def test_a_hundred_runs_are_bit_equal(shape: Shape, density: float | None) -> None:
    call = on_gpu(make_call(shape, dtype=torch.bfloat16))._replace(density=density)
    first = serve(call)
    assert all(torch.equal(serve(call), first) for _ in range(100))


@pytest.mark.parametrize(("shape", "density"), SERVED, ids=str)
def test_one_cuda_graph_serves_every_mask_and_input(shape: Shape, density: float | None) -> None:
    call = on_gpu(make_call(shape, dtype=torch.float32))._replace(density=density)
    assert call.router_bias_E is not None
    serve(call)  # compiles the kernels: not allowed during capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = serve(call)
    active = set()
    for shift in (-900.0, -20.0, -5.0, 0.0, 5.0, 900.0, -20.0):  # logits of 4096 columns vary by 64
        call.x_D.normal_()
        call.router_bias_E.normal_().add_(shift)
        graph.replay()
        torch.cuda.synchronize()
        active.add(int(active_experts(call).sum()) // call.x_D.shape[0])
        assert relative_error(output, sparse_ffn_reference(in_float64(call))) < TOLERANCE[torch.float32]
    assert {0, shape.experts} < active  # none, all and something between were met


@pytest.mark.parametrize(("shape", "density"), SERVED, ids=str)
def test_scratch_memory_may_hold_anything(shape: Shape, density: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        memory = plain_empty(*args, **kwargs)
        return memory.fill_(float("nan") if memory.is_floating_point() else 12345)

    call = on_gpu(make_call(shape, dtype=torch.float32))._replace(density=density)
    expected = serve(call)
    monkeypatch.setattr(torch, "empty", poisoned)
    assert torch.equal(serve(call), expected)


def test_autocast_decides_on_the_unrounded_input() -> None:
    call = on_gpu(make_call(SHAPES[0], dtype=torch.float32))
    expected = serve(call)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        result = serve(call)
    assert result.dtype == torch.bfloat16
    assert relative_error(result, expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [True, False])
def test_two_tokens_that_select_little_match_float64(gated: bool, dtype: torch.dtype) -> None:
    call = on_gpu(make_call(BATCHES[0], gated=gated, dtype=dtype))._replace(density=0.01)
    assert relative_error(serve(call), sparse_ffn_reference(in_float64(call))) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("shape", "density"), [(shape, 0.01 if density is None else density) for shape, density in SERVED], ids=str
)
def test_what_no_token_selects_adds_nothing_whatever_it_is(shape: Shape, density: float) -> None:
    call = on_gpu(make_call(shape, dtype=torch.bfloat16))._replace(density=density)
    assert call.router_bias_E is not None
    call.router_bias_E.sub_(30)
    expected = serve(call)
    active_F = active_experts(call).reshape(-1, shape.experts).any(0).repeat_interleave(shape.expert_size)
    assert 0 < int(active_F.sum()) < shape.neurons
    for weight in (call.weights.up_FD, call.weights.gate_FD, call.weights.down_DF.t()):
        assert weight is not None
        weight[~active_F[: shape.neurons]] = float("nan")
    assert torch.equal(serve(call), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("shape", "density"), SERVED[:3], ids=str)
def test_what_is_not_finite_propagates_as_in_the_reference(shape: Shape, density: float | None, value: float) -> None:
    call = on_gpu(make_call(shape, dtype=torch.float32, tau=-1.0))._replace(density=density)
    call.weights.up_FD[7, 5] = value
    assert torch.equal(run_op(call).isnan(), sparse_ffn_reference(call).isnan())
    call.x_D[..., 3] = value  # every score is NaN or infinite
    call = call._replace(tau=0.5)
    assert torch.equal(run_op(call).isnan(), sparse_ffn_reference(call).isnan())
