"""Training on a GPU: gradients against float64, equality from run to run, one CUDA graph for every mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lte_compile.kernels import ffn_products
from lte_compile.kernels.activations import ACTIVATIONS
from lte_compile.kernels.expert_ffn import expert_ffn_reference
from lte_compile.kernels.ffn_products import ListedProducts, choose_products
from lte_compile.kernels.gated_hidden import GatedRegion, why_not_triton
from lte_compile.kernels.program import parse_program
from tests.kernels.problems import PROGRAMS, TOLERANCE, Shape, make_constants, relative_error, widen
from tests.kernels.training_problems import TrainingProblem, make_problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALF = DTYPES[1:]
SHAPES = [
    Shape((3, 400), 576, 1536, 32),
    Shape((65,), 37, 61, 12),
    Shape((1100,), 8, 11, 1),
    Shape((1025,), 768, 3072, 24),
    Shape((1030,), 48, 2048, 1024),
]
SMOL = SHAPES[0]


@pytest.fixture(autouse=True)
def _small_layers_may_use_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffn_products, "MIN_LISTED_WORK", 0)


def problem(shape: Shape, **given: Any) -> TrainingProblem:
    torch.manual_seed(0)
    return make_problem(shape, device="cuda", **given)


def runs_over_lists(given: TrainingProblem) -> bool:
    x_TD, gates_TE = (t.reshape(-1, t.shape[-1]) for t in (given.x, given.gates))
    region = GatedRegion(given.activation, (), given.expert_size, None)
    return isinstance(choose_products(x_TD, gates_TE, given.weights, region, given.density), ListedProducts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_match_float64(shape: Shape, gated: bool, dtype: torch.dtype) -> None:
    given = problem(shape, gated=gated, dtype=dtype)
    assert why_not_triton(given.x, given.gates, GatedRegion("silu", (), shape.expert_size, None)) is None
    assert given.error() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.tokens != (65,)], ids=str)
def test_products_over_lists_match_float64(shape: Shape, gated: bool, dtype: torch.dtype) -> None:
    given = problem(shape, gated=gated, dtype=dtype, density=0.1)
    assert runs_over_lists(given)
    assert given.error() < TOLERANCE[dtype]


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_a_wrong_density_changes_no_result(density: float) -> None:
    given = problem(SMOL, dtype=torch.bfloat16, density=0.1)
    given.gates.fill_(density)
    assert runs_over_lists(given)
    assert given.error() < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, gated: bool) -> None:
    given = problem(Shape((65,), 37, 61, 12), activation=activation, gated=gated)
    assert given.error() < TOLERANCE[torch.float32]


@pytest.mark.parametrize("density", [None, 0.1])
@pytest.mark.parametrize("name", PROGRAMS)
def test_region_programs(name: str, density: float | None) -> None:
    dtype = torch.float32 if density is None else torch.float16
    constants = make_constants(PROGRAMS[name], 61, torch.float32)
    given = {"gated": parse_program(PROGRAMS[name]).gated, "constants": constants, "dtype": dtype, "density": density}
    made = problem(Shape((1100,), 37, 61, 12), activation=PROGRAMS[name], **given)
    # Gradients jump at a clamp's bound, and rounding takes some values across it.
    assert made.error() < (TOLERANCE[dtype] if density is None else 10 * TOLERANCE[dtype])


def test_gradients_of_a_programs_constants() -> None:
    text = PROGRAMS["scale and shift of each neuron"]
    constants = make_constants(text, 61, torch.float32)
    made = problem(Shape((70,), 37, 61, 12), activation=text, constants=constants)
    leaves = [constant.requires_grad_() for constant in made.constants]
    rest = (made.activation, made.expert_size, None)
    found = torch.autograd.grad(
        torch.ops.lte.expert_ffn(made.x, made.gates, *made.weights, *rest, list(leaves)), leaves, made.grad
    )
    wide = [constant.detach().double().requires_grad_() for constant in leaves]
    exact = expert_ffn_reference(made.x.double(), made.gates.double(), widen(made.weights), *rest, wide)
    for actual, expected in zip(found, torch.autograd.grad(exact, wide, made.grad.double()), strict=True):
        assert relative_error(actual, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_routers_match_float64(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x_TD, weight_ED, bias_E = (torch.randn(n, device="cuda").to(dtype) for n in ((600, 576), (48, 576), (48,)))
    leaves = [t.requires_grad_() for t in (x_TD, weight_ED / 24, bias_E)]
    leaves[1] = leaves[1].detach().requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in leaves]
    grad_TE = torch.randn(600, 48, device="cuda") * 1e-9  # as of a loss that is a mean: nothing in fp16
    scores = [torch.ops.lte.route(*given) for given in (leaves, exact)]
    assert relative_error(*scores) < 2 * TOLERANCE[torch.float32]  # tensor cores add with a bit or two less
    scale = 2.0**20  # the gradients themselves have to be fp16 numbers
    found = torch.autograd.grad(scores[0], leaves, grad_TE * scale)
    wanted = torch.autograd.grad(scores[1], exact, grad_TE.double() * scale)
    for actual, expected in zip(found, wanted, strict=True):
        assert relative_error(actual, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_anchors_match_float64(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, gates, grad = torch.randn(5, 7, 61), torch.rand(5, 7, 6), torch.randn(5, 7, 61)
    leaves = [hidden.to("cuda", dtype).requires_grad_(), gates.cuda().requires_grad_()]
    exact = [t.detach().double().cpu().requires_grad_() for t in leaves]
    results = [torch.ops.lte.gate_hidden(*given, 12) for given in (leaves, exact)]
    grad = grad.to(dtype)
    found = torch.autograd.grad(results[0], leaves, grad.cuda())
    wanted = torch.autograd.grad(results[1], exact, grad.double())
    for actual, expected in zip((results[0], *found), (results[1], *wanted), strict=True):
        assert relative_error(actual.cpu(), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [(4096, 344), (3, 5), (0, 4)])
def test_separability_matches_float64(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    scores_TE = torch.rand(shape, device="cuda", requires_grad=True)
    wide_TE = scores_TE.detach().double().requires_grad_()
    losses = [torch.ops.lte.separability(scores, 0.5, 0.01) for scores in (scores_TE, wide_TE)]
    assert relative_error(*losses) < TOLERANCE[torch.float32]
    found, wanted = (torch.autograd.grad(loss, s)[0] for loss, s in zip(losses, (scores_TE, wide_TE), strict=True))
    assert relative_error(found, wanted) < TOLERANCE[torch.float32]
    assert torch.equal(torch.ops.lte.separability(scores_TE, 0.5, 0.01), losses[0])


@pytest.mark.parametrize("density", [None, 0.1])
def test_a_hundred_runs_are_bit_equal(density: float | None) -> None:
    given = problem(SMOL, dtype=torch.bfloat16, density=density)
    first = given.by_op()
    assert all(all(map(torch.equal, given.by_op(), first)) for _ in range(100))


@pytest.mark.parametrize("density", [None, 0.1])
def test_scratch_memory_may_hold_anything(density: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        memory = plain_empty(*args, **kwargs)
        return memory.fill_(float("nan") if memory.is_floating_point() else 12345)

    given = problem(SMOL, dtype=torch.bfloat16, density=density)
    expected = given.by_op()
    monkeypatch.setattr(torch, "empty", poisoned)
    assert all(map(torch.equal, given.by_op(), expected))


def test_one_cuda_graph_serves_every_mask() -> None:
    given = problem(SMOL, dtype=torch.bfloat16, density=0.1)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        given.by_op()  # compiles the kernels: not allowed during capture
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = given.by_op()
    for density in (0.0, 0.05, 0.3, 1.0, 0.1):
        given.gates.copy_(torch.rand_like(given.gates) < density)
        graph.replay()
        torch.cuda.synchronize()
        assert max(map(relative_error, results, given.exact())) < TOLERANCE[torch.bfloat16]
