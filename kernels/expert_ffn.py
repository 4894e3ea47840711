"""lte::expert_ffn: an FFN whose neurons are scaled by the gate of their expert.

FFN(x) = sum over experts of gate_e * E_e(x) (arXiv 2402.06126, equation 3), with the down-projection's bias added once.
Shape suffixes: T tokens (all leading dimensions), D model width, F neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lte_compile.kernels.autocast import register_autocast
from lte_compile.kernels.experts import check_experts, check_offsets, scale_by_gates, sum_per_expert
from lte_compile.kernels.ffn import FfnWeights, check_ffn, hidden_value, project_down
from lte_compile.kernels.hidden import HiddenGradients, hidden_gradients, hidden_of
from lte_compile.kernels.layout import own

WEIGHT_NAMES = frozenset({"w_up", "w_gate", "w_down", "b_up", "b_gate", "b_down"})


def expert_ffn_reference(
    x_D: Tensor,
    gates_E: Tensor,
    weights: FfnWeights,
    activation: str,
    expert_size: int,
    offsets_E1: Tensor | None = None,
    constants: Sequence[Tensor] = (),
) -> Tensor:
    """y [..., D] of x [..., D] and gates [..., E]; plain torch, differentiable."""
    hidden_F = hidden_value(x_D, weights, activation, constants)
    return project_down(scale_by_gates(hidden_F, gates_E, expert_size, offsets_E1), weights)


def _check(
    x: Tensor,
    gates: Tensor,
    weights: FfnWeights,
    activation: str,
    constants: Sequence[Tensor],
    expert_size: int,
    offsets: Tensor | None,
) -> None:
    check_ffn(x, weights, activation, constants)
    if x.dtype != weights.up_FD.dtype:
        raise ValueError(f"x is {x.dtype} and the weights {weights.up_FD.dtype}; cast one of them")
    if gates.ndim != x.ndim or not gates.is_floating_point():
        raise ValueError(
            f"gates must be floating point [..., experts] beside x {list(x.shape)}; "
            f"got {gates.dtype} {list(gates.shape)}"
        )
    check_experts(weights.up_FD.shape[0], gates.shape[-1], expert_size, offsets)


# `activation` is a name of ACTIVATIONS, or a region program (kernels/program.py) that reads `constants`.
@torch.library.custom_op(
    "lte::expert_ffn",
    mutates_args=(),
    schema="(Tensor x, Tensor gates, Tensor w_up, Tensor? w_gate, Tensor w_down, Tensor? b_up, Tensor? b_gate, "
    "Tensor? b_down, str activation, int expert_size, Tensor? expert_offsets=None, Tensor[]? constants=None) -> Tensor",
)
def expert_ffn(
    x: Tensor,
    gates: Tensor,
    w_up: Tensor,
    w_gate: Tensor | None,
    w_down: Tensor,
    b_up: Tensor | None,
    b_gate: Tensor | None,
    b_down: Tensor | None,
    activation: str,
    expert_size: int,
    expert_offsets: Tensor | None = None,
    constants: Sequence[Tensor] | None = None,
) -> Tensor:
    weights = FfnWeights(w_up, w_gate, w_down, b_up, b_gate, b_down)
    _check(x, gates, weights, activation, constants or (), expert_size, expert_offsets)
    if gates.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"gates {list(gates.shape)} and x {list(x.shape)} need the same leading dimensions")
    check_offsets(expert_offsets, w_up.shape[0])
    return own(expert_ffn_reference(x, gates, weights, activation, expert_size, expert_offsets, constants or ()))


@expert_ffn.register_fake
def _(
    x: Tensor,
    gates: Tensor,
    w_up: Tensor,
    w_gate: Tensor | None,
    w_down: Tensor,
    b_up: Tensor | None,
    b_gate: Tensor | None,
    b_down: Tensor | None,
    activation: str,
    expert_size: int,
    expert_offsets: Tensor | None = None,
    constants: Sequence[Tensor] | None = None,
) -> Tensor:
    weights = FfnWeights(w_up, w_gate, w_down, b_up, b_gate, b_down)
    _check(x, gates, weights, activation, constants or (), expert_size, expert_offsets)
    return x.new_empty((*x.shape[:-1], w_down.shape[0]))


@torch.library.custom_op("lte::expert_ffn_backward", mutates_args=())
def expert_ffn_backward(
    grad: Tensor,
    x: Tensor,
    gates: Tensor,
    w_up: Tensor,
    w_gate: Tensor | None,
    w_down: Tensor,
    b_up: Tensor | None,
    b_gate: Tensor | None,
    b_down: Tensor | None,
    activation: str,
    expert_size: int,
    expert_offsets: Tensor | None,
    constants: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients of (x, gates, w_up, ... b_down, *constants), those `wanted` marks. Hidden values are computed anew."""
    weights = FfnWeights(w_up, w_gate, w_down, b_up, b_gate, b_down)
    x_TD, gates_TE, grad_TD = (t.reshape(-1, t.shape[-1]) for t in (x, gates, grad))
    names = (*_DIFFERENTIABLE, *(f"constant {i}" for i in range(len(constants))))
    want = dict(zip(names, wanted, strict=True))
    up_TF = F.linear(x_TD, w_up, b_up)
    gate_TF = None if w_gate is None else F.linear(x_TD, w_gate, b_gate)
    hidden_TF = hidden_of(activation, constants, up_TF, gate_TF)
    grads: dict[str, Tensor] = {}
    if want["down"]:
        gated_TF = scale_by_gates(hidden_TF, gates_TE, expert_size, expert_offsets)
        grads["down"] = grad_TD.t() @ gated_TF
    if want["down_bias"]:
        grads["down_bias"] = grad_TD.sum(0)
    grad_gated_TF = grad_TD @ w_down
    if want["gates"]:
        products_TF = grad_gated_TF.to(gates.dtype) * hidden_TF
        sums_TE = sum_per_expert(products_TF, gates.shape[-1], expert_size, expert_offsets)
        grads["gates"] = sums_TE.to(gates.dtype).reshape(gates.shape)
    grad_hidden_TF = scale_by_gates(grad_gated_TF, gates_TE, expert_size, expert_offsets)
    of_hidden = hidden_gradients(activation, constants, grad_hidden_TF, up_TF, gate_TF)
    _projection_grads(grads, want, x_TD, weights, of_hidden)
    grads |= {f"constant {i}": gradient for i, gradient in enumerate(of_hidden.constants)}
    if want["x"]:
        grads["x"] = grads["x"].reshape(x.shape)
    return [grads[name] for name, is_wanted in want.items() if is_wanted]


