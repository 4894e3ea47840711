"""Random FFN problems for the op tests. T tokens, D model width, F neurons, E experts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lte_compile.kernels.experts import count_experts
from lte_compile.kernels.ffn import FfnWeights
from lte_compile.kernels.layout import neuron_major
from lte_compile.kernels.program import parse_program
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall

# How far a result in this dtype may be from float64, relative to the norm: a few roundings of its unit roundoff
# (2^-24, 2^-11, 2^-8, 2^-53), as products, hidden values and outputs are rounded once each.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Shape:
    tokens: tuple[int, ...]
    width: int
    neurons: int
    expert_size: int
    offsets: tuple[int, ...] | None = None

    @property
    def experts(self) -> int:
        return count_experts(self.neurons, self.expert_size) if self.offsets is None else len(self.offsets) - 1

    @property
    def offset_tensor(self) -> Tensor | None:
        return None if self.offsets is None else torch.tensor(self.offsets)


SHAPES = [
    Shape((1,), 8, 32, 8),
    Shape((2, 3), 13, 37, 8),  # primes: a last expert of 5
    Shape((0,), 8, 32, 8),
    Shape((2, 0, 3), 5, 7, 2),
    Shape((), 6, 9, 4),  # one vector
    Shape((5,), 7, 11, 1),
    Shape((3,), 7, 11, 16),  # one expert, larger than the layer
    Shape((1, 1), 12, 30, 8, offsets=(0, 1, 9, 9, 30)),  # sizes 1, 8, 0, 21
]


def make_weights(shape: Shape, *, gated: bool, biases: bool, dtype: torch.dtype = torch.float64) -> FfnWeights:
    def draw(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64).div(size[-1] ** 0.5).to(dtype)

    width, neurons = shape.width, shape.neurons
    return FfnWeights(
        draw(neurons, width),
        draw(neurons, width) if gated else None,
        neuron_major(draw(width, neurons)),
        draw(neurons) if biases else None,
        draw(neurons) if biases and gated else None,
        draw(width) if biases else None,
    )


def make_call(
    shape: Shape,
    *,
    gated: bool = True,
    biases: bool = True,
    dtype: torch.dtype = torch.float64,
    activation: str = "silu",
    tau: float = 0.5,
) -> SparseFfnCall:
    x_D = torch.randn(*shape.tokens, shape.width, dtype=torch.float64).to(dtype)
    router_ED = torch.randn(shape.experts, shape.width, dtype=torch.float64).to(dtype)
    bias_E = torch.randn(shape.experts, dtype=torch.float64).to(dtype) if biases else None
    weights = make_weights(shape, gated=gated, biases=biases, dtype=dtype)
    return SparseFfnCall(x_D, router_ED, bias_E, weights, activation, shape.expert_size, tau, shape.offset_tensor)


# Region programs by what they stand for. Together they use every operation of the table.
PROGRAMS = {
    "clamped SwiGLU with +1 (gpt-oss)": (
        "v0 = clamp_max(gate, 0.7); v1 = mul(v0, 1.702); v2 = sigmoid(v1); v3 = mul(v0, v2); v4 = clamp_min(up, -0.7); "
        "v5 = clamp_max(v4, 0.7); v6 = add(v5, 1.0); v7 = mul(v6, v3)"
    ),
    "xIELU (apertus)": (
        "v0 = gt(up, 0.0); v1 = exp(s0); v2 = log1p(v1); v3 = mul(v2, up); v4 = mul(v3, up); v5 = mul(up, 0.5); "
        "v6 = add(v4, v5); v7 = minimum(up, -1e-06); v8 = expm1(v7); v9 = sub(v8, up); v10 = exp(s1); "
        "v11 = log1p(v10); v12 = add(v11, 0.5); v13 = mul(v9, v12); v14 = add(v13, v5); v15 = where(v0, v6, v14)"
    ),
    "softcap": "v0 = div(up, 30.0); v1 = tanh(v0); v2 = mul(v1, 30.0)",
    "scale and shift of each neuron": "v0 = sigmoid(gate); v1 = mul(v0, n0); v2 = add(v1, n1); v3 = mul(v2, up)",
    "every other operation": (
        "v0 = abs(up); v1 = add(v0, 1.5); v2 = log(v1); v3 = sqrt(v1); v4 = rsqrt(v1); v5 = reciprocal(v1); "
        "v6 = sin(up); v7 = cos(up); v8 = erf(up); v9 = relu(up); v10 = neg(up); v11 = sign(up); v12 = floor(v1); "
        "v13 = ceil(v1); v14 = maximum(v6, v7); v15 = ge(up, 0.1); v16 = lt(up, 0.9); v17 = le(v6, v7); "
        "v18 = eq(v11, 1.0); v19 = ne(v12, 2.0); v20 = logical_and(v15, v16); v21 = logical_or(v20, v17); "
        "v22 = logical_not(v18); v23 = where(v21, v2, v3); v24 = where(v22, v4, v5); v25 = where(v19, v8, v9); "
        "v26 = mul(v23, v24); v27 = add(v26, v25); v28 = add(v27, v14); v29 = add(v28, v10); v30 = mul(v13, 0.25); "
        "v31 = add(v29, v30); v32 = where(v15, 1.0, 0.5); v33 = mul(v31, v32)"
    ),
}


def make_constants(text: str, neurons: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Random constants of a program; those of one element in shapes [] and [1]."""
    names = parse_program(text).constant_names
    sizes = [(neurons,) if name[0] == "n" else (1,) * (index % 2) for index, name in enumerate(names)]
    return tuple(torch.randn(size, dtype=torch.float64).to(dtype) for size in sizes)


