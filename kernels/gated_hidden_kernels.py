# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""What lies between the projections of a gated-expert FFN, forward and backward, as Triton kernels that read once.

A token's neurons lie expert after expert, so values [T, F] are rows [P, S]: a row for each pair of a token and an
expert, its S neurons in a line. A row has one gate, and the gate's gradient is a sum over the row: it never leaves the
program that reads the row. Where the last expert is smaller (not EVEN), rows are found by a division instead.

ACTIVATION is a name, or (IS_PROGRAM) the function generated from a region program; its constants get no gradients here,
as those add over tokens. Computes in fp32, rounds once.
Shape suffixes: P pairs of one program, S neurons of an expert (padded to a power of two).
"""

import triton
import triton.language as tl

from lte_compile.kernels.decode_kernels import activate, hidden_of


@triton.jit
def derivative(z, ACTIVATION: tl.constexpr):
    """Of the functions of decode_kernels.activate."""
    y = z * 0.0 + 1.0
    if ACTIVATION == "relu":
        y = tl.where(z <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "gelu":  # 0.3989... = 1 / sqrt(2 pi)
        y = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "gelu_tanh":  # z sigmoid(v), v = 2 sqrt(2 / pi) (z + 0.044715 z^3)
        s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        y = s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(z)
        y = s + z * s * (1.0 - s)
    elif ACTIVATION == "quick_gelu":
        s = tl.sigmoid(1.702 * z)
        y = s + 1.702 * z * s * (1.0 - s)
    elif ACTIVATION == "relu_squared":
        y = 2.0 * tl.maximum(z, 0.0)
    elif ACTIVATION == "sigmoid":
        s = tl.sigmoid(z)
        y = s * (1.0 - s)
    elif ACTIVATION == "tanh":  # 1 - tanh^2, without cancellation
        s = tl.sigmoid(2.0 * z)
        y = 4.0 * s * (1.0 - s)
    elif ACTIVATION == "leaky_relu":
        y = tl.where(z > 0.0, 1.0, 0.01)
    elif ACTIVATION == "elu":
        y = tl.where(z > 0.0, 1.0, tl.exp(tl.minimum(z, 0.0)))
    elif ACTIVATION == "mish":  # t + z sigmoid(z) (1 - t^2), t = tanh(softplus(z)) = n / (n + 2), n = e^z (e^z + 2)
        e = tl.exp(tl.minimum(z, 20.0))
        n = e * (e + 2.0)
        y = n / (n + 2.0) + z * tl.sigmoid(z) * 4.0 * (n + 1.0) / ((n + 2.0) * (n + 2.0))
    else:
        tl.static_assert(ACTIVATION == "identity")
    return y


@triton.jit
def locate(
    pairs,
    F,
    EXPERTS: tl.constexpr,
    EXPERT_SIZE: tl.constexpr,
    EVEN: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """This program's rows: the first pair, where the first row begins, the rows' places from there, and which exist."""
    first = tl.program_id(0).to(tl.int64) * PAIRS
    pair_P = tl.arange(0, PAIRS)
    place_S = tl.arange(0, WIDTH)
    if EVEN:
        start = first * EXPERT_SIZE
        offset_PS = pair_P[:, None] * EXPERT_SIZE + place_S[None, :]
        mask_PS = (pair_P < pairs - first)[:, None] & (place_S < EXPERT_SIZE)[None, :]
    else:
        token = first // EXPERTS
        start = token * F
        in_rows_P = (first - token * EXPERTS).to(tl.int32) + pair_P
        neuron_PS = (in_rows_P % EXPERTS)[:, None] * EXPERT_SIZE + place_S[None, :]
        offset_PS = (in_rows_P // EXPERTS)[:, None].to(tl.int64) * F + neuron_PS
        mask_PS = (pair_P < pairs - first)[:, None] & (place_S < EXPERT_SIZE)[None, :] & (neuron_PS < F)
    return first, start, offset_PS, mask_PS


@triton.jit
def gated_hidden(
    up_ptr,
    gate_ptr,
    gates_ptr,
    constants,
    out_ptr,
    pairs,
    F,
    EXPERTS: tl.constexpr,
    EXPERT_SIZE: tl.constexpr,
    EVEN: tl.constexpr,
    SKIP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IS_PROGRAM: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The hidden value times the gate of each neuron's expert. SKIP: where that is zero nothing is read."""
    first, start, offset_PS, mask_PS = locate(pairs, F, EXPERTS, EXPERT_SIZE, EVEN, PAIRS, WIDTH)
    pair_P = tl.arange(0, PAIRS)
    score_P = tl.load(gates_ptr + first + pair_P, mask=pair_P < pairs - first, other=0.0).to(tl.float32)
    read_PS = mask_PS
    if SKIP:
        read_PS = mask_PS & (score_P != 0.0)[:, None]
    up_PS = tl.load(up_ptr + start + offset_PS, mask=read_PS, other=0.0).to(tl.float32)
    gate_PS = up_PS
    if gate_ptr is not None:
        gate_PS = tl.load(gate_ptr + start + offset_PS, mask=read_PS, other=0.0).to(tl.float32)
    expert_P = ((first + pair_P) % EXPERTS).to(tl.int32)
    neuron_PS = expert_P[:, None] * EXPERT_SIZE + tl.arange(0, WIDTH)[None, :]
    hidden_PS = hidden_of(up_PS, gate_PS, constants, neuron_PS, mask_PS, ACTIVATION, IS_PROGRAM, gate_ptr is not None)
    gated_PS = hidden_PS * score_P[:, None]
    if SKIP:
        gated_PS = tl.where(read_PS, gated_PS, 0.0)
    tl.store(out_ptr + start + offset_PS, gated_PS.to(out_ptr.dtype.element_ty), mask=mask_PS)


