"""lte::router_features: what a two-layer router reads, x and R features of it, [x, relu(x W^T + b)].

For inference on a GPU, where a product, a ReLU and a join of one token are a launch each, and this is one.
Shape suffixes: D model width, R features; any leading dimensions come before them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lte_compile.kernels.autocast import register_autocast
from lte_compile.kernels.gated_hidden import TRITON_DTYPES, has_triton
from lte_compile.kernels.layout import as_rows

MAX_WIDTH = 8192  # a warp holds one row


def features_reference(x_D: Tensor, weight_RD: Tensor, bias_R: Tensor) -> Tensor:
    """[..., D + R] of x [..., D]."""
    return torch.cat([x_D, F.relu(F.linear(x_D, weight_RD, bias_R))], -1)


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if weight.ndim != 2 or x.ndim < 1 or weight.shape[1] != x.shape[-1] or bias.shape != weight.shape[:1]:
        shapes = f"{list(x.shape)}, {list(weight.shape)} and {list(bias.shape)}"
        raise ValueError(f"router_features needs x [..., D], weight [R, D] and bias [R]; got shapes {shapes}")
    if not x.dtype == weight.dtype == bias.dtype or not x.is_floating_point():
        raise ValueError(f"router_features needs one floating dtype; got {x.dtype}, {weight.dtype} and {bias.dtype}")


@torch.library.custom_op("lte::router_features", mutates_args=())
def router_features(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    _check(x, weight, bias)
    return _features_of_one(x, weight, bias) if _is_served(x, weight, bias) else features_reference(x, weight, bias)


def _is_served(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """By the kernel for one token."""
    is_one = x.numel() == x.shape[-1] <= MAX_WIDTH and weight.is_contiguous() and bias.is_contiguous()
    return is_one and x.device.type == "cuda" and x.dtype in TRITON_DTYPES and has_triton()


def _features_of_one(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from lte_compile.kernels.triton_decode_small import features_of_one  # triton exists on Linux only

    return features_of_one(x, weight, bias)


@router_features.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    _check(x, weight, bias)
    return x.new_empty((*x.shape[:-1], x.shape[-1] + weight.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2], output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, output = ctx.saved_tensors
    width = weight.shape[1]
    grad_TR = as_rows(torch.where(output[..., width:] > 0, grad[..., width:], 0))
    grad_x = grad[..., :width] + (grad_TR @ weight).view(x.shape)
    return grad_x, grad_TR.t() @ as_rows(x), grad_TR.sum(0)


router_features.register_autograd(_backward, setup_context=_setup_context)
register_autocast("router_features")
