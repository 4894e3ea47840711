# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The Triton kernels for many tokens that multiply; .triton_prefill and .fused_up say how they are used.

ACTIVATION is a name, or (IS_PROGRAM) the function generated from a region program, which loads its `constants` itself.

Shape suffixes: T tokens, D model width, F neurons, E experts; M tokens of a tile, N neurons of a tile, R experts of a
tile, J rows of up and gate in turn (2 N, or N in a plain FFN), K columns of one step of a sum over D.
Interpretable (no inline assembly), Triton 3.6 and later. Products are exact or rounded as IEEE says: tl.dot takes fp16
and bf16 operands as they are and never turns fp32 into tf32.
"""

import triton
import triton.language as tl

from lte_compile.kernels.decode_kernels import hidden_of
from lte_compile.kernels.token_lists import selects


@triton.jit
def product_tile(
    x_ptr,
    up_ptr,
    gate_ptr,
    router_ptr,
    token_M,
    reads_M,
    first_neuron,
    past_neuron,
    expert_R,
    reads_R,
    D: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    NEURONS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sums [M, J] of some tokens' up and gate, and [M, R] of some experts' logits if there is a router, in fp32.

    The rows of up and gate take turns in one operand: one product of twice the width, whose columns 2 n and 2 n + 1
    lie in the same thread, so that nothing moves between threads when they are parted.
    """
    MATRICES: tl.constexpr = 1 if gate_ptr is None else 2
    row_J = tl.arange(0, MATRICES * NEURONS)
    neuron_J = first_neuron + row_J // MATRICES
    start_J = neuron_J.to(tl.int64) * ROW_STRIDE
    w_ptr_J = up_ptr + start_J
    if gate_ptr is not None:
        w_ptr_J = tl.where(row_J % 2 == 0, w_ptr_J, gate_ptr + start_J)
    x_ptr_M = x_ptr + token_M.to(tl.int64) * D
    exists_J = neuron_J < past_neuron
    sum_MJ = tl.zeros([TOKENS, MATRICES * NEURONS], tl.float32)
    logit_MR = tl.zeros([TOKENS, expert_R.shape[0]], tl.float32)
    for start in tl.range(0, D, BLOCK, num_stages=STAGES):
        column_K = start + tl.arange(0, BLOCK)
        if D % BLOCK == 0:
            mask_MK, mask_JK, mask_RK = reads_M[:, None], exists_J[:, None], reads_R[:, None]
        else:
            in_row_1K = (column_K < D)[None, :]
            mask_MK, mask_JK = reads_M[:, None] & in_row_1K, exists_J[:, None] & in_row_1K
            mask_RK = reads_R[:, None] & in_row_1K
        x_MK = tl.load(x_ptr_M[:, None] + column_K[None, :], mask=mask_MK, other=0.0)
        w_JK = tl.load(w_ptr_J[:, None] + column_K[None, :], mask=mask_JK, other=0.0)
        sum_MJ = tl.dot(x_MK, tl.trans(w_JK), sum_MJ, input_precision="ieee")
        if router_ptr is not None:
            r_RK = tl.load(router_ptr + expert_R[:, None] * D + column_K[None, :], mask=mask_RK, other=0.0)
            logit_MR = tl.dot(x_MK, tl.trans(r_RK), logit_MR, input_precision="ieee")
    return sum_MJ, logit_MR


@triton.jit
def hidden_of_sums(
    sum_MJ,
    up_bias_ptr,
    gate_bias_ptr,
    constants,
    first_neuron,
    past_neuron,
    GATED: tl.constexpr,
    BIAS_STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IS_PROGRAM: tl.constexpr,
    TOKENS: tl.constexpr,
    NEURONS: tl.constexpr,
):
    """Hidden values [M, N] in fp32, of the sums of a `product_tile`."""
    neuron_N = first_neuron + tl.arange(0, NEURONS)
    exists_N = neuron_N < past_neuron
    if GATED:
        up_MN, gate_MN = tl.split(tl.reshape(sum_MJ, [TOKENS, NEURONS, 2]))
        if gate_bias_ptr is not None:
            gate_MN += tl.load(gate_bias_ptr + neuron_N * BIAS_STRIDE, mask=exists_N, other=0.0).to(tl.float32)[None, :]
    else:
        up_MN = sum_MJ
        gate_MN = up_MN
    if up_bias_ptr is not None:
        up_MN += tl.load(up_bias_ptr + neuron_N * BIAS_STRIDE, mask=exists_N, other=0.0).to(tl.float32)[None, :]
    neuron_1N, exists_1N = neuron_N[None, :], exists_N[None, :]
    return hidden_of(up_MN, gate_MN, constants, neuron_1N, exists_1N, ACTIVATION, IS_PROGRAM, GATED)


