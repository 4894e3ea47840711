"""lte::sparse_ffn: router, threshold and expert FFN in one op, for inference.

FFN(x) = sum over experts of [score_e > tau] * E_e(x) (arXiv 2402.06126, section 4.2). An expert that is not selected
contributes exactly nothing: its weights need not be read. A NaN score selects nothing.
Shape suffixes: T tokens (all leading dimensions), D model width, F neurons, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lte_compile.kernels.autocast import register_autocast
from lte_compile.kernels.expert_ffn import WEIGHT_NAMES
from lte_compile.kernels.experts import check_experts, check_offsets
from lte_compile.kernels.ffn import FfnWeights, check_ffn
from lte_compile.kernels.lowering import lower_sparse_ffn
from lte_compile.kernels.route import check_router
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall


@torch.library.custom_op("lte::sparse_ffn", mutates_args=())
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
) -> Tensor:
    weights = FfnWeights(w_up, w_gate, w_down, b_up, b_gate, b_down)
    _check(x, w_router, b_router, weights, activation, expert_size, expert_offsets)
    check_offsets(expert_offsets, w_up.shape[0])
    return lower_sparse_ffn(SparseFfnCall(x, w_router, b_router, weights, activation, expert_size, tau, expert_offsets))


def _check(
    x: Tensor,
    w_router: Tensor,
    b_router: Tensor | None,
    weights: FfnWeights,
    activation: str,
    expert_size: int,
    offsets: Tensor | None,
) -> None:
    check_router(x, w_router, b_router)
    check_ffn(x, weights, activation)
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
) -> Tensor:
    weights = FfnWeights(w_up, w_gate, w_down, b_up, b_gate, b_down)
    _check(x, w_router, b_router, weights, activation, expert_size, expert_offsets)
    return x.new_empty((*x.shape[:-1], w_down.shape[0]), dtype=w_up.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w_router, b_router, *weights, ctx.activation, ctx.expert_size, ctx.tau, offsets = inputs
    ctx.save_for_backward(x, w_router, b_router, *weights, offsets)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, w_router, b_router, *weights, offsets = ctx.saved_tensors
    ops = torch.ops.lte
    gates = ops.select(ops.route(x, w_router, b_router), "threshold", ctx.tau)
    wants_x, _, _, *wants_weights = ctx.needs_input_grad[:9]
    wanted = [wants_x, False, *wants_weights]
    x_cast = x.to(weights[0].dtype)
    grads = iter(
        ops.expert_ffn_backward(grad, x_cast, gates, *weights, ctx.activation, ctx.expert_size, offsets, wanted)
    )
    grad_x = next(grads).to(x.dtype) if wants_x else None
    return grad_x, None, None, *(next(grads) if want else None for want in wants_weights), None, None, None, None


sparse_ffn.register_autograd(_backward, setup_context=_setup_context)
# x keeps its dtype: the router must see what it saw in training. The FFN reads it in the weights' dtype.
register_autocast("sparse_ffn", cast=WEIGHT_NAMES)
