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

from lte_compile.kernels.activations import find_activation
from lte_compile.kernels.autocast import register_autocast
from lte_compile.kernels.experts import check_experts, check_offsets, scale_by_gates, sum_per_expert
from lte_compile.kernels.ffn import FfnWeights, check_ffn, hidden_value, project_down

WEIGHT_NAMES = frozenset({"w_up", "w_gate", "w_down", "b_up", "b_gate", "b_down"})


def expert_ffn_reference(
    x_D: Tensor,
    gates_E: Tensor,
    weights: FfnWeights,
    activation: str,
    expert_size: int,
    offsets_E1: Tensor | None = None,
) -> Tensor:
    """y [..., D] of x [..., D] and gates [..., E]; plain torch, differentiable."""
    hidden_F = hidden_value(x_D, weights, activation)
    return project_down(scale_by_gates(hidden_F, gates_E, expert_size, offsets_E1), weights)


def _check(
    x: Tensor, gates: Tensor, weights: FfnWeights, activation: str, expert_size: int, offsets: Tensor | None
) -> None:
    check_ffn(x, weights, activation)
    if x.dtype != weights.up_FD.dtype:
        raise ValueError(f"x is {x.dtype} and the weights {weights.up_FD.dtype}; cast one of them")
    if gates.ndim != x.ndim or not gates.is_floating_point():
        raise ValueError(
            f"gates must be floating point [..., experts] beside x {list(x.shape)}; "
            f"got {gates.dtype} {list(gates.shape)}"
        )
    check_experts(weights.up_FD.shape[0], gates.shape[-1], expert_size, offsets)


@torch.library.custom_op("lte::expert_ffn", mutates_args=())
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
) -> Tensor:
    weights = FfnWeights(w_up, w_gate, w_down, b_up, b_gate, b_down)
    _check(x, gates, weights, activation, expert_size, expert_offsets)
    if gates.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"gates {list(gates.shape)} and x {list(x.shape)} need the same leading dimensions")
    check_offsets(expert_offsets, w_up.shape[0])
    return expert_ffn_reference(x, gates, weights, activation, expert_size, expert_offsets)


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
) -> Tensor:
    weights = FfnWeights(w_up, w_gate, w_down, b_up, b_gate, b_down)
    _check(x, gates, weights, activation, expert_size, expert_offsets)
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
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients of (x, gates, w_up, ... b_down), those that `wanted` marks. Hidden values are computed anew."""
    weights = FfnWeights(w_up, w_gate, w_down, b_up, b_gate, b_down)
    x_TD, gates_TE, grad_TD = (t.reshape(-1, t.shape[-1]) for t in (x, gates, grad))
    want = dict(zip(("x", "gates", "up", "gate", "down", "up_bias", "gate_bias", "down_bias"), wanted, strict=True))
    up_TF = F.linear(x_TD, w_up, b_up)
    gate_TF = None if w_gate is None else F.linear(x_TD, w_gate, b_gate)
    act = find_activation(activation)
    hidden_TF = act.apply(up_TF) if gate_TF is None else act.apply(gate_TF) * up_TF
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
    _projection_grads(grads, want, x_TD, weights, activation, up_TF, gate_TF, grad_hidden_TF)
    if want["x"]:
        grads["x"] = grads["x"].reshape(x.shape)
    return [grads[name] for name, is_wanted in want.items() if is_wanted]


def _projection_grads(
    grads: dict[str, Tensor],
    want: dict[str, bool],
    x_TD: Tensor,
    weights: FfnWeights,
    activation: str,
    up_TF: Tensor,
    gate_TF: Tensor | None,
    grad_hidden_TF: Tensor,
) -> None:
    """Adds the gradients of x and of the projections into the hidden value."""
    act = find_activation(activation)
    sides: list[tuple[str, Tensor, Tensor]] = []
    if gate_TF is None or weights.gate_FD is None:
        sides.append(("up", weights.up_FD, act.backward(grad_hidden_TF, up_TF)))
    else:
        sides.append(("up", weights.up_FD, grad_hidden_TF * act.apply(gate_TF)))
        sides.append(("gate", weights.gate_FD, act.backward(grad_hidden_TF * up_TF, gate_TF)))
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
    wanted: Sequence[bool],
) -> list[Tensor]:
    inputs = (x, gates, w_up, w_gate, w_down, b_up, b_gate, b_down)
    return [t.new_empty(t.shape) for t, want in zip(inputs, wanted, strict=True) if want and t is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation, ctx.expert_size, offsets = inputs
    ctx.save_for_backward(*tensors, offsets)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, offsets = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[: len(tensors)])
    call = torch.ops.lte.expert_ffn_backward
    grads = iter(call(grad, *tensors, ctx.activation, ctx.expert_size, offsets, wanted))
    return *(next(grads) if want else None for want in wanted), None, None, None


expert_ffn.register_autograd(_backward, setup_context=_setup_context)
register_autocast("expert_ffn", cast=WEIGHT_NAMES | {"x"})
register_autocast("expert_ffn_backward")
