"""The lowerings for many tokens on a GPU: errors, bit-equal runs, CUDA graphs, non-finite values, 64-bit places."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from lte_compile.kernels.ffn import FfnWeights
from lte_compile.kernels.fused_up import sparse_ffn_fused_up
from lte_compile.kernels.lowering import choose, describe
from lte_compile.kernels.masked_dense import LARGE_LAYER, sparse_ffn_masked_dense
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall, active_experts, sparse_ffn_reference
from lte_compile.kernels.triton_prefill import sparse_ffn_prefill
from tests.kernels.interpreted import Kernel
from tests.kernels.problems import (
    PROGRAMS,
    TOLERANCE,
    Shape,
    away_from_threshold,
    in_float64,
    interleaved,
    make_call,
    make_program_call,
    relative_error,
    run_op,
)
from tests.kernels.test_gpu import DTYPES, on_gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

# As large layers with many tokens take it (default_config), in chunks that these shapes exceed.
CHUNKED = replace(LARGE_LAYER[2048], chunk=128, finishes=True)
KERNELS: dict[str, Kernel] = {
    "sorted": sparse_ffn_prefill,
    "masked dense": sparse_ffn_masked_dense,
    "chunked dense": partial(sparse_ffn_masked_dense, config=CHUNKED),
    "fused": sparse_ffn_fused_up,
}
SHAPES = [
    Shape((65,), 576, 1536, 32),
    Shape((4, 32), 4096, 11008, 32),
    Shape((127,), 37, 61, 12),
    Shape((300,), 768, 3072, 24),
    Shape((257,), 8, 11, 1),
    Shape((100,), 64, 2048, 1024),
    Shape((500,), 128, 2048, 1),
    Shape((2048,), 512, 1024, 32),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return KERNELS[request.param]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_many_tokens_match_float64(kernel: Kernel, shape: Shape, gated: bool, dtype: torch.dtype) -> None:
    call = on_gpu(away_from_threshold(make_call(shape, gated=gated, dtype=dtype)))
    assert relative_error(kernel(call), sparse_ffn_reference(in_float64(call))) < TOLERANCE[dtype]


@pytest.mark.parametrize("density", [0.05, 0.2, 0.4, 1.0])
def test_every_tile_matches_float64(density: float) -> None:
    call = on_gpu(make_call(SHAPES[3], dtype=torch.bfloat16))._replace(density=density)  # any density is right
    assert relative_error(sparse_ffn_prefill(call), sparse_ffn_reference(in_float64(call))) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("tau", [-1.0, 1.0], ids=["all active", "none active"])
def test_extremes(kernel: Kernel, tau: float) -> None:
    call = on_gpu(make_call(SHAPES[0], dtype=torch.float32, tau=tau))
    assert relative_error(kernel(call), sparse_ffn_reference(in_float64(call))) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name != "every other operation"])
def test_region_programs(kernel: Kernel, name: str) -> None:
    call = on_gpu(make_program_call(SHAPES[0], PROGRAMS[name], dtype=torch.float32))
    call = call._replace(constants=tuple(constant.cuda() for constant in call.constants))
    assert relative_error(kernel(call), sparse_ffn_reference(in_float64(call))) < TOLERANCE[torch.float32]


def test_interleaved_halves(kernel: Kernel) -> None:
    call = interleaved(on_gpu(make_call(SHAPES[0], dtype=torch.float32)))
    assert relative_error(kernel(call), sparse_ffn_reference(in_float64(call))) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_token_that_is_not_finite(kernel: Kernel, value: float) -> None:
    call = on_gpu(make_call(SHAPES[0], dtype=torch.float32))
    call.x_D[3, 5] = value
    actual, expected = kernel(call), sparse_ffn_reference(in_float64(call)).float()
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_unselected_experts_are_zero_whatever_their_weights(kernel: Kernel) -> None:
    call = on_gpu(make_call(SHAPES[0], dtype=torch.float32, biases=False))
    router = call.router_ED.clone()
    router[7] = 0.0  # a score of exactly tau selects nothing
    clean = call._replace(router_ED=router)
    expected = sparse_ffn_reference(in_float64(clean))
    clean.weights.up_FD[7 * 32 : 8 * 32] = float("nan")
    assert relative_error(kernel(clean), expected) < TOLERANCE[torch.float32]


def test_a_hundred_runs_are_bit_equal(kernel: Kernel) -> None:
    call = on_gpu(make_call(SHAPES[1], dtype=torch.bfloat16))
    first = kernel(call)
    assert all(torch.equal(kernel(call), first) for _ in range(100))


def test_one_cuda_graph_serves_every_mask_and_input(kernel: Kernel) -> None:
    call = on_gpu(make_call(SHAPES[0], dtype=torch.float32))
    assert call.router_bias_E is not None
    kernel(call)  # compiles: not allowed during capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = kernel(call)
    met = set()
    for shift in (-300.0, -20.0, 0.0, 20.0, 300.0, -20.0):
        call.x_D.normal_()
        call.router_bias_E.normal_().add_(shift)
        graph.replay()
        torch.cuda.synchronize()
        met.add(round(float(active_experts(call).float().mean()), 2))
        assert relative_error(output, sparse_ffn_reference(in_float64(call))) < TOLERANCE[torch.float32]
    assert {0.0, 1.0} < met


def test_scratch_memory_may_hold_anything(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        memory = plain_empty(*args, **kwargs)
        return memory.fill_(float("nan") if memory.is_floating_point() else 77)

    call = on_gpu(make_call(SHAPES[0], dtype=torch.float32))
    expected = kernel(call)
    monkeypatch.setattr(torch, "empty", poisoned)
    assert torch.equal(kernel(call), expected)


def test_hidden_values_beyond_32_bit_places(kernel: Kernel) -> None:
    tokens = 196_000  # times 11008 neurons: more than 2^31 hidden values
    call = on_gpu(make_call(Shape((8,), 16, 11008, 32), dtype=torch.float16))
    large = call._replace(x_D=torch.randn(tokens, 16, device="cuda", dtype=torch.float16))
    last = call._replace(x_D=large.x_D[-64:])
    expected = sparse_ffn_reference(in_float64(last))
    assert relative_error(kernel(large)[-64:], expected) < TOLERANCE[torch.float16]


@pytest.mark.parametrize(("density", "name"), [(None, "masked-dense"), (0.05, "triton-prefill"), (0.9, "masked-dense")])
def test_the_table_serves_many_tokens_without_the_reference(density: float | None, name: str) -> None:
    call = on_gpu(make_call(Shape((2048,), 2048, 4096, 32), dtype=torch.bfloat16))._replace(density=density)
    assert choose(describe(call)).lowering.name == name
    assert relative_error(run_op(call), sparse_ffn_reference(in_float64(call))) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("kernel", [sparse_ffn_prefill, sparse_ffn_masked_dense])
def test_autocast_decides_on_the_unrounded_input(kernel: Kernel) -> None:
    call = on_gpu(make_call(SHAPES[0], dtype=torch.float32))
    rounded = _weights_in(call, torch.bfloat16)
    assert relative_error(kernel(rounded), kernel(call)) < TOLERANCE[torch.bfloat16]


def _weights_in(call: SparseFfnCall, dtype: torch.dtype) -> SparseFfnCall:
    weights = FfnWeights._make(None if t is None else t.to(dtype) for t in call.weights)
    return call._replace(weights=weights)
