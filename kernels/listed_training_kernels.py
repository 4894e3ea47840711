# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Products over the tokens that each expert serves; lte_compile.kernels.triton_listed_training says what for.

Both take one or two matrices of the FFN at once (up and gate, or down alone), so that tokens' rows are read once.

Shape suffixes: T tokens, D model width, F neurons, E experts; M listed tokens of a tile, N neurons of a tile, J columns
of one or two matrices in turn (N or 2 N), K columns of one step of a sum over D, C columns of a tile.
Interpretable (no inline assembly), Triton 3.6 and later. Accumulates in fp32; tl.dot never turns fp32 into tf32.
"""

import triton
import triton.language as tl


@triton.jit
def listed_rows(
    rows_ptr,
    lists_ptr,
    counts_ptr,
    first_w_ptr,
    second_w_ptr,
    first_bias_ptr,
    second_bias_ptr,
    first_out_ptr,
    second_out_ptr,
    tokens,
    F,
    D: tl.constexpr,
    NEURON_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    EXPERT_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    NEURONS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out[token, neuron] = rows[token] . w[neuron] + bias[neuron] for every expert's neurons and listed tokens.

    Entries of other tokens are left as they are. A program is a block of one expert's list; it ends at once if the list
    is shorter. Rows of two matrices take turns in one operand: a product of twice the width.
    """
    matrices: tl.constexpr = 1 if second_w_ptr is None else 2
    parts: tl.constexpr = (EXPERT_SIZE + NEURONS - 1) // NEURONS
    blocks = (tokens + TOKENS - 1) // TOKENS
    unit = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    expert = unit // parts
    count = tl.load(counts_ptr + expert)
    if block * TOKENS < count:
        place_M = block * TOKENS + tl.arange(0, TOKENS)
        listed_M = place_M < count
        token_M = tl.load(lists_ptr + expert.to(tl.int64) * tokens + place_M, mask=listed_M, other=0).to(tl.int64)
        row_J = tl.arange(0, matrices * NEURONS)
        in_expert_J = (unit % parts) * NEURONS + row_J // matrices
        neuron_J = expert * EXPERT_SIZE + in_expert_J
        exists_J = (in_expert_J < EXPERT_SIZE) & (neuron_J < F)
        w_ptr_J = first_w_ptr + neuron_J.to(tl.int64) * NEURON_STRIDE
        if second_w_ptr is not None:
            w_ptr_J = tl.where(row_J % 2 == 0, w_ptr_J, second_w_ptr + neuron_J.to(tl.int64) * NEURON_STRIDE)
        sum_MJ = tl.zeros([TOKENS, matrices * NEURONS], tl.float32)
        for start in tl.range(0, D, BLOCK, num_stages=STAGES):
            column_K = start + tl.arange(0, BLOCK)
            mask_MK, mask_JK = listed_M[:, None], exists_J[:, None]
            if D % BLOCK != 0:
                mask_MK, mask_JK = mask_MK & (column_K < D)[None, :], mask_JK & (column_K < D)[None, :]
            row_MK = tl.load(rows_ptr + token_M[:, None] * D + column_K[None, :], mask=mask_MK, other=0.0)
            w_JK = tl.load(w_ptr_J[:, None] + column_K[None, :].to(tl.int64) * COLUMN_STRIDE, mask=mask_JK, other=0.0)
            sum_MJ = tl.dot(row_MK, tl.trans(w_JK), sum_MJ, input_precision="ieee")
        in_expert_N = (unit % parts) * NEURONS + tl.arange(0, NEURONS)
        neuron_N = expert * EXPERT_SIZE + in_expert_N
        exists_N = (in_expert_N < EXPERT_SIZE) & (neuron_N < F)
        place_MN = token_M[:, None] * F + neuron_N[None, :]
        mask_MN = listed_M[:, None] & exists_N[None, :]
        if second_w_ptr is None:
            first_MN = sum_MJ
        else:
            first_MN, second_MN = tl.split(tl.reshape(sum_MJ, [TOKENS, NEURONS, 2]))
            if second_bias_ptr is not None:
                second_MN += tl.load(second_bias_ptr + neuron_N, mask=exists_N, other=0.0).to(tl.float32)[None, :]
            tl.store(second_out_ptr + place_MN, second_MN.to(second_out_ptr.dtype.element_ty), mask=mask_MN)
        if first_bias_ptr is not None:
            first_MN += tl.load(first_bias_ptr + neuron_N, mask=exists_N, other=0.0).to(tl.float32)[None, :]
        tl.store(first_out_ptr + place_MN, first_MN.to(first_out_ptr.dtype.element_ty), mask=mask_MN)


