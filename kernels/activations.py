"""Element-wise activations by name: the function, and its backward given the pre-activation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

QUICK_GELU_SLOPE = 1.702  # Hendrycks & Gimpel 2016 (arXiv 1606.08415), section 2: x * sigmoid(1.702 x)
LEAKY_RELU_SLOPE = 0.01  # torch.nn.LeakyReLU's default


@dataclass(frozen=True)
class Activation:
    """`apply(z)` has z's shape and dtype; `backward(grad, z)` is grad * apply'(z), rounded once to z's dtype."""

    apply: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]

    def derivative(self, z: Tensor) -> Tensor:
        return self.backward(torch.ones_like(z), z)


def _quick_gelu(z: Tensor) -> Tensor:
    return z * torch.sigmoid(QUICK_GELU_SLOPE * z)


def _quick_gelu_backward(grad: Tensor, z: Tensor) -> Tensor:
    wide = z if z.dtype == torch.float64 else z.float()
    s = torch.sigmoid(QUICK_GELU_SLOPE * wide)
    return (grad * (s + QUICK_GELU_SLOPE * wide * s * (1 - s))).to(z.dtype)


def _relu_squared(z: Tensor) -> Tensor:
    return torch.relu(z).square()


# The aten backward kernels take one pass and compute half precision in fp32. Those of sigmoid and tanh want the output.
ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(torch.relu, lambda g, z: aten.threshold_backward(g, z, 0)),
    "gelu": Activation(F.gelu, lambda g, z: aten.gelu_backward(g, z)),
    "gelu_tanh": Activation(
        lambda z: F.gelu(z, approximate="tanh"), lambda g, z: aten.gelu_backward(g, z, approximate="tanh")
    ),
    "silu": Activation(F.silu, lambda g, z: aten.silu_backward(g, z)),
    "quick_gelu": Activation(_quick_gelu, _quick_gelu_backward),
    "relu_squared": Activation(_relu_squared, lambda g, z: g * (2 * torch.relu(z))),
    "sigmoid": Activation(torch.sigmoid, lambda g, z: aten.sigmoid_backward(g, torch.sigmoid(z))),
    "tanh": Activation(torch.tanh, lambda g, z: aten.tanh_backward(g, torch.tanh(z))),
    "identity": Activation(lambda z: z, lambda g, z: g),
    "leaky_relu": Activation(
        lambda z: F.leaky_relu(z, LEAKY_RELU_SLOPE),
        lambda g, z: aten.leaky_relu_backward(g, z, LEAKY_RELU_SLOPE, False),
    ),
    "elu": Activation(F.elu, lambda g, z: aten.elu_backward(g, 1.0, 1.0, 1.0, False, z)),
    "mish": Activation(F.mish, lambda g, z: aten.mish_backward(g, z)),
}


def find_activation(name: str) -> Activation:
    """The activation of that name, or a ValueError that lists the known ones."""
    try:
        return ACTIVATIONS[name]
    except KeyError:
        near = get_close_matches(name, ACTIVATIONS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown activation {name!r}; known are {', '.join(ACTIVATIONS)}{hint}") from None