@triton.jit
def gated_hidden_backward(
    grad_ptr,
    up_ptr,
    gate_ptr,
    gates_ptr,
    constants,
    gated_ptr,
    grad_up_ptr,
    grad_gate_ptr,
    grad_gates_ptr,
    pairs,
    F,
    EXPERTS: tl.constexpr,
    EXPERT_SIZE: tl.constexpr,
    EVEN: tl.constexpr,
    SKIP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IS_PROGRAM: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """From the gradient of the gated hidden value: those of up, gate and the gates, and the gated value itself anew.

    Outputs that are None are not wanted. Each program reads its rows before it writes them: grad_up may be grad.
    """
    first, start, offset_PS, mask_PS = locate(pairs, F, EXPERTS, EXPERT_SIZE, EVEN, PAIRS, WIDTH)
    pair_P = tl.arange(0, PAIRS)
    score_P = tl.load(gates_ptr + first + pair_P, mask=pair_P < pairs - first, other=0.0).to(tl.float32)
    read_PS = mask_PS
    if SKIP:
        read_PS = mask_PS & (score_P != 0.0)[:, None]
    grad_PS = tl.load(grad_ptr + start + offset_PS, mask=read_PS, other=0.0).to(tl.float32)
    up_PS = tl.load(up_ptr + start + offset_PS, mask=read_PS, other=0.0).to(tl.float32)
    gate_PS = up_PS
    if gate_ptr is not None:
        gate_PS = tl.load(gate_ptr + start + offset_PS, mask=read_PS, other=0.0).to(tl.float32)
    grad_hidden_PS = grad_PS * score_P[:, None]
    if IS_PROGRAM:
        expert_P = ((first + pair_P) % EXPERTS).to(tl.int32)
        neuron_PS = expert_P[:, None] * EXPERT_SIZE + tl.arange(0, WIDTH)[None, :]
        hidden_PS, grad_up_PS, grad_gate_PS = ACTIVATION(grad_hidden_PS, up_PS, gate_PS, constants, neuron_PS, mask_PS)
    elif gate_ptr is not None:
        activated_PS = activate(gate_PS, ACTIVATION)
        hidden_PS = activated_PS * up_PS
        grad_up_PS = grad_hidden_PS * activated_PS
        grad_gate_PS = grad_hidden_PS * up_PS * derivative(gate_PS, ACTIVATION)
    else:
        hidden_PS = activate(up_PS, ACTIVATION)
        grad_up_PS = grad_hidden_PS * derivative(up_PS, ACTIVATION)
        grad_gate_PS = grad_up_PS
    if gated_ptr is not None:
        gated_PS = hidden_PS * score_P[:, None]
        if SKIP:
            gated_PS = tl.where(read_PS, gated_PS, 0.0)
        tl.store(gated_ptr + start + offset_PS, gated_PS.to(gated_ptr.dtype.element_ty), mask=mask_PS)
    if grad_gates_ptr is not None:
        product_PS = tl.where(mask_PS, grad_PS * hidden_PS, 0.0)  # of no neuron: hidden(0, 0), whatever that is
        tl.store(grad_gates_ptr + first + pair_P, tl.sum(product_PS, 1), mask=pair_P < pairs - first)
    if grad_up_ptr is not None:
        if SKIP:
            grad_up_PS = tl.where(read_PS, grad_up_PS, 0.0)
            grad_gate_PS = tl.where(read_PS, grad_gate_PS, 0.0)
        tl.store(grad_up_ptr + start + offset_PS, grad_up_PS.to(grad_up_ptr.dtype.element_ty), mask=mask_PS)
        if gate_ptr is not None:
            tl.store(grad_gate_ptr + start + offset_PS, grad_gate_PS.to(grad_gate_ptr.dtype.element_ty), mask=mask_PS)
