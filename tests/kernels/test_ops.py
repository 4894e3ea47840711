"""What every op promises: schema, fakes, gradients, dtypes, awkward shapes, autocast, export and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lte_compile.kernels.ops  # noqa: F401
from lte_compile.kernels.activations import ACTIVATIONS
from lte_compile.kernels.expert_ffn import expert_ffn_reference
from lte_compile.kernels.selection import SELECTION_RULES, Gradient, selection_rule
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall, active_experts, sparse_ffn_reference
from tests.kernels.problems import (
    SHAPES,
    TOLERANCE,
    Shape,
    in_float64,
    make_call,
    make_weights,
    relative_error,
    run_op,
    widen,
    with_tokens,
)

ops = torch.ops.lte
PRIMES = SHAPES[1]
UNEQUAL = SHAPES[-1]
DTYPES = list(TOLERANCE)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def gates_for(shape: Shape, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(*shape.tokens, shape.experts, dtype=dtype)


def arguments(shape: Shape, *, gated: bool = True, biases: bool = True) -> dict[str, tuple[Any, ...]]:
    """Arguments of every op for one problem in float64, all of them leaves that want gradients."""
    call = make_call(shape, gated=gated, biases=biases)
    tensors = (call.x_D, call.router_ED, call.router_bias_E, *call.weights)
    x, router, bias, *weights = (None if t is None else t.requires_grad_() for t in tensors)
    gates = gates_for(shape).requires_grad_()
    hidden = torch.randn(*shape.tokens, shape.neurons, dtype=torch.float64, requires_grad=True)
    size, offsets = shape.expert_size, shape.offset_tensor
    return {
        "route": (x, router, bias),
        "select": (gates, "soft", 0.5),
        "gate_hidden": (hidden, gates, size, offsets),
        "expert_ffn": (x, gates, *weights, "silu", size, offsets),
        "sparse_ffn": (x, router, bias, *weights, "gelu", size, 0.5, offsets),
    }


OP_NAMES = ["route", "select", "gate_hidden", "expert_ffn", "sparse_ffn"]


@pytest.mark.parametrize("name", OP_NAMES)
@pytest.mark.parametrize("shape", [PRIMES, UNEQUAL], ids=str)
def test_opcheck(name: str, shape: Shape) -> None:
    results = torch.library.opcheck(getattr(ops, name).default, arguments(shape)[name])
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", ["route", "gate_hidden", "expert_ffn", "sparse_ffn"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", [Shape((2,), 3, 5, 2), Shape((1, 2), 3, 6, 4, offsets=(0, 1, 1, 6))], ids=str)
def test_gradients_match_finite_differences(name: str, gated: bool, shape: Shape) -> None:
    assert torch.autograd.gradcheck(getattr(ops, name), arguments(shape, gated=gated)[name])


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["gate_hidden", "expert_ffn", "sparse_ffn"])
def test_results_may_be_changed_in_place(name: str, shape: Shape, biases: bool) -> None:
    """Falcon adds attention's result to the FFN's so. In training autograd forbids it for views made inside of ops."""
    given = arguments(shape, biases=biases)[name]
    result = getattr(ops, name)(*given)
    result += 1
    result.sum().backward()
    assert given[0].grad is not None


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_derivatives(activation: str) -> None:
    z = torch.randn(50, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(ACTIVATIONS[activation].apply(z).sum(), z)
    torch.testing.assert_close(ACTIVATIONS[activation].derivative(z.detach()), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sparse_ffn_matches_float64(shape: Shape, gated: bool, dtype: torch.dtype) -> None:
    call = make_call(shape, gated=gated, dtype=dtype)
    result = run_op(call)
    assert result.dtype == dtype
    assert result.shape == (*shape.tokens, shape.width)
    assert relative_error(result, sparse_ffn_reference(in_float64(call))) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_expert_ffn_matches_float64(shape: Shape, dtype: torch.dtype) -> None:
    weights = make_weights(shape, gated=True, biases=True, dtype=dtype)
    x = torch.randn(*shape.tokens, shape.width, dtype=dtype)
    gates = gates_for(shape, torch.float32)
    rest = ("silu", shape.expert_size, shape.offset_tensor)
    wide = widen(weights)
    expected = expert_ffn_reference(x.double(), gates.double(), wide, *rest)
    assert relative_error(ops.expert_ffn(x, gates, *weights, *rest), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_experts_active_is_the_dense_ffn(shape: Shape) -> None:
    call = make_call(shape, tau=-1.0)
    up, gate, down, up_bias, gate_bias, down_bias = call.weights
    assert gate is not None
    hidden = F.silu(F.linear(call.x_D, gate, gate_bias)) * F.linear(call.x_D, up, up_bias)
    torch.testing.assert_close(run_op(call), F.linear(hidden, down, down_bias), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [(1,), (3,), (40,)])
def test_no_expert_active_leaves_the_bias_alone(tokens: tuple[int, ...]) -> None:
    call = make_call(with_tokens(PRIMES, *tokens), tau=1.0)
    bias = call.weights.down_bias_D
    assert bias is not None
    assert torch.equal(run_op(call), bias.expand(*tokens, -1))


@pytest.mark.parametrize("tokens", [(1,), (3,), (40,)])
def test_sparse_ffn_is_route_select_and_expert_ffn(tokens: tuple[int, ...]) -> None:
    x, router, bias, weights, *_ = call = make_call(with_tokens(UNEQUAL, *tokens))
    gates = ops.select(ops.route(x, router, bias), "threshold", call.tau)
    expected = ops.expert_ffn(x, gates, *weights, call.activation, call.expert_size, call.offsets_E1)
    torch.testing.assert_close(run_op(call), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [(1,), (40,)])
def test_non_finite_weights_of_inactive_experts_do_not_matter(value: float, tokens: tuple[int, ...]) -> None:
    call = make_call(Shape(tokens, 8, 32, 8), gated=False)
    bias = torch.tensor([50.0, -50.0, 50.0, -50.0], dtype=torch.float64)
    call = call._replace(router_bias_E=bias)
    expected = run_op(call)
    call.weights.up_FD[8:16] = value
    torch.testing.assert_close(run_op(call), expected)


@pytest.mark.parametrize("tokens", [(1,), (40,)])
def test_non_finite_input_reaches_the_output_of_active_experts(tokens: tuple[int, ...]) -> None:
    call = make_call(with_tokens(PRIMES, *tokens), tau=-1.0, activation="relu", gated=False)
    call.x_D[..., 0] = float("nan")
    assert not run_op(call._replace(tau=0.5)).isnan().any()  # a NaN score selects nothing
    call.router_ED.zero_()
    call.x_D[..., 0] = 1e308
    assert run_op(call).isfinite().all() == sparse_ffn_reference(call).isfinite().all()


def test_scores_stay_fp32_and_tau_is_not_rounded() -> None:
    scores = torch.tensor([0.5000001, 0.5, 0.4999999])
    assert ops.select(scores, "threshold", 0.5).tolist() == [1, 0, 0]
    assert ops.select(scores.bfloat16(), "threshold", 0.4999).tolist() == [1, 1, 1]  # 0.4999 rounds to 0.5 in bf16
    x, weight = torch.randn(3, 4, dtype=torch.float16), torch.randn(2, 4, dtype=torch.float16)
    assert ops.route(x, weight, None).dtype == torch.float32


@pytest.mark.parametrize(
    "rule, gates, gradient",
    [
        ("dense", [1, 1, 1], 0),
        ("soft", [0.2, 0.5, 0.9], 1),
        ("threshold", [0, 0, 1], 0),
        ("straight_through", [0, 0, 1], 1),
    ],
)
def test_selection_rules(rule: str, gates: list[float], gradient: float) -> None:
    scores = torch.tensor([0.2, 0.5, 0.9], requires_grad=True)
    result = ops.select(scores, rule, 0.5)
    torch.testing.assert_close(result.detach(), torch.tensor(gates, dtype=torch.float32))
    assert result.requires_grad == bool(gradient)
    if gradient:
        assert torch.equal(torch.autograd.grad(result.sum(), scores)[0], torch.full((3,), float(gradient)))


@pytest.mark.parametrize("tau, kept", [(0.01, 1), (0.4, 2), (0.5, 2), (0.75, 4), (1.0, 5)])
def test_top_share_keeps_the_same_number_of_experts_for_every_token(tau: float, kept: int) -> None:
    scores_TE = torch.rand(7, 5, generator=torch.Generator().manual_seed(0))
    scores_TE[0] = 0.5  # ties do not make it more
    gates_TE = ops.select(scores_TE, "top_share", tau)
    assert gates_TE.sum(-1).tolist() == [kept] * 7
    left_out = scores_TE.masked_fill(gates_TE == 1, -1.0).amax(-1)
    assert bool((scores_TE.masked_fill(gates_TE == 0, 2.0).amin(-1) >= left_out).all())


def test_a_new_rule_is_one_function() -> None:
    @selection_rule("at_most_one", gradient=Gradient.NONE)
    def at_most_one(scores: Tensor, tau: float) -> Tensor:
        return scores == scores.amax(-1, keepdim=True)

    try:
        assert ops.select(torch.tensor([0.1, 0.9, 0.3]), "at_most_one", 0.5).tolist() == [0, 1, 0]
    finally:
        del SELECTION_RULES["at_most_one"]


def run_ffn(x: Tensor, down: Tensor | None = None) -> Tensor:
    ffn = torch.randn(37, 13), None, torch.randn(13, 37) if down is None else down, None, None, None
    result: Tensor = ops.expert_ffn(x, torch.rand(2, 5), *ffn, "relu", 8)
    return result


@pytest.mark.parametrize("name", ["route", "gate_hidden", "expert_ffn", "sparse_ffn"])
@pytest.mark.parametrize("shape", [Shape((3,), 5, 0, 4), Shape((3,), 0, 8, 4), Shape((2, 1), 5, 0, 4, (0,))], ids=str)
def test_layers_of_nothing(name: str, shape: Shape) -> None:
    """No neurons, or no columns: an FFN that is its bias."""
    given = arguments(shape)[name]
    assert set(torch.library.opcheck(getattr(ops, name).default, given).values()) == {"SUCCESS"}
    if name.endswith("ffn") and not shape.neurons:
        bias = given[{"expert_ffn": 7, "sparse_ffn": 8}[name]]
        assert torch.equal(getattr(ops, name)(*given), bias.expand(*shape.tokens, -1))


@pytest.mark.parametrize(
    "run, message",
    [
        (lambda: ops.route(torch.randn(2, 3), torch.randn(4, 5), None), r"\[experts, 3\].*got \[4, 5\]"),
        (lambda: ops.route(torch.randn(2, 3), torch.randn(4, 3), torch.randn(3)), r"bias must be \[4\]"),
        (lambda: ops.select(torch.rand(3), "treshold", 0.5), "did you mean 'threshold'"),
        (lambda: ops.gate_hidden(torch.randn(2, 8), torch.rand(2, 3), 4), "make 2 experts"),
        (lambda: ops.gate_hidden(torch.randn(2, 8), torch.rand(3, 2), 4), "same leading"),
        (lambda: ops.gate_hidden(torch.randn(8), torch.rand(2), 4, torch.tensor([0, 3, 7])), "rise from 0 to 8"),
        (lambda: ops.gate_hidden(torch.randn(8), torch.rand(2), 4, torch.tensor([0, 8])), r"shape \[3\]"),
        (lambda: run_op(make_call(PRIMES, activation="gleu")), "unknown activation 'gleu'.*did you mean 'gelu'"),
        (lambda: run_op(make_call(PRIMES)._replace(expert_size=0)), "at least 1"),
        (lambda: ops.select(torch.rand(3), "top_share", 1.5), r"in \[0, 1\]; got 1.5"),
        (lambda: run_ffn(torch.ones(2, 13, dtype=torch.int64)), "x must be floating point; got torch.int64"),
        (lambda: run_ffn(torch.randn(2, 13), torch.tensor(1.0)), r"w_down must have shape \[width, 37\]; got \[\]"),
    ],
)
def test_mistakes_are_explained(run: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run()


class OneFfn(nn.Module):
    """The three ways to write one sparse FFN; they agree."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 3)
        self.up = nn.Linear(6, 11)
        self.down = nn.Linear(11, 6)

    def forward(self, x: Tensor, rule: str = "threshold") -> tuple[Tensor, Tensor, Tensor]:
        router, up, down = self.router, self.up, self.down
        gates = ops.select(ops.route(x, router.weight, router.bias), rule, 0.5)
        ffn = (up.weight, None, down.weight, up.bias, None, down.bias, "gelu", 4)
        anchored = down(ops.gate_hidden(F.gelu(up(x)), gates, 4))
        return anchored, ops.expert_ffn(x, gates, *ffn), ops.sparse_ffn(x, router.weight, router.bias, *ffn, 0.5)


