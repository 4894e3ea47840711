"""lte::sparse_ffn: router, threshold and expert FFN in one op, for inference.

FFN(x) = sum over experts of [score_e > tau] * E_e(x) (arXiv 2402.06126, section 4.2). An expert that is not selected
contributes exactly nothing: its weights need not be read. A NaN score selects nothing. The router reads x or, where
that is given, `x_router`: any tensor [..., C] of the same tokens, with a router weight [E, C].
Shape suffixes: T tokens (all leading dimensions), D model width, F neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lte_compile.kernels.autocast import register_autocast
from lte_compile.kernels.expert_ffn import WEIGHT_NAMES
from lte_compile.kernels.experts import check_experts, check_offsets
from lte_compile.kernels.ffn import FfnWeights, check_ffn
from lte_compile.kernels.layout import own
from lte_compile.kernels.lowering import lower_sparse_ffn
from lte_compile.kernels.route import check_router
from lte_compile.kernels.selection import check_density
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall


@torch.library.custom_op(
    "lte::sparse_ffn",
    mutates_args=(),
    schema="(Tensor x, Tensor w_router, Tensor? b_router, Tensor w_up, Tensor? w_gate, Tensor w_down, Tensor? b_up, "
    "Tensor? b_gate, Tensor? b_down, str activation, int expert_size, float tau, Tensor? expert_offsets=None, "
    "Tensor[]? constants=None, float? density=None, Tensor? x_router=None) -> Tensor",
)
def sparse_ffn(
    x: Tensor,
    w_router: Tensor,
    b_router: Tensor | None,
    w_up: Tensor,
    w_gate: Tensor | None,
    w_down: Tensor,
    b_up: Tensor | None,
    b_gate: Tensor | None,
    b_down: Tensor | None,
    activation: str,
    expert_size: int,
    tau: float,
    expert_offsets: Tensor | None = None,
    constants: Sequence[Tensor] | None = None,
    density: float | None = None,
    x_router: Tensor | None = None,
) -> Tensor:
    weights = FfnWeights(w_up, w_gate, w_down, b_up, b_gate, b_down)
    _check(x, x_router, w_router, b_router, weights, activation, constants or (), expert_size, expert_offsets)
    check_offsets(expert_offsets, w_up.shape[0])
    check_density(density)
    given = tuple(constants or ())
    router = (w_router, b_router)
    call = SparseFfnCall(x, *router, weights, activation, expert_size, tau, expert_offsets, given, density, x_router)
    return own(lower_sparse_ffn(call))


def _check(
    x: Tensor,
    x_router: Tensor | None,
    w_router: Tensor,
    b_router: Tensor | None,
    weights: FfnWeights,
    activation: str,
    constants: Sequence[Tensor],
    expert_size: int,
    offsets: Tensor | None,
) -> None:
    if x_router is not None and x_router.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"x_router must have the tokens of x, {list(x.shape[:-1])}; got shape {list(x_router.shape)}")
    check_router(x if x_router is None else x_router, w_router, b_router)
    check_ffn(x, weights, activation, constants)
    check_experts(weights.up_FD.shape[0], w_router.shape[0], expert_size, offsets)


@sparse_ffn.register_fake
def _(
    x: Tensor,
    w_router: Tensor,
    b_router: Tensor | None,
    w_up: Tensor,
    w_gate: Tensor | None,
    w_down: Tensor,
    b_up: Tensor | None,
    b_gate: Tensor | None,
    b_down: Tensor | None,
    activation: str,
    expert_size: int,
    tau: float,
    expert_offsets: Tensor | None = None,
    constants: Sequence[Tensor] | None = None,
    density: float | None = None,
    x_router: Tensor | None = None,
) -> Tensor:
    weights = FfnWeights(w_up, w_gate, w_down, b_up, b_gate, b_down)
    _check(x, x_router, w_router, b_router, weights, activation, constants or (), expert_size, expert_offsets)
    return x.new_empty((*x.shape[:-1], w_down.shape[0]), dtype=w_up.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation, ctx.expert_size, ctx.tau, offsets, constants, _, x_router = inputs
    ctx.save_for_backward(*tensors, offsets, x_router, *(constants or ()))


_TENSORS = 9  # x, the router's two and the FFN's six come first


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    (x, w_router, b_router, *weights), (offsets, x_router, *constants) = saved[:_TENSORS], saved[_TENSORS:]
    ops = torch.ops.lte
    gates = ops.select(ops.route(x if x_router is None else x_router, w_router, b_router), "threshold", ctx.tau)
    wants_x, _, _, *wants_weights = ctx.needs_input_grad[:_TENSORS]
    wants_constants = _wants_of_constants(ctx)
    wanted = [wants_x, False, *wants_weights, *wants_constants]
    x_cast = x.to(weights[0].dtype)
    rest = (ctx.activation, ctx.expert_size, offsets, constants, wanted)
    grads = iter(ops.expert_ffn_backward(grad, x_cast, gates, *weights, *rest))
    grad_x = next(grads).to(x.dtype) if wants_x else None
    of_weights = [next(grads) if want else None for want in wants_weights]
    of_constants = [next(grads) if want else None for want in wants_constants]
    return _as_many_as_given(ctx, (grad_x, None, None, *of_weights, None, None, None, None, of_constants, None, None))


def _as_many_as_given(ctx: Any, grads: tuple[Any, ...]) -> tuple[Any, ...]:
    """The dispatcher drops trailing arguments that equal their defaults; no constants are None, not an empty list."""
    wants = ctx.needs_input_grad
    return tuple(grad if want is not False or grad != [] else None for grad, want in zip(grads, wants, strict=False))


def _wants_of_constants(ctx: Any) -> list[bool]:
    """Which of an op's constants want gradients: of all arguments, only they come as a list."""
    return next((list(want) for want in ctx.needs_input_grad if isinstance(want, list | tuple)), [])


sparse_ffn.register_autograd(_backward, setup_context=_setup_context)
# x and x_router keep their dtype: the router must see what it saw in training. The FFN reads it in the weights' dtype.
register_autocast("sparse_ffn", cast=WEIGHT_NAMES)
