# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The two Triton kernels of one-token decode; lte_compile.kernels.triton_decode says how they work together.

ACTIVATION is a name, or (IS_PROGRAM) the function generated from a region program, which loads its `constants` itself.
DEPENDENT: launched before the launch before it has ended (programmatic dependent launch), for which it waits first.

Shape suffixes: D model width, F neurons, E experts, R rows (neurons) of one program, B columns of one step.
Interpretable (no grid barriers, no inline assembly; everything is upcast before it is added), Triton 3.6 and later.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """The functions of lte_compile.kernels.activations, in fp32. One branch is compiled: ACTIVATION is a constant."""
    y = z
    if ACTIVATION == "relu":
        y = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "gelu":
        y = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # 0.5 (1 + tanh(v)) is sigmoid(2 v)
        y = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif ACTIVATION == "silu":
        y = z * tl.sigmoid(z)
    elif ACTIVATION == "quick_gelu":
        y = z * tl.sigmoid(1.702 * z)
    elif ACTIVATION == "relu_squared":
        y = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        y = y * y
    elif ACTIVATION == "sigmoid":
        y = tl.sigmoid(z)
    elif ACTIVATION == "tanh":
        y = 2.0 * tl.sigmoid(2.0 * z) - 1.0
    elif ACTIVATION == "leaky_relu":
        y = tl.where(z > 0.0, z, 0.01 * z)
    elif ACTIVATION == "elu":
        y = tl.where(z > 0.0, z, tl.exp(tl.minimum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)) - 1.0)
    elif ACTIVATION == "mish":  # tanh(softplus(z)) = (w - 1) / (w + 1), w = (1 + e^z)^2; it is 1 in fp32 from z = 20 on
        e = tl.exp(tl.minimum(z, 20.0))
        y = z * (e * (e + 2.0)) / (e * (e + 2.0) + 2.0)
    else:
        tl.static_assert(ACTIVATION == "identity")
    return y


@triton.jit
def hidden_of(
    up, gate, constants, neuron, exists, ACTIVATION: tl.constexpr, IS_PROGRAM: tl.constexpr, GATED: tl.constexpr
):
    """The hidden values of up and gate in fp32, before any expert's gate."""
    if IS_PROGRAM:
        hidden = ACTIVATION(up, gate, constants, neuron, exists)
    elif GATED:
        hidden = activate(gate, ACTIVATION) * up
    else:
        hidden = activate(up, ACTIVATION)
    return hidden


@triton.jit
def route_up(
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
    active_ptr,
    arrived_ptr,
    tau,
    F,
    D: tl.constexpr,
    ROUTER_D: tl.constexpr,
    ROW_STRIDE: tl.constexpr,  # from one neuron to the next in up and gate: 2 D in a projection of interleaved halves
    BIAS_STRIDE: tl.constexpr,
    EXPERT_SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IS_PROGRAM: tl.constexpr,
    COUNTERS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    if DEPENDENT:
        gdc_wait()
    program = tl.program_id(0)
    parts: tl.constexpr = (EXPERT_SIZE + ROWS - 1) // ROWS
    expert = program // parts
    part = program % parts
    for counter in range(program, COUNTERS, tl.num_programs(0)):  # for launch 2; scratch memory comes unset
        tl.store(arrived_ptr + counter, 0)

    columns_B = tl.arange(0, BLOCK)
    score_B = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, ROUTER_D, BLOCK, num_stages=STAGES):
        column_B = start + columns_B
        x_B = tl.load(router_x_ptr + column_B, mask=column_B < ROUTER_D, other=0.0).to(tl.float32)
        w_B = tl.load(router_ptr + expert.to(tl.int64) * ROUTER_D + column_B, mask=column_B < ROUTER_D, other=0.0)
        score_B += x_B * w_B.to(tl.float32)
    score = tl.sum(score_B, 0)
    if router_bias_ptr is not None:
        score += tl.load(router_bias_ptr + expert).to(tl.float32)
    is_active = tl.sigmoid(score) > tau
    if part == 0:
        tl.store(active_ptr + expert, is_active.to(tl.int32))

    if is_active:
        in_expert_R = part * ROWS + tl.arange(0, ROWS)
        neuron_R = expert * EXPERT_SIZE + in_expert_R
        exists_R = (in_expert_R < EXPERT_SIZE) & (neuron_R < F)
        up_RB = tl.zeros([ROWS, BLOCK], tl.float32)
        gate_RB = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in tl.range(0, D, BLOCK, num_stages=STAGES):
            column_B = start + columns_B
            x_1B = tl.load(x_ptr + column_B, mask=column_B < D, other=0.0).to(tl.float32)[None, :]
            offset_RB = neuron_R[:, None].to(tl.int64) * ROW_STRIDE + column_B[None, :]
            mask_RB = exists_R[:, None] & (column_B < D)[None, :]
            up_RB += x_1B * tl.load(up_ptr + offset_RB, mask=mask_RB, other=0.0, eviction_policy="evict_first").to(
                tl.float32
            )
            if gate_ptr is not None:
                gate_RB += x_1B * tl.load(
                    gate_ptr + offset_RB, mask=mask_RB, other=0.0, eviction_policy="evict_first"
                ).to(tl.float32)
        up_R = tl.sum(up_RB, 1)
        if up_bias_ptr is not None:
            up_R += tl.load(up_bias_ptr + neuron_R * BIAS_STRIDE, mask=exists_R, other=0.0).to(tl.float32)
        gate_R = up_R
        if gate_ptr is not None:
            gate_R = tl.sum(gate_RB, 1)
            if gate_bias_ptr is not None:
                gate_R += tl.load(gate_bias_ptr + neuron_R * BIAS_STRIDE, mask=exists_R, other=0.0).to(tl.float32)
        hidden_R = hidden_of(up_R, gate_R, constants, neuron_R, exists_R, ACTIVATION, IS_PROGRAM, gate_ptr is not None)
        tl.store(hidden_ptr + neuron_R, hidden_R, mask=exists_R)


