"""Region programs: their text, what they compute, their gradients, and FFN ops whose hidden function is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lte_compile.kernels.ops  # noqa: F401
from lte_compile.kernels.ffn import FfnWeights
from lte_compile.kernels.hidden import hidden_of
from lte_compile.kernels.lowering import choose, describe
from lte_compile.kernels.pointwise import BOOL, FLOAT, POINTWISE_OPS, PointwiseOp
from lte_compile.kernels.program import Instruction, Program, parse_program, program_gradients, run_program
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall, sparse_ffn_reference
from tests.kernels.problems import (
    PROGRAMS,
    SHAPES,
    TOLERANCE,
    Shape,
    in_float64,
    make_constants,
    make_program_call,
    relative_error,
    run_op,
)

ops = torch.ops.lte
F64 = torch.float64


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def gpt_oss(up: Tensor, gate: Tensor) -> Tensor:
    gate, up = gate.clamp(max=0.7), up.clamp(-0.7, 0.7)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def xielu(up: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """arXiv 2411.13010, as transformers' Apertus writes it."""
    below = (torch.expm1(torch.min(up, torch.tensor(-1e-6, dtype=up.dtype))) - up) * (0.5 + F.softplus(negative))
    return torch.where(up > 0, F.softplus(positive) * up * up, below) + 0.5 * up


EAGER: dict[str, Callable[..., Tensor]] = {
    "clamped SwiGLU with +1 (gpt-oss)": gpt_oss,
    "xIELU (apertus)": xielu,
    "softcap": lambda up: 30 * torch.tanh(up / 30),
    "scale and shift of each neuron": lambda up, gate, scale, shift: (torch.sigmoid(gate) * scale + shift) * up,
}


def inputs_of(text: str, *shape: int, neurons: int = 5) -> tuple[Tensor, ...]:
    """Leaves for every input of a program, in its order."""
    program = parse_program(text)
    operands = [torch.randn(*shape, neurons, dtype=F64) for _ in range(2 if program.gated else 1)]
    return tuple(t.requires_grad_() for t in (*operands, *make_constants(text, neurons, F64)))


def run(text: str, inputs: tuple[Tensor, ...]) -> Tensor:
    program = parse_program(text)
    count = 2 if program.gated else 1
    return run_program(program, inputs[0], inputs[1] if program.gated else None, inputs[count:])


