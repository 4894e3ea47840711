"""What lte::expert_ffn keeps for its backward pass, and which gradients it computes; on any device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lte_compile.kernels.ops  # noqa: F401
from lte_compile.kernels.ffn_products import why_not_listed
from lte_compile.kernels.gated_hidden import GatedRegion
from lte_compile.kernels.layout import neuron_major
from tests.kernels.problems import Shape
from tests.kernels.training_problems import TrainingProblem, make_problem

SHAPE = Shape((2, 30), 16, 64, 8)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def saved_bytes(run: Callable[[], Tensor], given: TrainingProblem) -> int:
    """What autograd keeps of a call, weights left out."""
    weights = {w.untyped_storage().data_ptr() for w in given.weights if w is not None}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
        assert result.requires_grad
    return sum(size for place, size in kept.items() if place not in weights)


def test_less_is_saved_than_by_eager_code() -> None:
    given = make_problem(SHAPE)
    for leaf in given.leaves:
        leaf.requires_grad_()
    up, gate, down, up_bias, gate_bias, down_bias = given.weights
    assert gate is not None
    x, gates = given.x, given.gates

    def dense() -> Tensor:
        return F.linear(F.silu(F.linear(x, gate, gate_bias)) * F.linear(x, up, up_bias), down, down_bias)

    def gated() -> Tensor:
        hidden = F.silu(F.linear(x, gate, gate_bias)) * F.linear(x, up, up_bias)
        return F.linear(torch.ops.lte.gate_hidden(hidden, gates, SHAPE.expert_size), down, down_bias)

    def fused() -> Tensor:
        result: Tensor = torch.ops.lte.expert_ffn(x, gates, *given.weights, "silu", SHAPE.expert_size)
        return result

    projections = 2 * x.shape[0] * x.shape[1] * SHAPE.neurons * x.element_size()
    assert saved_bytes(fused, given) == x.nbytes + gates.nbytes + projections
    assert saved_bytes(fused, given) < 0.7 * saved_bytes(dense, given)
    assert saved_bytes(fused, given) < 0.6 * saved_bytes(gated, given)


def test_no_projection_is_saved_where_no_gradient_is_wanted() -> None:
    given = make_problem(SHAPE)
    assert not torch.ops.lte.expert_ffn(given.x, given.gates, *given.weights, "silu", 8).requires_grad


@pytest.mark.parametrize("wanted", [*combinations(range(8), 1), *combinations(range(8), 2)], ids=str)
def test_any_choice_of_gradients_is_what_it_is_among_all(wanted: tuple[int, ...]) -> None:
    given = make_problem(SHAPE, dtype=torch.float64)
    given = replace(given, gates=given.gates.double())
    _, *expected = given.exact()
    leaves = [leaf.detach().clone().requires_grad_(i in wanted) for i, leaf in enumerate(given.leaves)]
    result = torch.ops.lte.expert_ffn(*leaves, "silu", SHAPE.expert_size)
    found = torch.autograd.grad(result, [leaves[i] for i in wanted], given.grad)
    for i, gradient in zip(wanted, found, strict=True):
        torch.testing.assert_close(gradient, expected[i], rtol=1e-12, atol=1e-12)


def test_the_gradient_of_a_neuron_major_weight_is_stored_like_it() -> None:
    given = make_problem(SHAPE)
    for down in (given.weights.down_DF.detach().contiguous(), neuron_major(given.weights.down_DF.detach())):
        weights = [*given.weights]
        weights[2] = down.requires_grad_()
        torch.ops.lte.expert_ffn(given.x, given.gates, *weights, "silu", SHAPE.expert_size).sum().backward()
        assert down.grad is not None
        assert down.grad.stride() == down.stride()


def test_projections_that_were_not_saved_are_computed_anew() -> None:
    given = make_problem(SHAPE, dtype=torch.float64)
    up, gate, _, up_bias, gate_bias, _ = given.weights
    assert gate is not None
    projections = [F.linear(given.x, w, b).flatten(0, -2) for w, b in ((up, up_bias), (gate, gate_bias))]
    rest: tuple[Any, ...] = (
        given.grad,
        given.x,
        given.gates,
        *given.weights,
        "silu",
        SHAPE.expert_size,
        None,
        [],
        [True] * 8,
    )
    backward = torch.ops.lte.expert_ffn_backward
    for anew, saved in zip(backward(*rest), backward(*rest, *projections), strict=True):
        torch.testing.assert_close(anew, saved, rtol=1e-12, atol=1e-12)


def test_a_density_changes_no_result_on_a_cpu() -> None:
    sparse, same = (make_problem(SHAPE, dtype=torch.float64, density=0.1) for _ in range(2))
    assert max(map(float, [(a - b).abs().max() for a, b in zip(sparse.by_op(), sparse.exact(), strict=True)])) < 1e-10
    with pytest.raises(ValueError, match=r"density .* in \[0, 1\]; got 1.5"):
        torch.ops.lte.expert_ffn(same.x, same.gates, *same.weights, "silu", SHAPE.expert_size, density=1.5)


@pytest.mark.parametrize(
    "change, density, reason",
    [
        ({}, None, "no density is expected"),
        ({}, 0.9, "90% of the experts are expected to be active"),
        ({"dtype": torch.float32}, 0.1, "serves float16 and bfloat16"),
        ({"shape": Shape((3,), 16, 64, 8)}, 0.1, "3 tokens and 64 x 16 weights are too small"),
        ({"shape": Shape((1024,), 2048, 8192, 64)}, 0.1, "needs a CUDA device"),
    ],
)
def test_dense_products_have_a_reason(change: dict[str, object], density: float | None, reason: str) -> None:
    settings: dict[str, Any] = {"shape": Shape((2000,), 16, 64, 8), "dtype": torch.bfloat16, **change}
    given = make_problem(**settings)
    found = why_not_listed(given.x, given.gates, given.weights, GatedRegion("silu", (), 8, None), density)
    assert found is not None
    assert reason in found


def test_separability() -> None:
    scores = torch.rand(3, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(
        torch.ops.lte.separability(scores, 0.4, 0.01), (1 / ((scores - 0.4) ** 2 + 0.01)).sum(), rtol=1e-12, atol=0.0
    )
    assert torch.autograd.gradcheck(partial(torch.ops.lte.separability, tau=0.4, eps=0.01), (scores,))
    results = torch.library.opcheck(torch.ops.lte.separability.default, (scores, 0.4, 0.01))
    assert set(results.values()) == {"SUCCESS"}