@triton.jit
def list_active(active_ptr, EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr):
    """The flags, and each active expert's position in the list of active experts."""
    expert_E = tl.arange(0, EXPERTS_PADDED)
    active_E = tl.load(active_ptr + expert_E, mask=expert_E < EXPERTS, other=0)
    return active_E, tl.cumsum(active_E, 0) - 1


@triton.jit
def nth_active(index, active_E, position_E, EXPERTS_PADDED: tl.constexpr):
    """The expert at a position of the list."""
    return tl.sum(tl.where((position_E == index) & (active_E != 0), tl.arange(0, EXPERTS_PADDED), 0), 0)


@triton.jit
def down(
    hidden_ptr,
    active_ptr,
    down_ptr,
    down_bias_ptr,
    partial_ptr,
    arrived_ptr,
    y_ptr,
    F,
    D: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    EXPERT_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    if DEPENDENT:
        gdc_wait()
    block = tl.program_id(0)
    split = tl.program_id(1)
    column_B = block * BLOCK + tl.arange(0, BLOCK)
    active_E, position_E = list_active(active_ptr, EXPERTS, EXPERTS_PADDED)
    num_active = tl.sum(active_E, 0)

    parts: tl.constexpr = (EXPERT_SIZE + ROWS - 1) // ROWS
    sum_RB = tl.zeros([ROWS, BLOCK], tl.float32)
    for unit in tl.range(split, num_active * parts, SPLITS, num_stages=STAGES):
        expert = nth_active(unit // parts, active_E, position_E, EXPERTS_PADDED)
        in_expert_R = (unit % parts) * ROWS + tl.arange(0, ROWS)
        neuron_R = expert * EXPERT_SIZE + in_expert_R
        exists_R = (in_expert_R < EXPERT_SIZE) & (neuron_R < F)
        hidden_R = tl.load(hidden_ptr + neuron_R, mask=exists_R, other=0.0)
        offset_RB = neuron_R[:, None].to(tl.int64) * D + column_B[None, :]
        mask_RB = exists_R[:, None] & (column_B < D)[None, :]
        w_RB = tl.load(down_ptr + offset_RB, mask=mask_RB, other=0.0, eviction_policy="evict_first")
        sum_RB += w_RB.to(tl.float32) * hidden_R[:, None]
    tl.store(partial_ptr + split * D + column_B, tl.sum(sum_RB, 0), mask=column_B < D)

    tl.debug_barrier()  # every thread's store comes before the one thread's release below
    arrived = tl.atomic_add(arrived_ptr + block, 1, sem="acq_rel")
    if arrived == SPLITS - 1:
        y_B = tl.zeros([BLOCK], tl.float32)
        for other in range(SPLITS):
            y_B += tl.load(partial_ptr + other * D + column_B, mask=column_B < D, other=0.0, cache_modifier=".cg")
        if down_bias_ptr is not None:
            y_B += tl.load(down_bias_ptr + column_B, mask=column_B < D, other=0.0).to(tl.float32)
        tl.store(y_ptr + column_B, y_B.to(y_ptr.dtype.element_ty), mask=column_B < D)