@triton.jit
def tiles_before(counts_ptr, EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, TOKENS: tl.constexpr):
    """How many tiles of tokens the experts up to each one (included) have."""
    expert_E = tl.arange(0, EXPERTS_PADDED)
    count_E = tl.load(counts_ptr + expert_E, mask=expert_E < EXPERTS, other=0)
    return tl.cumsum((count_E + TOKENS - 1) // TOKENS, 0)


@triton.jit
def listed_up(
    x_ptr,
    lists_ptr,
    counts_ptr,
    up_ptr,
    gate_ptr,
    up_bias_ptr,
    gate_bias_ptr,
    constants,
    hidden_ptr,
    tokens,
    F,
    D: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    BIAS_STRIDE: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    EXPERT_SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IS_PROGRAM: tl.constexpr,
    TOKENS: tl.constexpr,
    NEURONS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Hidden values of every expert for the tokens of its list, scattered into [T, F].

    A tile is some tokens of one expert's list by some of its neurons. Programs take tiles in turn, expert by expert, so
    that the programs that run together share the experts' weights and, as lists ascend, regions of x.
    """
    parts: tl.constexpr = (EXPERT_SIZE + NEURONS - 1) // NEURONS
    before_E = tiles_before(counts_ptr, EXPERTS, EXPERTS_PADDED, TOKENS)
    total = tl.max(before_E, 0) * parts
    expert_E = tl.arange(0, EXPERTS_PADDED)
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        block = tile // parts
        expert = tl.sum((before_E <= block).to(tl.int32), 0)
        first_tile = tl.max(tl.where(expert_E < expert, before_E, 0), 0)
        place_M = (block - first_tile) * TOKENS + tl.arange(0, TOKENS)
        listed_M = place_M < tl.load(counts_ptr + expert)
        token_M = tl.load(lists_ptr + expert.to(tl.int64) * tokens + place_M, mask=listed_M, other=0)
        first_neuron = expert * EXPERT_SIZE + (tile % parts) * NEURONS
        past_neuron = tl.minimum((expert + 1) * EXPERT_SIZE, F)
        sum_MJ, _ = product_tile(
            x_ptr,
            up_ptr,
            gate_ptr,
            None,
            token_M,
            listed_M,
            first_neuron,
            past_neuron,
            expert_E,
            expert_E < 0,
            D,
            ROW_STRIDE,
            TOKENS,
            NEURONS,
            BLOCK,
            STAGES,
        )
        hidden_MN = hidden_of_sums(
            sum_MJ,
            up_bias_ptr,
            gate_bias_ptr,
            constants,
            first_neuron,
            past_neuron,
            gate_ptr is not None,
            BIAS_STRIDE,
            ACTIVATION,
            IS_PROGRAM,
            TOKENS,
            NEURONS,
        )
        neuron_N = first_neuron + tl.arange(0, NEURONS)
        place_MN = token_M[:, None].to(tl.int64) * F + neuron_N[None, :]
        mask_MN = listed_M[:, None] & (neuron_N < past_neuron)[None, :]
        tl.store(hidden_ptr + place_MN, hidden_MN.to(hidden_ptr.dtype.element_ty), mask=mask_MN)


@triton.jit
def routed_up(
    x_ptr,
    router_ptr,
    router_bias_ptr,
    up_ptr,
    gate_ptr,
    up_bias_ptr,
    gate_bias_ptr,
    constants,
    hidden_ptr,
    tau,
    tokens,
    F,
    D: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    BIAS_STRIDE: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERT_SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IS_PROGRAM: tl.constexpr,
    TOKENS: tl.constexpr,
    NEURONS: tl.constexpr,
    ROUTED: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Every hidden value [T, F], zero where the token did not select the expert: router, up and gate in one launch.

    A program takes a tile of tokens by neurons, and computes the scores of the experts that these neurons belong to
    (R of them, padded to what a tensor core takes) from the same x. A product with zeros and ones hands each neuron its
    expert's decision.
    """
    token_M = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    reads_M = token_M < tokens
    first_neuron = tl.program_id(0) * NEURONS
    expert_R = first_neuron // EXPERT_SIZE + tl.arange(0, ROUTED)
    exists_R = expert_R < EXPERTS
    sum_MJ, logit_MR = product_tile(
        x_ptr,
        up_ptr,
        gate_ptr,
        router_ptr,
        token_M,
        reads_M,
        first_neuron,
        F,
        expert_R,
        exists_R,
        D,
        ROW_STRIDE,
        TOKENS,
        NEURONS,
        BLOCK,
        STAGES,
    )
    hidden_MN = hidden_of_sums(
        sum_MJ,
        up_bias_ptr,
        gate_bias_ptr,
        constants,
        first_neuron,
        F,
        gate_ptr is not None,
        BIAS_STRIDE,
        ACTIVATION,
        IS_PROGRAM,
        TOKENS,
        NEURONS,
    )
    neuron_N = first_neuron + tl.arange(0, NEURONS)
    selects_MR = selects(logit_MR, router_bias_ptr, expert_R[None, :], exists_R[None, :], tau, True)
    owns_RN = expert_R[:, None] == (neuron_N // EXPERT_SIZE)[None, :]
    half: tl.constexpr = hidden_ptr.dtype.element_ty
    keeps_MN = tl.dot(selects_MR.to(half), owns_RN.to(half), input_precision="ieee") > 0
    place_MN = token_M[:, None].to(tl.int64) * F + neuron_N[None, :]
    mask_MN = reads_M[:, None] & (neuron_N < F)[None, :]
    tl.store(hidden_ptr + place_MN, tl.where(keeps_MN, hidden_MN, 0.0).to(half), mask=mask_MN)
