# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Triton kernels of lte_compile.kernels.token_losses: one program a token, one pass over its logits.

Shape suffixes: N tokens, C vocabulary.
"""

import triton
import triton.language as tl

IGNORED = tl.constexpr(-100)
LOWEST = tl.constexpr(-1e30)  # not -inf, whose differences are no numbers


@triton.jit
def losses(
    logits_ptr, taught_ptr, labels_ptr, entropy_ptr, distance_ptr, learned_lse_ptr, taught_lse_ptr, C,
    BLOCK: tl.constexpr
):  # fmt: skip
    """Cross entropy [N] and KL(teacher || model) [N], and the log-sum-exp of both rows of logits."""
    row = tl.program_id(0)
    at = row.to(tl.int64) * C
    columns = tl.arange(0, BLOCK)
    highest, total = tl.full((), LOWEST, tl.float32), tl.full((), 0.0, tl.float32)
    taught_highest, taught_total, difference = highest, total, total
    for start in range(0, C, BLOCK):
        inside = start + columns < C
        learned = tl.load(logits_ptr + at + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        new = tl.maximum(highest, tl.max(learned, 0))
        total = total * tl.exp(highest - new) + tl.sum(tl.exp(learned - new), 0)
        highest = new
        if taught_ptr is not None:
            taught = tl.load(taught_ptr + at + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
            new = tl.maximum(taught_highest, tl.max(taught, 0))
            scale = tl.exp(taught_highest - new)
            share = tl.exp(taught - new)
            taught_total = taught_total * scale + tl.sum(share, 0)
            difference = difference * scale + tl.sum(tl.where(share > 0.0, share * (taught - learned), 0.0), 0)
            taught_highest = new
    lse = highest + tl.log(total)
    tl.store(learned_lse_ptr + row, lse)
    label = tl.load(labels_ptr + row)
    of_label = tl.load(logits_ptr + at + label, mask=label != IGNORED, other=0.0).to(tl.float32)
    tl.store(entropy_ptr + row, tl.where(label != IGNORED, lse - of_label, 0.0))
    if taught_ptr is not None:
        taught_lse = taught_highest + tl.log(taught_total)
        tl.store(taught_lse_ptr + row, taught_lse)
        tl.store(distance_ptr + row, difference / taught_total - taught_lse + lse)


@triton.jit
def gradients(
    grad_entropy_ptr, grad_distance_ptr, logits_ptr, taught_ptr, labels_ptr, learned_lse_ptr, taught_lse_ptr, out_ptr,
    C, BLOCK: tl.constexpr
):  # fmt: skip
    """Of the logits [N, C], from those of both losses [N]."""
    row = tl.program_id(0)
    at = row.to(tl.int64) * C
    columns = tl.arange(0, BLOCK)
    label = tl.load(labels_ptr + row)
    of_entropy = tl.where(label != IGNORED, tl.load(grad_entropy_ptr + row), 0.0)
    lse = tl.load(learned_lse_ptr + row)
    of_model = of_entropy
    if taught_ptr is not None:
        of_distance = tl.load(grad_distance_ptr + row)
        taught_lse = tl.load(taught_lse_ptr + row)
        of_model += of_distance
    for start in range(0, C, BLOCK):
        inside = start + columns < C
        learned = tl.load(logits_ptr + at + start + columns, mask=inside, other=0.0).to(tl.float32)
        gradient = of_model * tl.exp(learned - lse) - tl.where(start + columns == label, of_entropy, 0.0)
        if taught_ptr is not None:
            taught = tl.load(taught_ptr + at + start + columns, mask=inside, other=0.0).to(tl.float32)
            gradient -= of_distance * tl.exp(taught - taught_lse)
        tl.store(out_ptr + at + start + columns, gradient.to(out_ptr.dtype.element_ty), mask=inside)