def make_program_call(shape: Shape, text: str, *, dtype: torch.dtype = torch.float64) -> SparseFfnCall:
    call = make_call(shape, gated=parse_program(text).gated, dtype=dtype, activation=text)
    return call._replace(constants=make_constants(text, shape.neurons, dtype))


def interleaved(call: SparseFfnCall) -> SparseFfnCall:
    """The same gated FFN with gate and up as every other row of one projection, as gpt-oss keeps them."""
    up, gate, down, up_bias, gate_bias, down_bias = call.weights
    assert gate is not None
    assert up_bias is not None
    assert gate_bias is not None
    both, bias = torch.stack([gate, up], 1).flatten(0, 1), torch.stack([gate_bias, up_bias], 1).flatten()
    weights = FfnWeights(both[1::2], both[::2], down, bias[1::2], bias[::2], down_bias)
    return call._replace(weights=weights)


def widen(weights: FfnWeights) -> FfnWeights:
    return FfnWeights._make(None if t is None else t.double() for t in weights)


def away_from_threshold(call: SparseFfnCall) -> SparseFfnCall:
    """The same call with router biases (fp32) that put tau between two tokens' scores, in the widest gap nearby, so
    that rounding does not decide which experts are active."""
    logits_TE = (call.x_D.flatten(0, -2).double() @ call.router_ED.double().t()).sort(0).values
    logits_TE = torch.cat([logits_TE[:1] - 1, logits_TE, logits_TE[-1:] + 1])
    threshold, bias_E = math.log(call.tau / (1 - call.tau)), call.router_bias_E
    shift_E = 0.0 if bias_E is None else bias_E.double()
    widest_E = []
    for logit_T, above in zip(logits_TE.t(), (logits_TE + shift_E < threshold).sum(0).tolist(), strict=True):
        nearby = min(4, len(logit_T) // 8)  # tokens that may change sides
        first = max(0, min(above, len(logit_T) - 1) - 1 - nearby)
        gaps = logit_T[first : first + 2 * nearby + 2].diff()
        widest = first + int(gaps.argmax())
        widest_E.append(threshold - float(logit_T[widest : widest + 2].mean()))
    return call._replace(router_bias_E=torch.tensor(widest_E, device=call.x_D.device))


def in_float64(call: SparseFfnCall) -> SparseFfnCall:
    """The same numbers in float64: what every other dtype is measured against."""
    bias = None if call.router_bias_E is None else call.router_bias_E.double()
    return call._replace(
        x_D=call.x_D.double(),
        router_x_C=None if call.router_x_C is None else call.router_x_C.double(),
        router_ED=call.router_ED.double(),
        router_bias_E=bias,
        weights=widen(call.weights),
        constants=tuple(constant.double() for constant in call.constants),
    )


def run_op(call: SparseFfnCall) -> Tensor:
    x, router, bias, weights, activation, size, tau, offsets, constants, *_ = call
    given = list(constants) if constants else None
    ffn = (*weights, activation, size, tau, offsets, given)
    result: Tensor = torch.ops.lte.sparse_ffn(x, router, bias, *ffn, density=call.density, x_router=call.router_x_C)
    return result


def with_router_input(call: SparseFfnCall, columns: int = 19) -> SparseFfnCall:
    """The same FFN behind a router that reads another tensor."""
    router_EC, x_D = call.router_ED.new_empty(len(call.router_ED), columns).normal_(), call.x_D
    return call._replace(router_ED=router_EC, router_x_C=x_D.new_empty(*x_D.shape[:-1], columns).normal_())


def relative_error(actual: Tensor, expected: Tensor) -> float:
    if expected.numel() == 0:
        return 0.0
    wide = expected.detach().double()
    return float((actual.detach().double() - wide).norm() / wide.norm().clamp_min(1e-300))


def with_tokens(shape: Shape, *tokens: int) -> Shape:
    return replace(shape, tokens=tokens)
