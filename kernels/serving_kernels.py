# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""What serving (exporters/ort/cuda) needs beside the kernels for one and a few tokens: they are compiled once for every
shape, so the activation is chosen by number while the kernel runs, and a prompt of many tokens is multiplied by cuBLAS.

Shape suffixes: T tokens, D model width, F neurons, E experts, B columns of one program.
"""

import triton
import triton.language as tl

from lte_compile.kernels.decode_kernels import activate


@triton.jit
def activate_numbered(z, number):
    """The activation at this place of lte_compile.kernels.activations.ACTIVATIONS (exporters/ort/activation.h)."""
    y = z
    if number == 0:
        y = activate(z, "relu")
    elif number == 1:
        y = activate(z, "gelu")
    elif number == 2:
        y = activate(z, "gelu_tanh")
    elif number == 3:
        y = activate(z, "silu")
    elif number == 4:
        y = activate(z, "quick_gelu")
    elif number == 5:
        y = activate(z, "relu_squared")
    elif number == 6:
        y = activate(z, "sigmoid")
    elif number == 7:
        y = activate(z, "tanh")
    elif number == 9:
        y = activate(z, "leaky_relu")
    elif number == 10:
        y = activate(z, "elu")
    elif number == 11:
        y = activate(z, "mish")
    return y


@triton.jit
def plain_hidden(up, gate, number, neuron, exists):
    """Stands where the kernels call the function of a region program; `number` in the place of its constants."""
    return activate_numbered(up, number)


@triton.jit
def gated_hidden(up, gate, number, neuron, exists):
    return activate_numbered(gate, number) * up


@triton.jit
def mask_hidden(
    up_ptr,
    gate_ptr,
    up_bias_ptr,
    gate_bias_ptr,
    scores_ptr,
    router_bias_ptr,
    number,
    tau,
    F,
    E,
    EXPERT_SIZE,
    BLOCK: tl.constexpr,
):
    """The hidden value [T, F] of what cuBLAS made of x, in the place of `up`; zero where the neuron's expert is not
    selected. scores [T, E] are x W_router^T in fp32, before the bias and the sigmoid."""
    token = tl.program_id(0).to(tl.int64)
    neuron_B = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists_B = neuron_B < F
    expert_B = neuron_B // EXPERT_SIZE
    score_B = tl.load(scores_ptr + token * E + expert_B, mask=exists_B, other=0.0)
    score_B += tl.load(router_bias_ptr + expert_B, mask=exists_B, other=0.0).to(tl.float32)
    is_selected_B = exists_B & (tl.sigmoid(score_B) > tau)
    place_B = token * F + neuron_B
    up_B = tl.load(up_ptr + place_B, mask=is_selected_B, other=0.0).to(tl.float32)
    up_B += tl.load(up_bias_ptr + neuron_B, mask=is_selected_B, other=0.0).to(tl.float32)
    if gate_ptr is not None:
        gate_B = tl.load(gate_ptr + place_B, mask=is_selected_B, other=0.0).to(tl.float32)
        gate_B += tl.load(gate_bias_ptr + neuron_B, mask=is_selected_B, other=0.0).to(tl.float32)
        hidden_B = gated_hidden(up_B, gate_B, number, neuron_B, exists_B)
    else:
        hidden_B = plain_hidden(up_B, up_B, number, neuron_B, exists_B)
    hidden_B = tl.where(is_selected_B, hidden_B, 0.0)
    tl.store(up_ptr + place_B, hidden_B.to(up_ptr.dtype.element_ty), mask=exists_B)


@triton.jit
def fill_rows(y_ptr, bias_ptr, D, BLOCK: tl.constexpr):
    """The bias [D] in every row of y [T, D], for cuBLAS to add to."""
    token = tl.program_id(0).to(tl.int64)
    column_B = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bias_B = tl.load(bias_ptr + column_B, mask=column_B < D, other=0.0)
    tl.store(y_ptr + token * D + column_B, bias_B, mask=column_B < D)
