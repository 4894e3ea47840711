# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The three Triton kernels for one to four tokens; lte_compile.kernels.triton_decode_list says how they work together.

ACTIVATION is a name, or (IS_PROGRAM) the function generated from a region program, which loads its `constants` itself.
DEPENDENT: started before the launch before it has ended (programmatic dependent launch), so that whatever that one
writes is read after gdc_wait, and what it reads is written after that.

Shape suffixes: T tokens (TOKENS: a power of two), D model width (WIDTH: a power of two), F neurons, E experts, R rows
(neurons) and B columns of one step, P pieces of memory.
Interpretable without DEPENDENT (no grid barriers, no inline assembly), Triton 3.6 and later.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lte_compile.kernels.decode_kernels import hidden_of


@triton.jit
def load_tokens(x_ptr, tokens, D: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr):
    token_T = tl.arange(0, TOKENS)
    column_D = tl.arange(0, WIDTH)
    mask_TD = (token_T < tokens)[:, None] & (column_D < D)[None, :]
    return tl.load(x_ptr + token_T[:, None] * D + column_D[None, :], mask=mask_TD, other=0.0).to(tl.float32)


@triton.jit
def score_expert(
    x_ptr,
    router_ptr,
    router_bias_ptr,
    selected_ptr,
    arrived_ptr,
    tau,
    tokens,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    COUNTERS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Which tokens select the program's expert: bit t of selected [E]. The router's row is read ahead of the wait."""
    expert = tl.program_id(0)
    token_T = tl.arange(0, TOKENS)
    column_D = tl.arange(0, WIDTH)
    w_D = tl.load(router_ptr + expert.to(tl.int64) * D + column_D, mask=column_D < D, other=0.0)
    bias = 0.0
    if router_bias_ptr is not None:
        bias = tl.load(router_bias_ptr + expert).to(tl.float32)
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()  # launch 2 takes its places
    x_TD = load_tokens(x_ptr, tokens, D, WIDTH, TOKENS)
    score_T = tl.sum(x_TD * w_D.to(tl.float32)[None, :], 1) + bias
    selects_T = (tl.sigmoid(score_T) > tau) & (token_T < tokens)
    tl.store(selected_ptr + expert, tl.sum(selects_T.to(tl.int32) << token_T, 0))
    for counter in range(expert, COUNTERS, tl.num_programs(0)):  # for launch 3; scratch memory comes unset
        tl.store(arrived_ptr + counter, 0)


@triton.jit
def list_selected(selected_ptr, list_ptr, EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr):
    """Writes the experts that any token selects, in order, to the program's own memory; returns how many there are."""
    expert_E = tl.arange(0, EXPERTS_PADDED)
    is_active_E = tl.load(selected_ptr + expert_E, mask=expert_E < EXPERTS, other=0) != 0
    count_E = tl.cumsum(is_active_E.to(tl.int32), 0)
    tl.store(list_ptr + count_E - 1, expert_E, mask=is_active_E)
    tl.debug_barrier()  # every thread's store comes before any thread's load of the list
    return tl.sum(is_active_E.to(tl.int32), 0)


@triton.jit
def add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def compute_hidden(
    x_ptr,
    selected_ptr,
    lists_ptr,
    up_ptr,
    gate_ptr,
    up_bias_ptr,
    gate_bias_ptr,
    constants,
    hidden_ptr,
    tokens,
    F,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    ROW_STRIDE: tl.constexpr,  # from one neuron to the next in up and gate: 2 D in a projection of interleaved halves
    BIAS_STRIDE: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    EXPERT_SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IS_PROGRAM: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Hidden values [T, F] of the active experts' neurons, zero for tokens that did not select the expert."""
    program = tl.program_id(0)
    token_T = tl.arange(0, TOKENS)
    column_D = tl.arange(0, WIDTH)
    list_ptr = lists_ptr + program * EXPERTS_PADDED
    if DEPENDENT:
        gdc_wait()
    if DEPENDENT == 2:
        gdc_launch_dependents()
    x_TD = load_tokens(x_ptr, tokens, D, WIDTH, TOKENS)
    num_active = list_selected(selected_ptr, list_ptr, EXPERTS, EXPERTS_PADDED)
    for unit in tl.range(program, num_active * EXPERT_SIZE, tl.num_programs(0), num_stages=STAGES):
        expert = tl.load(list_ptr + unit // EXPERT_SIZE)
        neuron = expert * EXPERT_SIZE + unit % EXPERT_SIZE
        neuron_T = neuron + tl.zeros([TOKENS], tl.int32)
        exists_T = neuron_T < F
        # A neuron past the last expert's end is computed as the last one, and not stored: no mask but the row's.
        offset_D = tl.minimum(neuron, F - 1).to(tl.int64) * ROW_STRIDE + column_D
        mask_D = column_D < D
        up_D = tl.load(up_ptr + offset_D, mask=mask_D, other=0.0, eviction_policy="evict_first")
        product_TD = x_TD * up_D.to(tl.float32)[None, :]
        if gate_ptr is not None:
            gate_D = tl.load(gate_ptr + offset_D, mask=mask_D, other=0.0, eviction_policy="evict_first")
            up_T, gate_T = tl.reduce((product_TD, x_TD * gate_D.to(tl.float32)[None, :]), 1, add_pairs)
        else:
            up_T = tl.sum(product_TD, 1)
            gate_T = up_T
        if up_bias_ptr is not None:
            up_T += tl.load(up_bias_ptr + neuron_T * BIAS_STRIDE, mask=exists_T, other=0.0).to(tl.float32)
        if gate_ptr is not None and gate_bias_ptr is not None:
            gate_T += tl.load(gate_bias_ptr + neuron_T * BIAS_STRIDE, mask=exists_T, other=0.0).to(tl.float32)
        hidden_T = hidden_of(up_T, gate_T, constants, neuron_T, exists_T, ACTIVATION, IS_PROGRAM, gate_ptr is not None)
        if TOKENS > 1:
            selects_T = (tl.load(selected_ptr + expert) >> token_T) & 1
            hidden_T = tl.where(selects_T != 0, hidden_T, 0.0)
        tl.store(hidden_ptr + token_T * F + neuron_T, hidden_T, mask=(token_T < tokens) & exists_T)


@triton.jit
def load_rows(
    first, num_active, list_ptr, down_ptr, column_B, F, D: tl.constexpr, EXPERT_SIZE: tl.constexpr, ROWS: tl.constexpr
):
    """ROWS neurons of the list from `first` on: their numbers, whether they exist, their weights."""
    unit_R = first + tl.arange(0, ROWS)
    listed_R = unit_R < num_active * EXPERT_SIZE
    neuron_R = tl.load(list_ptr + unit_R // EXPERT_SIZE, mask=listed_R, other=0) * EXPERT_SIZE + unit_R % EXPERT_SIZE
    exists_R = listed_R & (neuron_R < F)
    w_RB = tl.load(
        down_ptr + neuron_R[:, None].to(tl.int64) * D + column_B[None, :],
        mask=exists_R[:, None] & (column_B < D)[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )
    return neuron_R, exists_R, w_RB


@triton.jit
def add_rows(sum_RB, hidden_ptr, rows, tokens, F, TOKENS: tl.constexpr):
    """sum_RB (sum_TRB for several tokens) and the products of some rows' weights with the hidden values."""
    neuron_R, exists_R, w_RB = rows
    if TOKENS == 1:
        hidden_R = tl.load(hidden_ptr + neuron_R, mask=exists_R, other=0.0)
        sum_RB += hidden_R[:, None] * w_RB.to(tl.float32)
    else:
        token_T = tl.arange(0, TOKENS)
        place_TR = token_T[:, None] * F + neuron_R[None, :]
        hidden_TR = tl.load(hidden_ptr + place_TR, mask=(token_T < tokens)[:, None] & exists_R[None, :], other=0.0)
        sum_RB += hidden_TR[:, :, None] * w_RB.to(tl.float32)[None, :, :]
    return sum_RB


@triton.jit
def project_down(
    hidden_ptr,
    selected_ptr,
    lists_ptr,
    down_ptr,
    down_bias_ptr,
    partial_ptr,
    arrived_ptr,
    y_ptr,
    tokens,
    F,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    EXPERT_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A block of columns of y [T, D] over this split's share of the active neurons."""
    block, split = tl.program_id(0), tl.program_id(1)
    column_B = block * BLOCK + tl.arange(0, BLOCK)
    token_T = tl.arange(0, TOKENS)
    list_ptr = lists_ptr + (split * tl.num_programs(0) + block) * EXPERTS_PADDED
    if DEPENDENT == 3:
        gdc_launch_dependents()  # what comes after this layer takes its places as these programs leave theirs
    if DEPENDENT == 1:
        gdc_wait()
    num_active = list_selected(selected_ptr, list_ptr, EXPERTS, EXPERTS_PADDED)
    rows = load_rows(split * ROWS, num_active, list_ptr, down_ptr, column_B, F, D, EXPERT_SIZE, ROWS)
    if DEPENDENT >= 2:
        gdc_wait()
    sum_TRB = tl.zeros([ROWS, BLOCK] if TOKENS == 1 else [TOKENS, ROWS, BLOCK], tl.float32)
    sum_TRB = add_rows(sum_TRB, hidden_ptr, rows, tokens, F, TOKENS)
    for first in tl.range((split + SPLITS) * ROWS, num_active * EXPERT_SIZE, SPLITS * ROWS, num_stages=STAGES):
        rows = load_rows(first, num_active, list_ptr, down_ptr, column_B, F, D, EXPERT_SIZE, ROWS)
        sum_TRB = add_rows(sum_TRB, hidden_ptr, rows, tokens, F, TOKENS)
    y_TB = tl.sum(sum_TRB, 0)[None, :] if TOKENS == 1 else tl.sum(sum_TRB, 1)

    place_TB = token_T[:, None] * D + column_B[None, :]
    mask_TB = (token_T < tokens)[:, None] & (column_B < D)[None, :]
    is_last = True
    if SPLITS > 1:
        tl.store(partial_ptr + split * tokens * D + place_TB, y_TB, mask=mask_TB)
        tl.debug_barrier()  # every thread's store comes before the one thread's release below
        is_last = tl.atomic_add(arrived_ptr + block, 1, sem="acq_rel") == SPLITS - 1
        if is_last:
            y_TB = tl.zeros([TOKENS, BLOCK], tl.float32)
            for other in tl.static_range(SPLITS):  # in a fixed order
                part_ptr = partial_ptr + other * tokens * D
                y_TB += tl.load(part_ptr + place_TB, mask=mask_TB, other=0.0, cache_modifier=".cg")
    if is_last:
        if down_bias_ptr is not None:
            y_TB += tl.load(down_bias_ptr + column_B, mask=column_B < D, other=0.0).to(tl.float32)[None, :]
        tl.store(y_ptr + place_TB, y_TB.to(y_ptr.dtype.element_ty), mask=mask_TB)