def test_export_with_dynamic_batch_and_sequence() -> None:
    model = OneFfn()
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    exported = torch.export.export(model, (torch.randn(2, 5, 6),), dynamic_shapes={"x": sizes})
    x = torch.randn(3, 7, 6)
    for actual, expected in zip(exported.module()(x), model(x), strict=True):
        torch.testing.assert_close(actual, expected)
    names = {str(node.target) for node in exported.graph.nodes}
    assert {f"lte.{name}.default" for name in OP_NAMES} <= names


@pytest.mark.parametrize("rule", ["soft", "straight_through"])
def test_compiled_forward_and_backward_equal_eager(rule: str) -> None:
    model, x = OneFfn().double(), torch.randn(2, 5, 6, dtype=torch.float64)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def gradients(run: Callable[..., tuple[Tensor, ...]]) -> list[Tensor]:
        loss = torch.stack([y.square().sum() for y in run(x, rule)]).sum()
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    for actual, expected in zip(gradients(compiled), gradients(model), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_anchored_linears_and_expert_ffn_have_the_same_gradients() -> None:
    model, x = OneFfn().double(), torch.randn(2, 5, 6, dtype=torch.float64)
    anchored, fused, _ = model(x, "soft")
    parameters = list(model.parameters())
    expected = torch.autograd.grad(anchored.square().sum(), parameters, retain_graph=True)
    for actual, wanted in zip(torch.autograd.grad(fused.square().sum(), parameters), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    model, x = OneFfn(), torch.randn(2, 5, 6)
    scores = ops.route(x, model.router.weight, model.router.bias)
    expected = model(x, "soft")
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(ops.route(x, model.router.weight, model.router.bias), scores)
        assert ops.select(scores, "threshold", 0.5).dtype == torch.float32
        outputs = model(x, "soft")
        loss = torch.stack([y.float().square().sum() for y in outputs]).sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for actual, wanted in zip(outputs, expected, strict=True):
        assert actual.dtype == dtype
        assert relative_error(actual, wanted) < TOLERANCE[dtype]
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 6),
    width=st.integers(1, 9),
    neurons=st.integers(1, 20),
    expert_size=st.integers(1, 24),
    gated=st.booleans(),
    biases=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_matches_a_loop_over_experts(
    tokens: int, width: int, neurons: int, expert_size: int, gated: bool, biases: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    call = make_call(Shape((tokens,), width, neurons, expert_size), gated=gated, biases=biases)
    torch.testing.assert_close(run_op(call), loop_over_experts(call), rtol=1e-10, atol=1e-10)


def loop_over_experts(call: SparseFfnCall) -> Tensor:
    """The paper's sum, written out: token by token, expert by expert."""
    up, gate, down, up_bias, gate_bias, down_bias = call.weights
    active = active_experts(call)
    y = torch.zeros(call.x_D.shape[0], down.shape[0], dtype=call.x_D.dtype)
    for token, expert in active.nonzero().tolist():
        rows = slice(expert * call.expert_size, (expert + 1) * call.expert_size)
        x = call.x_D[token]
        hidden = up[rows] @ x + (0 if up_bias is None else up_bias[rows])
        if gate is not None:
            hidden = hidden * F.silu(gate[rows] @ x + (0 if gate_bias is None else gate_bias[rows]))
        else:
            hidden = F.silu(hidden)
        y[token] += down[:, rows] @ hidden
    return y if down_bias is None else y + down_bias


@pytest.mark.parametrize("density", [None, 0.0, 0.3, 1.0])
def test_the_density_to_expect_changes_no_value(density: float | None) -> None:
    given = arguments(PRIMES)["sparse_ffn"]
    plain, hinted = ops.sparse_ffn(*given), ops.sparse_ffn(*given, density=density)
    assert torch.equal(plain, hinted)
    (expected,), (grad,) = (torch.autograd.grad(y.sum(), given[:1]) for y in (plain, hinted))
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("density", [-0.1, 1.5, float("nan")])
def test_a_density_is_a_share(density: float) -> None:
    with pytest.raises(ValueError, match=r"density is the expected share of selected experts, in \[0, 1\]"):
        ops.sparse_ffn(*arguments(PRIMES)["sparse_ffn"], density=density)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        ops.select(*arguments(PRIMES)["select"], density)