@triton.jit
def listed_outer(
    rows_ptr,
    lists_ptr,
    counts_ptr,
    first_ptr,
    second_ptr,
    first_out_ptr,
    second_out_ptr,
    tokens,
    F,
    D: tl.constexpr,
    NEURON_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERT_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    NEURONS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out[neuron] = sum over its expert's listed tokens of value[token, neuron] rows[token], in the order of the list.

    A program owns some neurons of an expert and a block of columns: nothing is added up between programs. Blocks of
    columns come one after the other, so that the columns of all tokens that programs share at a time stay in L2.
    """
    parts: tl.constexpr = (EXPERT_SIZE + NEURONS - 1) // NEURONS
    unit = tl.program_id(0) % (EXPERTS * parts)
    column_C = tl.program_id(0) // (EXPERTS * parts) * BLOCK + tl.arange(0, BLOCK)
    expert = unit // parts
    count = tl.load(counts_ptr + expert)
    list_ptr = lists_ptr + expert.to(tl.int64) * tokens
    in_expert_N = (unit % parts) * NEURONS + tl.arange(0, NEURONS)
    neuron_N = expert * EXPERT_SIZE + in_expert_N
    exists_N = (in_expert_N < EXPERT_SIZE) & (neuron_N < F)
    first_CN = tl.zeros([BLOCK, NEURONS], tl.float32)
    second_CN = tl.zeros([BLOCK, NEURONS], tl.float32)
    for start in tl.range(0, count, TOKENS, num_stages=STAGES):
        place_M = start + tl.arange(0, TOKENS)
        listed_M = place_M < count
        token_M = tl.load(list_ptr + place_M, mask=listed_M, other=0).to(tl.int64)
        mask_MC = listed_M[:, None]
        if D % BLOCK != 0:
            mask_MC = mask_MC & (column_C < D)[None, :]
        row_MC = tl.load(rows_ptr + token_M[:, None] * D + column_C[None, :], mask=mask_MC, other=0.0)
        place_MN = token_M[:, None] * F + neuron_N[None, :]
        mask_MN = listed_M[:, None] & exists_N[None, :]
        first_MN = tl.load(first_ptr + place_MN, mask=mask_MN, other=0.0)
        first_CN = tl.dot(tl.trans(row_MC), first_MN, first_CN, input_precision="ieee")
        if second_ptr is not None:
            second_MN = tl.load(second_ptr + place_MN, mask=mask_MN, other=0.0)
            second_CN = tl.dot(tl.trans(row_MC), second_MN, second_CN, input_precision="ieee")
    place_CN = neuron_N[None, :].to(tl.int64) * NEURON_STRIDE + column_C[:, None].to(tl.int64) * COLUMN_STRIDE
    mask_CN = exists_N[None, :] & (column_C < D)[:, None]
    tl.store(first_out_ptr + place_CN, first_CN.to(first_out_ptr.dtype.element_ty), mask=mask_CN)
    if second_ptr is not None:
        tl.store(second_out_ptr + place_CN, second_CN.to(second_out_ptr.dtype.element_ty), mask=mask_CN)
