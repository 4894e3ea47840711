# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The two Triton kernels for one token that selects nearly every expert; lte_compile.kernels.triton_decode_whole says
how they work together.

ACTIVATION is a name, or (IS_PROGRAM) the function generated from a region program, which loads its `constants` itself.
DEPENDENT: started before the launch before it has ended (programmatic dependent launch). Weights are read ahead of
gdc_wait; what other launches write is read, and anything is written, after it.

Shape suffixes: D model width, C columns that the router reads, F neurons, E experts, R rows and B columns of one step.
Interpretable without DEPENDENT (no grid barriers, no inline assembly), Triton 3.6 and later.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lte_compile.kernels.decode_kernels import hidden_of
from lte_compile.kernels.decode_list_kernels import add_pairs


@triton.jit
def load_rows(matrix_ptr, row_R, exists_R, stride, column_B, past_column):
    """Weights [R, B] of some rows of a matrix; nothing reads them twice."""
    return tl.load(
        matrix_ptr + row_R[:, None].to(tl.int64) * stride + column_B[None, :],
        mask=exists_R[:, None] & (column_B < past_column)[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )


@triton.jit
def let_next_start_and_wait(DEPENDENT: tl.constexpr):
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def score_rows(
    x_ptr,
    router_ptr,
    router_bias_ptr,
    selected_ptr,
    tau,
    first,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Whether the token selects each of ROWS experts from `first` on."""
    expert_R = first + tl.arange(0, ROWS)
    exists_R = expert_R < EXPERTS
    column_C = tl.arange(0, WIDTH)
    w_RC = load_rows(router_ptr, expert_R, exists_R, C, column_C, C)
    let_next_start_and_wait(DEPENDENT)
    x_C = tl.load(x_ptr + column_C, mask=column_C < C, other=0.0).to(tl.float32)
    score_R = tl.sum(w_RC.to(tl.float32) * x_C[None, :], 1)
    if router_bias_ptr is not None:
        score_R += tl.load(router_bias_ptr + expert_R, mask=exists_R, other=0.0).to(tl.float32)
    tl.store(selected_ptr + expert_R, (tl.sigmoid(score_R) > tau).to(tl.int32), mask=exists_R)


@triton.jit
def hidden_rows(
    x_ptr,
    up_ptr,
    gate_ptr,
    up_bias_ptr,
    gate_bias_ptr,
    constants,
    hidden_ptr,
    first,
    F,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    BIAS_STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IS_PROGRAM: tl.constexpr,
    ROWS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Hidden values of ROWS neurons from `first` on, selected or not."""
    neuron_R = first + tl.arange(0, ROWS)
    exists_R = neuron_R < F
    column_D = tl.arange(0, WIDTH)
    up_RD = load_rows(up_ptr, neuron_R, exists_R, ROW_STRIDE, column_D, D)
    gate_RD = up_RD
    if gate_ptr is not None:
        gate_RD = load_rows(gate_ptr, neuron_R, exists_R, ROW_STRIDE, column_D, D)
    let_next_start_and_wait(DEPENDENT)
    x_1D = tl.load(x_ptr + column_D, mask=column_D < D, other=0.0).to(tl.float32)[None, :]
    if gate_ptr is not None:
        up_R, gate_R = tl.reduce((up_RD.to(tl.float32) * x_1D, gate_RD.to(tl.float32) * x_1D), 1, add_pairs)
        if gate_bias_ptr is not None:
            gate_R += tl.load(gate_bias_ptr + neuron_R * BIAS_STRIDE, mask=exists_R, other=0.0).to(tl.float32)
    else:
        up_R = tl.sum(up_RD.to(tl.float32) * x_1D, 1)
        gate_R = up_R
    if up_bias_ptr is not None:
        up_R += tl.load(up_bias_ptr + neuron_R * BIAS_STRIDE, mask=exists_R, other=0.0).to(tl.float32)
    hidden_R = hidden_of(up_R, gate_R, constants, neuron_R, exists_R, ACTIVATION, IS_PROGRAM, gate_ptr is not None)
    tl.store(hidden_ptr + neuron_R, hidden_R, mask=exists_R)


@triton.jit
def score_and_compute(
    x_ptr,
    router_x_ptr,  # what the router reads: mostly x
    router_ptr,
    router_bias_ptr,
    up_ptr,
    gate_ptr,
    up_bias_ptr,
    gate_bias_ptr,
    constants,
    hidden_ptr,
    selected_ptr,
    arrived_ptr,
    tau,
    F,
    D: tl.constexpr,
    WIDTH: tl.constexpr,  # D and ROUTER_D: to a power of two
    ROUTER_D: tl.constexpr,
    ROUTER_WIDTH: tl.constexpr,
    ROW_STRIDE: tl.constexpr,  # from one neuron to the next in up and gate: 2 D in a projection of interleaved halves
    BIAS_STRIDE: tl.constexpr,
    EXPERTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IS_PROGRAM: tl.constexpr,
    COUNTERS: tl.constexpr,
    ROWS: tl.constexpr,
    ROUTED: tl.constexpr,  # experts of a program
    DEPENDENT: tl.constexpr,
):
    """Every hidden value [F] and every expert's decision [E], side by side: the last programs take the router's rows,
    the others those of up and gate."""
    routers: tl.constexpr = (EXPERTS + ROUTED - 1) // ROUTED
    program = tl.program_id(0)
    router = program - (tl.num_programs(0) - routers)
    if router < 0:
        hidden_rows(
            x_ptr,
            up_ptr,
            gate_ptr,
            up_bias_ptr,
            gate_bias_ptr,
            constants,
            hidden_ptr,
            program * ROWS,
            F,
            D,
            WIDTH,
            ROW_STRIDE,
            BIAS_STRIDE,
            ACTIVATION,
            IS_PROGRAM,
            ROWS,
            DEPENDENT,
        )
    else:
        score_rows(
            router_x_ptr,
            router_ptr,
            router_bias_ptr,
            selected_ptr,
            tau,
            router * ROUTED,
            ROUTER_D,
            ROUTER_WIDTH,
            EXPERTS,
            ROUTED,
            DEPENDENT,
        )
        for counter in range(router, COUNTERS, routers):  # for launch 2; scratch memory comes unset
            tl.store(arrived_ptr + counter, 0)


@triton.jit
def add_selected(sum_RB, w_RB, neuron_R, exists_R, hidden_ptr, selected_ptr, EXPERT_SIZE: tl.constexpr):
    """sum_RB and the products of some neurons; those of unselected experts add nothing, whatever their weights."""
    selects_R = tl.load(selected_ptr + neuron_R // EXPERT_SIZE, mask=exists_R, other=0) != 0
    hidden_R = tl.load(hidden_ptr + neuron_R, mask=selects_R, other=0.0)
    return sum_RB + tl.where(selects_R[:, None], w_RB.to(tl.float32), 0.0) * hidden_R[:, None]


@triton.jit
def project_selected(
    hidden_ptr,
    selected_ptr,
    down_ptr,
    down_bias_ptr,
    partial_ptr,
    arrived_ptr,
    y_ptr,
    F,
    D: tl.constexpr,
    EXPERT_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A block of columns of y [D] over this split's share of all neurons; the last split to arrive adds them up."""
    block, split = tl.program_id(0), tl.program_id(1)
    column_B = block * BLOCK + tl.arange(0, BLOCK)
    mask_B = column_B < D
    neuron_R = split * ROWS + tl.arange(0, ROWS)
    w_RB = load_rows(down_ptr, neuron_R, neuron_R < F, D, column_B, D)
    let_next_start_and_wait(DEPENDENT)
    sum_RB = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_RB = add_selected(sum_RB, w_RB, neuron_R, neuron_R < F, hidden_ptr, selected_ptr, EXPERT_SIZE)
    for first in range((split + SPLITS) * ROWS, F, SPLITS * ROWS):
        neuron_R = first + tl.arange(0, ROWS)
        w_RB = load_rows(down_ptr, neuron_R, neuron_R < F, D, column_B, D)
        sum_RB = add_selected(sum_RB, w_RB, neuron_R, neuron_R < F, hidden_ptr, selected_ptr, EXPERT_SIZE)
    y_B = tl.sum(sum_RB, 0)

    is_last = True
    if SPLITS > 1:
        tl.store(partial_ptr + split * D + column_B, y_B, mask=mask_B)
        tl.debug_barrier()  # every thread's store comes before the one thread's release below
        is_last = tl.atomic_add(arrived_ptr + block, 1, sem="acq_rel") == SPLITS - 1
        if is_last:
            y_B = tl.zeros([BLOCK], tl.float32)
            for other in tl.static_range(SPLITS):  # in a fixed order
                y_B += tl.load(partial_ptr + other * D + column_B, mask=mask_B, other=0.0, cache_modifier=".cg")
    if is_last:
        if down_bias_ptr is not None:
            y_B += tl.load(down_bias_ptr + column_B, mask=mask_B, other=0.0).to(tl.float32)
        tl.store(y_ptr + column_B, y_B.to(y_ptr.dtype.element_ty), mask=mask_B)