_DIFFERENTIABLE = ("x", "gates", "up", "gate", "down", "up_bias", "gate_bias", "down_bias")


def _projection_grads(
    grads: dict[str, Tensor], want: dict[str, bool], x_TD: Tensor, weights: FfnWeights, of_hidden: HiddenGradients
) -> None:
    """Adds the gradients of x and of the projections into the hidden value."""
    sides = [("up", weights.up_FD, of_hidden.up_F)]
    if weights.gate_FD is not None and of_hidden.gate_F is not None:
        sides.append(("gate", weights.gate_FD, of_hidden.gate_F))
    for name, weight_FD, grad_TF in sides:
        if want[name]:
            grads[name] = grad_TF.t() @ x_TD
        if want[f"{name}_bias"]:
            grads[f"{name}_bias"] = grad_TF.sum(0)
        if want["x"]:
            part_TD = grad_TF @ weight_FD
            grads["x"] = grads["x"] + part_TD if "x" in grads else part_TD


@expert_ffn_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    gates: Tensor,
    w_up: Tensor,
    w_gate: Tensor | None,
    w_down: Tensor,
    b_up: Tensor | None,
    b_gate: Tensor | None,
    b_down: Tensor | None,
    activation: str,
    expert_size: int,
    expert_offsets: Tensor | None,
    constants: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor]:
    inputs = (x, gates, w_up, w_gate, w_down, b_up, b_gate, b_down, *constants)
    return [t.new_empty(t.shape) for t, want in zip(inputs, wanted, strict=True) if want and t is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation, ctx.expert_size, offsets, constants = inputs
    ctx.save_for_backward(*tensors, offsets, *(constants or ()))


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    count = len(_DIFFERENTIABLE)
    tensors, offsets, constants = ctx.saved_tensors[:count], ctx.saved_tensors[count], ctx.saved_tensors[count + 1 :]
    wants, wants_constants = list(ctx.needs_input_grad[:count]), wants_of_constants(ctx)
    call = torch.ops.lte.expert_ffn_backward
    wanted = [*wants, *wants_constants]
    grads = iter(call(grad, *tensors, ctx.activation, ctx.expert_size, offsets, list(constants), wanted))
    of_tensors = [next(grads) if want else None for want in wants]
    of_constants = [next(grads) if want else None for want in wants_constants]
    return as_many_as_given(ctx, (*of_tensors, None, None, None, of_constants))


def as_many_as_given(ctx: Any, grads: tuple[Any, ...]) -> tuple[Any, ...]:
    """The dispatcher drops trailing arguments that equal their defaults; no constants are None, not an empty list."""
    wants = ctx.needs_input_grad
    return tuple(grad if want is not False or grad != [] else None for grad, want in zip(grads, wants, strict=False))


def wants_of_constants(ctx: Any) -> list[bool]:
    """Which of an op's constants want gradients: of all arguments, only they come as a list."""
    return next((list(want) for want in ctx.needs_input_grad if isinstance(want, list | tuple)), [])


expert_ffn.register_autograd(_backward, setup_context=_setup_context)
register_autocast("expert_ffn", cast=WEIGHT_NAMES | {"x"})
register_autocast("expert_ffn_backward")
