"""Cross entropy and distance to a teacher of every token, from one pass over the logits.

With a vocabulary of 50,000 the logits of a batch are gigabytes, and torch goes over them, in float32, more than a dozen
times. The kernels read them once for the losses and once for the gradient, and keep nothing else of their size.
Shape suffixes: N tokens, C vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lte_compile.kernels.gated_hidden import TRITON_DTYPES, has_triton

IGNORED = -100
BLOCK, WARPS = 4096, 8
RowLosses = tuple[Tensor, Tensor]


def row_losses(logits_NC: Tensor, labels_N: Tensor, taught_NC: Tensor | None) -> RowLosses:
    """(cross entropy, KL(teacher || model)) in nats, [N] each, in float32 at least; gradients for the logits alone.

    Args:
        labels_N: classes; -100 has a cross entropy of 0.
        taught_NC: the teacher's logits; without them distances are 0.
    """
    if not _by_triton(logits_NC, taught_NC):
        return row_losses_reference(logits_NC, labels_N, taught_NC)
    found: RowLosses = _RowLosses.apply(logits_NC, labels_N, taught_NC)  # type: ignore[no-untyped-call]
    return found


def row_losses_reference(logits_NC: Tensor, labels_N: Tensor, taught_NC: Tensor | None) -> RowLosses:
    """Plain torch."""
    precise = torch.promote_types(logits_NC.dtype, torch.float32)
    learned_NC = logits_NC.to(precise).log_softmax(-1)
    entropy_N = F.nll_loss(learned_NC, labels_N, ignore_index=IGNORED, reduction="none")
    if taught_NC is None:
        return entropy_N, torch.zeros_like(entropy_N)
    taught_NC = taught_NC.to(precise).log_softmax(-1)
    share_NC = taught_NC.exp()
    distance_NC = (share_NC * (taught_NC - learned_NC)).masked_fill(share_NC == 0, 0.0)  # classes ruled out by -inf
    return entropy_N, distance_NC.sum(-1)


def _by_triton(logits_NC: Tensor, taught_NC: Tensor | None) -> bool:
    known = [t for t in (logits_NC, taught_NC) if t is not None]
    return has_triton() and all(t.device.type == "cuda" and t.dtype in TRITON_DTYPES for t in known)


class _RowLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NC: Tensor, labels_N: Tensor, taught_NC: Tensor | None) -> RowLosses:
        from lte_compile.kernels import token_losses_kernels as kernels  # triton exists on Linux only

        logits_NC, labels_N = logits_NC.contiguous(), labels_N.contiguous()
        taught_NC = None if taught_NC is None else taught_NC.contiguous()
        tokens, classes = logits_NC.shape
        entropy_N, learned_lse_N, taught_lse_N = (logits_NC.new_empty(tokens, dtype=torch.float32) for _ in range(3))
        distance_N = torch.zeros_like(entropy_N)
        if tokens:
            with torch.cuda.device_of(logits_NC):  # type: ignore[no-untyped-call]
                results = entropy_N, distance_N, learned_lse_N, taught_lse_N
                kernels.losses[(tokens,)](
                    logits_NC, taught_NC, labels_N, *results, classes, BLOCK=BLOCK, num_warps=WARPS
                )
        ctx.save_for_backward(logits_NC, labels_N, taught_NC, learned_lse_N, taught_lse_N)
        return entropy_N, distance_N

    @staticmethod
    def backward(ctx: Any, *grads_N: Tensor) -> tuple[Tensor, None, None]:
        from lte_compile.kernels import token_losses_kernels as kernels

        logits_NC, labels_N, taught_NC, *lses_N = ctx.saved_tensors
        out_NC = torch.empty_like(logits_NC)
        tokens, classes = logits_NC.shape
        if tokens:
            with torch.cuda.device_of(logits_NC):  # type: ignore[no-untyped-call]
                grads = [grad_N.contiguous() for grad_N in grads_N]
                kernels.gradients[(tokens,)](
                    *grads, logits_NC, taught_NC, labels_N, *lses_N, out_NC, classes, BLOCK=BLOCK, num_warps=WARPS
                )
        return out_NC, None, None
