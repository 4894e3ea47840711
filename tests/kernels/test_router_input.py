"""lte::sparse_ffn with a router that reads another tensor than the FFN: the op on CPUs, the GPU kernels interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lte_compile.kernels.ffn import FfnWeights
from lte_compile.kernels.layout import neuron_major
from lte_compile.kernels.lowering import choose, describe
from lte_compile.kernels.sparse_ffn_cpu import sparse_ffn_cpu
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall, sparse_ffn_reference
from tests.kernels.interpreted import run_interpreted
from tests.kernels.problems import (
    SHAPES,
    TOLERANCE,
    Shape,
    in_float64,
    make_call,
    relative_error,
    run_op,
    with_router_input,
)

ops = torch.ops.lte


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape: Shape, dtype: torch.dtype) -> None:
    call = with_router_input(make_call(shape, dtype=dtype))
    expected = sparse_ffn_reference(in_float64(call))
    assert relative_error(run_op(call), expected) < TOLERANCE[dtype]
    assert relative_error(sparse_ffn_cpu(call), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("tokens", [(1,), (2, 3), (40,)])
def test_is_route_select_and_expert_ffn(tokens: tuple[int, ...]) -> None:
    call = with_router_input(make_call(Shape(tokens, 13, 37, 8)))
    gates = ops.select(ops.route(call.router_x_C, call.router_ED, call.router_bias_E), "threshold", call.tau)
    composed = ops.expert_ffn(call.x_D, gates, *call.weights, call.activation, call.expert_size)
    assert relative_error(run_op(call), composed) < TOLERANCE[torch.float64]


def arguments(shape: Shape) -> tuple[tuple[Any, ...], dict[str, Tensor | None]]:
    call = with_router_input(make_call(shape))
    tensors = [
        None if t is None else t.requires_grad_()
        for t in (call.x_D, call.router_ED, call.router_bias_E, *call.weights, call.router_x_C)
    ]
    return (*tensors[:-1], "gelu", shape.expert_size, 0.5, shape.offset_tensor), {"x_router": tensors[-1]}


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[-1]], ids=str)
def test_opcheck(shape: Shape) -> None:
    results = torch.library.opcheck(ops.sparse_ffn.default, *arguments(shape))
    assert set(results.values()) == {"SUCCESS"}


def test_gradients_reach_the_ffn_and_not_the_router() -> None:
    given, named = arguments(Shape((2,), 3, 5, 2))
    x_router = named["x_router"]
    assert torch.autograd.gradcheck(lambda *leaves: ops.sparse_ffn(*leaves, x_router=x_router), given)
    ops.sparse_ffn(*given, **named).sum().backward()
    assert x_router is not None
    assert x_router.grad is None


def test_autocast_leaves_what_the_router_reads_as_it_is() -> None:
    call = with_router_input(make_call(Shape((40,), 13, 37, 8), dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        result = run_op(call)
    assert result.dtype is torch.bfloat16
    assert relative_error(result, sparse_ffn_reference(in_float64(call))) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize(
    "x_router, message",
    [
        (torch.randn(2, 19), r"x_router must have the tokens of x, \[2, 3\]; got shape \[2, 19\]"),
        (torch.randn(2, 3, 18), r"router weight must be \[experts, 18\]"),
    ],
)
def test_mistakes_are_explained(x_router: Tensor, message: str) -> None:
    call = with_router_input(make_call(Shape((2, 3), 13, 37, 8), dtype=torch.float32))
    with pytest.raises(ValueError, match=message):
        run_op(call._replace(router_x_C=x_router))


@pytest.mark.parametrize("tokens, kernel", [(1, "triton-decode"), (8, "triton-batch"), (512, "masked-dense")])
def test_the_same_kernels_serve_it(tokens: int, kernel: str) -> None:
    """But for the one that reads x once for router and projections."""
    call = with_router_input(make_call(Shape((1,), 4096, 11008, 32), dtype=torch.bfloat16), 5120)
    choice = choose(describe(call)._replace(device="cuda", tokens=tokens))
    assert choice.lowering.name == kernel
    small = with_router_input(make_call(Shape((1,), 576, 1536, 8), dtype=torch.bfloat16), 720)
    choice = choose(describe(small)._replace(device="cuda", tokens=512))
    assert "the router must read what the FFN reads" in choice.refusals["triton-fused"]


@pytest.fixture(scope="module")
def interpreted_errors() -> dict[str, float]:
    pytest.importorskip("triton")
    return run_interpreted("tests.kernels.interpreted_router_input")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", ["narrower", "wider"])
@pytest.mark.parametrize("kernel", ["decode", "decode list", "decode whole", "batch", "prefill", "masked dense"])
def test_interpreted_kernels_match_float64(
    interpreted_errors: dict[str, float], kernel: str, width: str, dtype: torch.dtype
) -> None:
    assert interpreted_errors[f"{kernel}, {width}, {dtype}"] < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("tokens", [1, 2, 8, 32, 200, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(576, 1536, 8, 720), (4096, 4100, 32, 5120), (96, 200, 12, 101)], ids=str)
def test_kernels_on_a_gpu_match_float64(sizes: tuple[int, int, int, int], dtype: torch.dtype, tokens: int) -> None:
    width, neurons, expert_size, columns = sizes
    call = with_router_input(make_call(Shape((tokens,), width, neurons, expert_size), dtype=dtype), columns)
    call = on_gpu(call._replace(router_ED=call.router_ED / columns**0.5))
    expected, clear = sparse_ffn_reference(in_float64(call)), decided_clearly(call)
    assert clear.float().mean() > 0.5
    for density in (None, 0.1, 1.0):
        one = call._replace(density=density)
        actual = choose(describe(one)).lowering.kernel(one)
        assert relative_error(actual[clear], expected[clear]) < TOLERANCE[dtype]


def decided_clearly(call: SparseFfnCall) -> Tensor:
    """Tokens with no score so near the threshold that rounding decides."""
    exact = in_float64(call)
    scores_TE: Tensor = ops.route(exact.router_input, exact.router_ED, exact.router_bias_E)
    gap_T: Tensor = (scores_TE - call.tau).abs().amin(-1)
    return gap_T > 1e-4


def on_gpu(call: SparseFfnCall) -> SparseFfnCall:
    assert call.router_bias_E is not None
    assert call.router_x_C is not None
    weights = FfnWeights._make(None if t is None else t.cuda() for t in call.weights)
    return call._replace(
        x_D=call.x_D.cuda(),
        router_ED=call.router_ED.cuda(),
        router_bias_E=call.router_bias_E.cuda(),
        weights=weights._replace(down_DF=neuron_major(weights.down_DF)),
        router_x_C=call.router_x_C.cuda(),
    )
