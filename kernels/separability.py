"""lte::separability: the sum over scores of 1 / ((score - tau)^2 + eps), LTE's separability term bounded by eps.

(arXiv 2402.06126, section 4.2; the paper's term has no eps.) An op of its own, because in torch it takes a dozen passes
over the scores of every layer, which a training step on a GPU feels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lte_compile.kernels.autocast import register_autocast
from lte_compile.kernels.gated_hidden import has_triton

BLOCK = 1024
# Enough to fill a GPU; their sums are added up in a fixed order.
PROGRAMS = 512


def _by_triton(scores: Tensor) -> bool:
    is_single = scores.dtype == torch.float32 and scores.device.type == "cuda"
    return is_single and has_triton() and 0 < scores.numel() < 2**31


@torch.library.custom_op("lte::separability", mutates_args=())
def separability(scores: Tensor, tau: float, eps: float) -> Tensor:
    if not _by_triton(scores):
        return ((scores - tau).square() + eps).reciprocal().sum()
    from lte_compile.kernels import separability_kernels as kernels  # triton exists on Linux only

    sums = torch.empty(PROGRAMS, dtype=torch.float32, device=scores.device)
    with torch.cuda.device_of(scores):  # type: ignore[no-untyped-call]
        kernels.partial_sums[(PROGRAMS,)](scores.contiguous(), sums, scores.numel(), tau, eps, BLOCK=BLOCK)
    return sums.sum()


@separability.register_fake
def _(scores: Tensor, tau: float, eps: float) -> Tensor:
    return scores.new_empty(())


@torch.library.custom_op("lte::separability_backward", mutates_args=())
def separability_backward(grad: Tensor, scores: Tensor, tau: float, eps: float) -> Tensor:
    """Gradient of the scores."""
    if not _by_triton(scores):
        distance = scores - tau
        return -2 * grad * distance / (distance.square() + eps).square()
    from lte_compile.kernels import separability_kernels as kernels

    scores, out = scores.contiguous(), torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    with torch.cuda.device_of(scores):  # type: ignore[no-untyped-call]
        blocks = -(-scores.numel() // BLOCK)
        kernels.gradients[(blocks,)](grad, scores, out, scores.numel(), tau, eps, BLOCK=BLOCK)
    return out


@separability_backward.register_fake
def _(grad: Tensor, scores: Tensor, tau: float, eps: float) -> Tensor:
    return scores.new_empty(scores.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    scores, ctx.tau, ctx.eps = inputs
    ctx.save_for_backward(scores)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (scores,) = ctx.saved_tensors
    return torch.ops.lte.separability_backward(grad, scores, ctx.tau, ctx.eps), None, None


separability.register_autograd(_backward, setup_context=_setup_context)
register_autocast("separability")
register_autocast("separability_backward")