@pytest.mark.parametrize("name", EAGER)
def test_programs_compute_what_eager_code_does_forward_and_backward(name: str) -> None:
    inputs = inputs_of(PROGRAMS[name], 7)
    expected = EAGER[name](*inputs)
    torch.testing.assert_close(run(PROGRAMS[name], inputs), expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(expected)
    program = parse_program(PROGRAMS[name])
    with torch.no_grad():
        gate, constants = (inputs[1], inputs[2:]) if program.gated else (None, inputs[1:])
        found = program_gradients(program, grad, inputs[0], gate, constants)
    wanted = torch.autograd.grad(expected, inputs, grad)
    for got, want in zip(found.values(), wanted, strict=True):
        torch.testing.assert_close(got.reshape(want.shape), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PROGRAMS)
def test_text_round_trips(name: str) -> None:
    program = parse_program(PROGRAMS[name])
    assert str(program) == PROGRAMS[name]
    assert parse_program(str(program)) is parse_program(PROGRAMS[name])


def test_the_programs_under_test_use_the_whole_table() -> None:
    used = {instruction.op for text in PROGRAMS.values() for instruction in parse_program(text).instructions}
    assert used == set(POINTWISE_OPS)


@pytest.mark.parametrize(
    "text, message",
    [
        ("v0 = sigmod(up)", "no operation 'sigmod'; did you mean 'sigmoid'"),
        ("v0 = mul(up)", r"mul takes 2 operands; got mul\(up\)"),
        ("v0 = mul(up, v1)", "reads 'v1', which nothing before it computes"),
        ("v0 = mul(up, __import__)", "reads '__import__', which nothing"),
        ("v1 = relu(up)", "statement 0 must look like"),
        ("v0 = relu(up); os.remove(1)", "cannot read 'os.remove"),
        ("v0 = relu(relu(up))", "cannot read"),
        ("v0 = gt(up, 0.0)", "computes a floating hidden value from `up`"),
        ("v0 = relu(gate)", "computes a floating hidden value from `up`"),
        ("v0 = gt(up, 0.0); v1 = exp(v0)", "'v0' must be floating"),
        ("v0 = where(up, up, 0.0)", "'up' must be boolean"),
        ("v0 = mul(2.0, 3.0); v1 = mul(v0, up)", "reads no value"),
        ("v0 = mul(up, n1)", "numbers its constants without gaps"),
    ],
)
def test_what_is_no_program_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_program(text)


def test_calls_that_do_not_fit_their_program_are_explained() -> None:
    call = make_program_call(Shape((2,), 3, 6, 2), PROGRAMS["scale and shift of each neuron"])
    scale, shift = call.constants
    with pytest.raises(ValueError, match="reads the constants n0, n1; got 1 tensors"):
        run_op(call._replace(constants=(scale,)))
    with pytest.raises(ValueError, match=r"constant n1 must be floating, \[6\]; got torch.float64 \[5\]"):
        run_op(call._replace(constants=(scale, shift[:5])))
    with pytest.raises(ValueError, match="program is that of a gated FFN; it was given without w_gate"):
        run_op(call._replace(weights=call.weights._replace(gate_FD=None, gate_bias_F=None)))
    with pytest.raises(ValueError, match="'silu' reads no constants; got 2"):
        run_op(call._replace(activation="silu"))


def test_a_new_operation_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    row = PointwiseOp(torch.sinh, "(tl.exp({0}) - tl.exp(-{0})) * 0.5", (lambda g, y, a: g * torch.cosh(a),))
    monkeypatch.setattr("lte_compile.kernels.program.POINTWISE_OPS", {**POINTWISE_OPS, "sinh": row})
    up = torch.randn(3, 5, dtype=F64, requires_grad=True)
    program = Program((Instruction("sinh", ("up",)),))
    torch.testing.assert_close(run_program(program, up, None, ()), torch.sinh(up))
    (wanted,) = torch.autograd.grad(torch.sinh(up).sum(), up)
    torch.testing.assert_close(program_gradients(program, torch.ones_like(up), up.detach(), None, ())["up"], wanted)


def test_a_branch_not_taken_passes_no_nan_back() -> None:
    """Where exp overflows, eager autograd gives 0 * inf; the softplus that was not chosen has no say here."""
    program = parse_program("v0 = gt(up, 20.0); v1 = exp(up); v2 = log1p(v1); v3 = where(v0, up, v2)")
    up = torch.tensor([-1.0, 1.0, 1000.0], dtype=F64)
    grads = program_gradients(program, torch.ones_like(up), up, None, ())
    torch.testing.assert_close(grads["up"], torch.sigmoid(up))


def leaves(call: SparseFfnCall) -> tuple[list[Any], list[Tensor]]:
    """x, router, its bias and the six weights (some None), and the constants."""
    tensors = (call.x_D, call.router_ED, call.router_bias_E, *call.weights)
    return [None if t is None else t.requires_grad_() for t in tensors], [c.requires_grad_() for c in call.constants]


OP_SHAPES = [Shape((2, 3), 3, 7, 3), Shape((1, 2), 3, 6, 4, offsets=(0, 1, 1, 6))]


@pytest.mark.parametrize("shape", OP_SHAPES, ids=str)
@pytest.mark.parametrize("name", EAGER)
def test_gradients_of_the_ops_match_finite_differences(name: str, shape: Shape) -> None:
    call = make_program_call(shape, PROGRAMS[name])
    (x, router, bias, *weights), constants = leaves(call)
    gates = torch.rand(*shape.tokens, shape.experts, dtype=F64, requires_grad=True)
    rest = (call.activation, shape.expert_size)
    count = len(constants)

    def expert(x: Tensor, gates: Tensor, *tensors: Tensor) -> Tensor:
        given = tensors[len(tensors) - count :]
        result: Tensor = ops.expert_ffn(x, gates, *tensors[:6], *rest, shape.offset_tensor, list(given) or None)
        return result

    def sparse(x: Tensor, *tensors: Tensor) -> Tensor:
        given = list(tensors[len(tensors) - count :]) or None
        result: Tensor = ops.sparse_ffn(x, router, bias, *tensors[:6], *rest, 0.5, shape.offset_tensor, given)
        return result

    assert torch.autograd.gradcheck(expert, (x, gates, *weights, *constants))
    assert torch.autograd.gradcheck(sparse, (x, *weights, *constants))


@pytest.mark.parametrize("name", EAGER)
def test_opcheck(name: str) -> None:
    shape = OP_SHAPES[0]
    call = make_program_call(shape, PROGRAMS[name])
    (x, router, bias, *weights), constants = leaves(call)
    gates = torch.rand(*shape.tokens, shape.experts, dtype=F64, requires_grad=True)
    rest = (call.activation, shape.expert_size)
    for op, args in (
        (ops.expert_ffn, (x, gates, *weights, *rest, None, constants or None)),
        (ops.sparse_ffn, (x, router, bias, *weights, *rest, 0.5, None, constants or None)),
    ):
        assert set(torch.library.opcheck(op.default, args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_sparse_ffn_matches_float64(name: str, shape: Shape, dtype: torch.dtype) -> None:
    call = make_program_call(shape, PROGRAMS[name], dtype=dtype)
    if name == "every other operation":  # it jumps at whole numbers: rounding alone moves values across
        call = call._replace(x_D=call.x_D * 0, weights=_whole_biases(call.weights))
    result = run_op(call)
    assert result.dtype == dtype
    assert relative_error(result, sparse_ffn_reference(in_float64(call))) < TOLERANCE[dtype]


def _whole_biases(weights: FfnWeights) -> FfnWeights:
    """Biases that every dtype holds exactly, away from the jumps."""
    assert weights.up_bias_F is not None
    return weights._replace(up_bias_F=torch.arange(len(weights.up_bias_F)).to(weights.up_bias_F.dtype) % 4 - 0.75)


def test_constants_may_be_of_another_dtype() -> None:
    call = make_program_call(SHAPES[1], PROGRAMS["scale and shift of each neuron"], dtype=torch.bfloat16)
    wide = call._replace(constants=tuple(c.float() for c in call.constants))
    assert torch.equal(run_op(wide), run_op(call))


@pytest.mark.parametrize("run_cost", [0, 10**9], ids=["no gap joined", "all gaps joined"])
@pytest.mark.parametrize("name", ["scale and shift of each neuron", "xIELU (apertus)"])
def test_each_way_on_the_cpu_takes_the_constants_of_its_neurons(
    monkeypatch: pytest.MonkeyPatch, name: str, run_cost: int
) -> None:
    monkeypatch.setattr("lte_compile.kernels.sparse_ffn_cpu.RUN_COST_BYTES", run_cost)
    for tokens in ((1,), (3,)):
        call = make_program_call(Shape(tokens, 13, 37, 4), PROGRAMS[name])
        assert choose(describe(call)).lowering.name == "cpu-runs"
        torch.testing.assert_close(run_op(call), sparse_ffn_reference(call), rtol=1e-12, atol=1e-12)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Any checked program of smooth or jumping operations over every kind of operand."""
    kinds: dict[str, str] = dict.fromkeys(("up", "gate", "n0", "s0"), FLOAT)
    steps = [Instruction("add", ("up", "gate")), Instruction("mul", ("n0", "s0"))]
    kinds |= {"v0": FLOAT, "v1": FLOAT}
    for _ in range(draw(st.integers(1, 12))):
        op = draw(st.sampled_from(sorted(POINTWISE_OPS)))
        of_kind = {kind: [name for name, k in kinds.items() if k == kind] or [""] for kind in (FLOAT, BOOL)}
        operands = [draw(st.sampled_from(of_kind[kind])) for kind in POINTWISE_OPS[op].takes]
        if "" in operands:
            continue
        if len(operands) == 2 and kinds[operands[1]] == FLOAT and draw(st.booleans()):
            steps.append(Instruction(op, (operands[0], draw(st.floats(-3, 3)))))
        else:
            steps.append(Instruction(op, tuple(operands)))
        kinds[f"v{len(steps) - 1}"] = POINTWISE_OPS[op].gives
    last = next(name for name in reversed(kinds) if kinds[name] == FLOAT)
    steps.append(Instruction("add", (last, "v0")))
    steps.append(Instruction("add", (f"v{len(steps) - 1}", "v1")))
    return Program(tuple(steps))


@settings(max_examples=150, deadline=None)
@given(program=programs(), seed=st.integers(0, 1000))
def test_gradients_of_random_programs_are_autograds(program: Program, seed: int) -> None:
    torch.manual_seed(seed)
    assert parse_program(str(program)) == program
    text = str(program)
    inputs = inputs_of(text, 4, neurons=3)
    result = run(text, inputs)
    again = hidden_of(text, inputs[2:], inputs[0], inputs[1])
    torch.testing.assert_close(again, result, rtol=0, atol=0, equal_nan=True)
    grad = torch.randn_like(result)
    with torch.no_grad():
        found = program_gradients(program, grad, inputs[0], inputs[1], inputs[2:])
    wanted = torch.autograd.grad(result, inputs, grad, allow_unused=True, materialize_grads=True)
    for got, want in zip(found.values(), wanted, strict=True):
        close = torch.isclose(got.reshape(want.shape), want, rtol=1e-9, atol=1e-9)
        assert bool((close | ~want.isfinite()).all())  # eager autograd multiplies zeros with infinities


def test_every_row_of_the_table_is_whole() -> None:
    for name, op in POINTWISE_OPS.items():
        assert len(op.gradients) == op.arity == len(op.takes), name
        assert set(op.takes + op.gives) <= {FLOAT, BOOL}, name
        assert all(f"{{{index}}}" in op.triton for index in range(op.arity)), name
