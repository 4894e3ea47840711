# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The separability loss of one router's scores in one pass each way; lte_compile.kernels.separability has the formula.

Shape suffixes: B scores of one program's block.
"""

import triton
import triton.language as tl


@triton.jit
def partial_sums(scores_ptr, sums_ptr, count, tau, eps, BLOCK: tl.constexpr):
    """Each program's sum over the blocks that are its turn."""
    sum_B = tl.zeros([BLOCK], tl.float32)
    for start in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
        place_B = start + tl.arange(0, BLOCK)
        distance_B = tl.load(scores_ptr + place_B, mask=place_B < count, other=0.0) - tau
        sum_B += tl.where(place_B < count, 1.0 / (distance_B * distance_B + eps), 0.0)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(sum_B, 0))


@triton.jit
def gradients(grad_ptr, scores_ptr, out_ptr, count, tau, eps, BLOCK: tl.constexpr):
    place_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    distance_B = tl.load(scores_ptr + place_B, mask=place_B < count, other=0.0) - tau
    term_B = 1.0 / (distance_B * distance_B + eps)
    out_B = -2.0 * tl.load(grad_ptr) * distance_B * term_B * term_B
    tl.store(out_ptr + place_B, out_B, mask=place_B < count)
