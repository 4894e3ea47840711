# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The Triton kernels for one token of a small layer; triton_decode_small says how they work together.

ACTIVATION is a name, or (IS_PROGRAM) the function generated from a region program, which loads its `constants` itself.
DEPENDENT: started before the launch before it has ended (programmatic dependent launch), so that only weights are read
ahead of gdc_wait.

Shape suffixes: D model width and C columns that the router reads (WIDTH, ROUTER_WIDTH: powers of two), N one neuron,
R rows (neurons) and B columns of one step.
Interpretable without DEPENDENT (no grid barriers, no inline assembly), Triton 3.6 and later.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lte_compile.kernels.decode_kernels import hidden_of


@triton.jit
def append_features(
    x_ptr, weight_ptr, bias_ptr, joined_ptr, D: tl.constexpr, WIDTH: tl.constexpr, DEPENDENT: tl.constexpr
):
    """One feature of a two-layer router, relu(w x + b), behind a copy of x."""
    feature = tl.program_id(0)
    column_D = tl.arange(0, WIDTH)
    w_D = tl.load(weight_ptr + feature * D + column_D, mask=column_D < D, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + feature).to(tl.float32)
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    x_D = tl.load(x_ptr + column_D, mask=column_D < D, other=0.0)
    value = tl.maximum(tl.sum(w_D * x_D.to(tl.float32), 0) + bias, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(joined_ptr + D + feature, value.to(joined_ptr.dtype.element_ty))
    if feature == 0:
        tl.store(joined_ptr + column_D, x_D, mask=column_D < D)


@triton.jit
def route_hidden(
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
    tau,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROUTER_D: tl.constexpr,
    ROUTER_WIDTH: tl.constexpr,
    ROW_STRIDE: tl.constexpr,  # from one neuron to the next in up and gate: 2 D in a projection of interleaved halves
    BIAS_STRIDE: tl.constexpr,
    EXPERT_SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IS_PROGRAM: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One neuron's hidden value, 0 if its expert, which every program scores anew, is not selected."""
    neuron = tl.program_id(0)
    expert = neuron // EXPERT_SIZE
    column_C = tl.arange(0, ROUTER_WIDTH)
    column_D = tl.arange(0, WIDTH)
    w_C = tl.load(router_ptr + expert * ROUTER_D + column_C, mask=column_C < ROUTER_D, other=0.0).to(tl.float32)
    bias = 0.0
    if router_bias_ptr is not None:
        bias = tl.load(router_bias_ptr + expert).to(tl.float32)
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    x_C = tl.load(router_x_ptr + column_C, mask=column_C < ROUTER_D, other=0.0).to(tl.float32)
    x_D = tl.load(x_ptr + column_D, mask=column_D < D, other=0.0).to(tl.float32)
    neuron_N = neuron + tl.arange(0, 1)
    if tl.sigmoid(tl.sum(x_C * w_C, 0) + bias) > tau:
        offset_D = neuron.to(tl.int64) * ROW_STRIDE + column_D
        up_D = tl.load(up_ptr + offset_D, mask=column_D < D, other=0.0).to(tl.float32)
        up_N = tl.sum(x_D * up_D, 0) + tl.zeros([1], tl.float32)
        if up_bias_ptr is not None:
            up_N += tl.load(up_bias_ptr + neuron_N * BIAS_STRIDE).to(tl.float32)
        gate_N = up_N
        if gate_ptr is not None:
            gate_D = tl.load(gate_ptr + offset_D, mask=column_D < D, other=0.0).to(tl.float32)
            gate_N = tl.sum(x_D * gate_D, 0) + tl.zeros([1], tl.float32)
            if gate_bias_ptr is not None:
                gate_N += tl.load(gate_bias_ptr + neuron_N * BIAS_STRIDE).to(tl.float32)
        exists_N = neuron_N >= 0
        hidden_N = hidden_of(up_N, gate_N, constants, neuron_N, exists_N, ACTIVATION, IS_PROGRAM, gate_ptr is not None)
        tl.store(hidden_ptr + neuron_N, hidden_N)
    else:
        tl.store(hidden_ptr + neuron_N, tl.zeros([1], tl.float32))


@triton.jit
def project_hidden(
    hidden_ptr,
    down_ptr,
    down_bias_ptr,
    y_ptr,
    F,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A few columns of the output: the neuron-major down-projection's rows of the hidden values that are not 0."""
    column_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row_R = tl.arange(0, ROWS)
    sum_RB = tl.zeros([ROWS, BLOCK], tl.float32)
    bias_B = tl.zeros([BLOCK], tl.float32)
    if down_bias_ptr is not None:
        bias_B = tl.load(down_bias_ptr + column_B, mask=column_B < D, other=0.0).to(tl.float32)
    if DEPENDENT:
        gdc_wait()
    for start in range(0, F, STEPS * ROWS):
        for step in tl.static_range(STEPS):  # their reads do not wait for one another
            neuron_R = start + step * ROWS + row_R
            hidden_R = tl.load(hidden_ptr + neuron_R, mask=neuron_R < F, other=0.0)
            needed_RB = (hidden_R != 0.0)[:, None] & (column_B < D)[None, :]  # NaN is
            w_RB = tl.load(down_ptr + neuron_R[:, None] * D + column_B[None, :], mask=needed_RB, other=0.0)
            sum_RB += w_RB.to(tl.float32) * hidden_R[:, None]
    y_B = tl.sum(sum_RB, 0) + bias_B
    tl.store(y_ptr + column_B, y_B.to(y_ptr.dtype.element_ty), mask=column_B < D)
