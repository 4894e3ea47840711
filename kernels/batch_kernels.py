# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The three Triton kernels for a few tokens; lte_compile.kernels.triton_batch says how they work together.

ACTIVATION is a name, or (IS_PROGRAM) the function generated from a region program, which loads its `constants` itself.
DEPENDENT: launched before the launch before it has ended (programmatic dependent launch), for which it waits first.

Shape suffixes: T tokens (padded to a power of two), D model width, K columns of one step of a sum over D, F neurons,
E experts (of a block), N neurons of one program, B columns of one program, S parts of a sum over D.
Interpretable (no grid barriers, no inline assembly), Triton 3.6 and later. Products are exact or rounded as IEEE says:
tl.dot takes fp16 and bf16 operands as they are and never turns fp32 into tf32.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lte_compile.kernels.decode_kernels import hidden_of, list_active, nth_active


@triton.jit
def dot(a, b, sum_):
    """sum_ + a b, accumulated in fp32."""
    return tl.dot(a, b, sum_, input_precision="ieee")


@triton.jit
def score_parts(
    x_ptr,
    router_ptr,
    parts_ptr,
    arrived_ptr,
    tokens,
    D: tl.constexpr,
    EXPERTS: tl.constexpr,
    COUNTERS: tl.constexpr,
    SPAN: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """Part s of every score of a block of experts: the sum over D's columns [s SPAN, (s + 1) SPAN). parts [E, S, T]."""
    if DEPENDENT:
        gdc_wait()
    program, part = tl.program_id(0), tl.program_id(1)
    number = program * tl.num_programs(1) + part
    for counter in range(number, COUNTERS, tl.num_programs(0) * tl.num_programs(1)):  # for launch 3
        tl.store(arrived_ptr + counter, 0)
    token_T = tl.arange(0, TOKENS)
    expert_E = program * BLOCK_EXPERTS + tl.arange(0, BLOCK_EXPERTS)
    sum_TE = tl.zeros([TOKENS, BLOCK_EXPERTS], tl.float32)
    for start in tl.range(part * SPAN, (part + 1) * SPAN, BLOCK, num_stages=STAGES):
        column_K = start + tl.arange(0, BLOCK)
        x_TK = tl.load(
            x_ptr + token_T[:, None].to(tl.int64) * D + column_K[None, :],
            mask=(token_T < tokens)[:, None] & (column_K < D)[None, :],
            other=0.0,
        )
        w_EK = tl.load(
            router_ptr + expert_E[:, None].to(tl.int64) * D + column_K[None, :],
            mask=(expert_E < EXPERTS)[:, None] & (column_K < D)[None, :],
            other=0.0,
        )
        if UPCAST:
            x_TK, w_EK = x_TK.to(tl.float32), w_EK.to(tl.float32)
        sum_TE = dot(x_TK, tl.trans(w_EK), sum_TE)
    place_TE = (expert_E[None, :] * tl.num_programs(1) + part) * tokens + token_T[:, None]
    tl.store(parts_ptr + place_TE, sum_TE, mask=(token_T < tokens)[:, None] & (expert_E < EXPERTS)[None, :])


@triton.jit
def gate_up(
    x_ptr,
    parts_ptr,
    router_bias_ptr,
    up_ptr,
    gate_ptr,
    up_bias_ptr,
    gate_bias_ptr,
    constants,
    hidden_ptr,
    active_ptr,
    tau,
    tokens,
    F,
    D: tl.constexpr,
    EXPERT_SIZE: tl.constexpr,
    SCORE_PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IS_PROGRAM: tl.constexpr,
    TOKENS: tl.constexpr,
    NEURONS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """Hidden values of some neurons of one expert for all tokens, zero where a token did not select the expert."""
    if DEPENDENT:
        gdc_wait()
    program = tl.program_id(0)
    parts: tl.constexpr = (EXPERT_SIZE + NEURONS - 1) // NEURONS
    expert = program // parts
    part = program % parts
    token_T = tl.arange(0, TOKENS)
    score_T = tl.zeros([TOKENS], tl.float32)
    for index in range(SCORE_PARTS):  # in a fixed order
        score_T += tl.load(
            parts_ptr + (expert * SCORE_PARTS + index) * tokens + token_T, mask=token_T < tokens, other=0.0
        )
    if router_bias_ptr is not None:
        score_T += tl.load(router_bias_ptr + expert).to(tl.float32)
    selects_T = (tl.sigmoid(score_T) > tau) & (token_T < tokens)
    is_active = tl.max(selects_T.to(tl.int32), 0)
    if part == 0:
        tl.store(active_ptr + expert, is_active)

    if is_active != 0:
        in_expert_N = part * NEURONS + tl.arange(0, NEURONS)
        neuron_N = expert * EXPERT_SIZE + in_expert_N
        exists_N = (in_expert_N < EXPERT_SIZE) & (neuron_N < F)
        up_TN = tl.zeros([TOKENS, NEURONS], tl.float32)
        gate_TN = tl.zeros([TOKENS, NEURONS], tl.float32)
        for start in tl.range(0, D, BLOCK, num_stages=STAGES):
            column_K = start + tl.arange(0, BLOCK)
            x_TK = tl.load(
                x_ptr + token_T[:, None].to(tl.int64) * D + column_K[None, :],
                mask=(token_T < tokens)[:, None] & (column_K < D)[None, :],
                other=0.0,
            ).to(up_ptr.dtype.element_ty)
            offset_NK = neuron_N[:, None].to(tl.int64) * D + column_K[None, :]
            mask_NK = exists_N[:, None] & (column_K < D)[None, :]
            w_up_NK = tl.load(up_ptr + offset_NK, mask=mask_NK, other=0.0, eviction_policy="evict_first")
            up_TN = dot(x_TK, tl.trans(w_up_NK), up_TN)
            if gate_ptr is not None:
                w_gate_NK = tl.load(gate_ptr + offset_NK, mask=mask_NK, other=0.0, eviction_policy="evict_first")
                gate_TN = dot(x_TK, tl.trans(w_gate_NK), gate_TN)
        if up_bias_ptr is not None:
            up_TN += tl.load(up_bias_ptr + neuron_N, mask=exists_N, other=0.0).to(tl.float32)[None, :]
        if gate_ptr is not None and gate_bias_ptr is not None:
            gate_TN += tl.load(gate_bias_ptr + neuron_N, mask=exists_N, other=0.0).to(tl.float32)[None, :]
        hidden_TN = hidden_of(
            up_TN,
            gate_TN,
            constants,
            neuron_N[None, :],
            exists_N[None, :],
            ACTIVATION,
            IS_PROGRAM,
            gate_ptr is not None,
        )
        hidden_TN = tl.where(selects_T[:, None], hidden_TN, 0.0)
        tl.store(
            hidden_ptr + token_T[:, None].to(tl.int64) * F + neuron_N[None, :],
            hidden_TN.to(hidden_ptr.dtype.element_ty),
            mask=(token_T < tokens)[:, None] & exists_N[None, :],
        )


@triton.jit
def down(
    hidden_ptr,
    active_ptr,
    down_ptr,
    down_bias_ptr,
    partial_ptr,
    arrived_ptr,
    y_ptr,
    tokens,
    F,
    D: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    EXPERT_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    NEURONS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """A block of columns of y for all tokens, over this split's share of the active experts' neurons."""
    if DEPENDENT == 2:
        gdc_launch_dependents()
    if DEPENDENT:
        gdc_wait()
    block, split = tl.program_id(0), tl.program_id(1)
    token_T = tl.arange(0, TOKENS)
    column_B = block * BLOCK + tl.arange(0, BLOCK)
    active_E, position_E = list_active(active_ptr, EXPERTS, EXPERTS_PADDED)
    num_active = tl.sum(active_E, 0)

    parts: tl.constexpr = (EXPERT_SIZE + NEURONS - 1) // NEURONS
    sum_TB = tl.zeros([TOKENS, BLOCK], tl.float32)
    for unit in tl.range(split, num_active * parts, SPLITS, num_stages=STAGES):
        expert = nth_active(unit // parts, active_E, position_E, EXPERTS_PADDED)
        in_expert_N = (unit % parts) * NEURONS + tl.arange(0, NEURONS)
        neuron_N = expert * EXPERT_SIZE + in_expert_N
        exists_N = (in_expert_N < EXPERT_SIZE) & (neuron_N < F)
        hidden_TN = tl.load(
            hidden_ptr + token_T[:, None].to(tl.int64) * F + neuron_N[None, :],
            mask=(token_T < tokens)[:, None] & exists_N[None, :],
            other=0.0,
        )
        w_NB = tl.load(
            down_ptr + neuron_N[:, None].to(tl.int64) * D + column_B[None, :],
            mask=exists_N[:, None] & (column_B < D)[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        sum_TB = dot(hidden_TN, w_NB, sum_TB)

    place_TB = token_T[:, None] * D + column_B[None, :]
    mask_TB = (token_T < tokens)[:, None] & (column_B < D)[None, :]
    tl.store(partial_ptr + split * tokens * D + place_TB, sum_TB, mask=mask_TB)
    tl.debug_barrier()  # every thread's store comes before the one thread's release below
    arrived = tl.atomic_add(arrived_ptr + block, 1, sem="acq_rel")
    if arrived == SPLITS - 1:
        y_TB = tl.zeros([TOKENS, BLOCK], tl.float32)
        for other in range(SPLITS):
            part_ptr = partial_ptr + other * tokens * D
            y_TB += tl.load(part_ptr + place_TB, mask=mask_TB, other=0.0, cache_modifier=".cg")
        if down_bias_ptr is not None:
            y_TB += tl.load(down_bias_ptr + column_B, mask=column_B < D, other=0.0).to(tl.float32)[None, :]
        tl.store(y_ptr + place_TB, y_TB.to(y_ptr.dtype.element_ty), mask=mask_TB)
