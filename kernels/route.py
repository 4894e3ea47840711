"""lte::route: the router, scores = sigmoid(x W^T + b) (Learn To be Efficient, arXiv 2402.06126, section 4.1).

Shape suffixes: D model width, E experts; any leading dimensions come before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lte_compile.kernels.autocast import register_autocast


def score_dtype(x: Tensor) -> torch.dtype:
    """Scores are fp32, whatever the model's dtype, and fp64 for an fp64 model."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def route_reference(x_D: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    """Scores [..., E] in (0, 1) of x [..., D], computed and returned in fp32 (fp64 for fp64 x)."""
    dtype = score_dtype(x_D)
    if not (x_D.dtype == weight_ED.dtype == dtype):  # one-token decode on a CPU feels a call that does nothing
        x_D, weight_ED = x_D.to(dtype), weight_ED.to(dtype)
    if bias_E is not None and bias_E.dtype != dtype:
        bias_E = bias_E.to(dtype)
    return torch.sigmoid(F.linear(x_D, weight_ED, bias_E))


def check_router(x_D: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> None:
    """ValueError unless the router fits x."""
    if x_D.ndim < 1 or weight_ED.ndim != 2 or weight_ED.shape[1] != x_D.shape[-1]:
        raise ValueError(
            f"router weight must be [experts, {x_D.shape[-1] if x_D.ndim else 'D'}] for x of shape {list(x_D.shape)}; "
            f"got {list(weight_ED.shape)}"
        )
    if bias_E is not None and tuple(bias_E.shape) != (weight_ED.shape[0],):
        raise ValueError(f"router bias must be [{weight_ED.shape[0]}] (experts); got {list(bias_E.shape)}")
    if not (x_D.is_floating_point() and weight_ED.is_floating_point()):
        raise ValueError(f"route needs floating point x and weight; got {x_D.dtype} and {weight_ED.dtype}")


@torch.library.custom_op("lte::route", mutates_args=())
def route(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_router(x, weight, bias)
    return route_reference(x, weight, bias)


@route.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_router(x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=score_dtype(x))


@torch.library.custom_op("lte::route_backward", mutates_args=())
def route_backward(
    grad: Tensor, scores: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, wanted: Sequence[bool]
) -> list[Tensor]:
    """Gradients of (x, weight, bias), those that `wanted` marks, in that order and in their dtypes."""
    want_x, want_weight, want_bias = wanted
    grad_logits_E = grad * scores * (1 - scores)
    logits_TE = grad_logits_E.reshape(-1, weight.shape[0])
    grads = []
    if want_x:
        grads.append((grad_logits_E @ weight.to(grad_logits_E.dtype)).to(x.dtype))
    if want_weight:
        grads.append((logits_TE.t() @ x.reshape(-1, x.shape[-1]).to(logits_TE.dtype)).to(weight.dtype))
    if want_bias and bias is not None:
        grads.append(logits_TE.sum(0).to(bias.dtype))
    return grads


@route_backward.register_fake
def _(
    grad: Tensor, scores: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, wanted: Sequence[bool]
) -> list[Tensor]:
    inputs = (x, weight, bias)
    return [t.new_empty(t.shape) for t, want in zip(inputs, wanted, strict=True) if want and t is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight, bias, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, scores = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    grads = iter(torch.ops.lte.route_backward(grad, scores, x, weight, bias, wanted))
    return tuple(next(grads) if want else None for want in wanted)


route.register_autograd(_backward, setup_context=_setup_context)
register_autocast("route")
register_autocast("route_backward")
