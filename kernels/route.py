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
from lte_compile.kernels.layout import as_rows


def score_dtype(x: Tensor) -> torch.dtype:
    """Scores are fp32, whatever the model's dtype, and fp64 for an fp64 model."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def route_reference(x_D: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    """Scores [..., E] in (0, 1) of x [..., D], computed and returned in fp32 (fp64 for fp64 x)."""
    return torch.sigmoid(_wide_logits(x_D, weight_ED, bias_E))


def _wide_logits(x_D: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    dtype = score_dtype(x_D)
    if not (x_D.dtype == weight_ED.dtype == dtype):  # one-token decode on a CPU feels a call that does nothing
        x_D, weight_ED = x_D.to(dtype), weight_ED.to(dtype)
    if bias_E is not None and bias_E.dtype != dtype:
        bias_E = bias_E.to(dtype)
    return F.linear(x_D, weight_ED, bias_E)


def _logits(x_D: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    """x W^T + b in the scores' dtype.

    On a GPU, half-precision operands go to the tensor cores as they are: their products are exact in fp32, which they
    are summed in, so nothing is rounded that the fp32 computation would keep. fp32 operands stay fp32.
    """
    if not _in_half(x_D, weight_ED):
        return _wide_logits(x_D, weight_ED, bias_E)
    x_TD = as_rows(x_D)
    logits_TE = torch.mm(x_TD, weight_ED.t(), out_dtype=torch.float32)
    if bias_E is not None:
        logits_TE += bias_E
    return logits_TE.view(*x_D.shape[:-1], weight_ED.shape[0])


def _in_half(x_D: Tensor, weight_ED: Tensor) -> bool:
    """Whether the tensor cores serve. An fp32 weight (of bf16 x, say) is not rounded for them: its scores decide."""
    is_half = x_D.dtype in (torch.float16, torch.bfloat16) and x_D.dtype == weight_ED.dtype
    return is_half and x_D.device.type == "cuda" and x_D.numel() > 0


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
    return _logits(x, weight, bias).sigmoid_()


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
    logits_TE = as_rows(torch.ops.aten.sigmoid_backward(grad, scores))  # one pass
    products = _half_products if _in_half(x, weight) else _wide_products
    grads = products(logits_TE, x, weight, want_x, want_weight)
    if want_bias and bias is not None:
        grads.append(logits_TE.sum(0).to(bias.dtype))
    return grads


def _wide_products(logits_TE: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool) -> list[Tensor]:
    """Gradients of x and weight from those of the logits."""
    grads = []
    if want_x:
        grads.append((logits_TE @ weight.to(logits_TE.dtype)).to(x.dtype).view(x.shape))
    if want_weight:
        grads.append((logits_TE.t() @ as_rows(x).to(logits_TE.dtype)).to(weight.dtype))
    return grads


def _half_products(logits_TE: Tensor, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool) -> list[Tensor]:
    """The same on tensor cores: the logits' gradients are rounded to half precision, as every other layer's are.

    A logit's gradient is a mean over tokens and experts and would vanish in fp16: a power of two, found on the device,
    brings the largest close to 1, and the fp32 sums back.
    """
    scale = _power_of_two(logits_TE) if x.dtype == torch.float16 else None
    narrow_TE = (logits_TE if scale is None else logits_TE / scale).to(x.dtype)

    def product(left: Tensor, right: Tensor) -> Tensor:
        if scale is None:
            return left @ right
        return torch.mm(left, right, out_dtype=torch.float32).mul_(scale).to(x.dtype)

    grads = []
    if want_x:
        grads.append(product(narrow_TE, weight).view(x.shape))
    if want_weight:
        grads.append(product(narrow_TE.t(), as_rows(x)))
    return grads


def _power_of_two(values: Tensor) -> Tensor:
    """Close to the largest magnitude among the values; a tensor of one element, so nothing waits for the device."""
    largest = values.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    return torch.exp2(torch.log2(largest).floor())


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
