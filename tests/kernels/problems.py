"""Random FFN problems for the op tests. T tokens, D model width, F neurons, E experts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lte_compile.kernels.experts import count_experts
from lte_compile.kernels.ffn import FfnWeights
from lte_compile.kernels.layout import neuron_major
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall

# How far a result in this dtype may be from float64, relative to the norm: a few roundings of its unit roundoff
# (2^-24, 2^-11, 2^-8, 2^-53), as products, hidden values and outputs are rounded once each.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


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


def widen(weights: FfnWeights) -> FfnWeights:
    return FfnWeights._make(None if t is None else t.double() for t in weights)


def in_float64(call: SparseFfnCall) -> SparseFfnCall:
    """The same numbers in float64: what every other dtype is measured against."""
    bias = None if call.router_bias_E is None else call.router_bias_E.double()
    return call._replace(
        x_D=call.x_D.double(), router_ED=call.router_ED.double(), router_bias_E=bias, weights=widen(call.weights)
    )


def run_op(call: SparseFfnCall) -> Tensor:
    x, router, bias, weights, activation, size, tau, offsets = call
    result: Tensor = torch.ops.lte.sparse_ffn(x, router, bias, *weights, activation, size, tau, offsets)
    return result


def relative_error(actual: Tensor, expected: Tensor) -> float:
    if expected.numel() == 0:
        return 0.0
    wide = expected.detach().double()
    return float((actual.detach().double() - wide).norm() / wide.norm().clamp_min(1e-300))


def with_tokens(shape: Shape, *tokens: int) -> Shape:
    return replace(shape, tokens=tokens)
