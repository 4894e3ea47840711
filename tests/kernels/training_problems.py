"""lte::expert_ffn with gradients against float64: what the interpreted and the GPU tests have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import lte_compile.kernels.ops  # noqa: F401
from lte_compile.kernels.expert_ffn import expert_ffn_reference
from lte_compile.kernels.ffn import FfnWeights
from tests.kernels.problems import Shape, make_weights, relative_error


@dataclass(frozen=True)
class TrainingProblem:
    """One call of lte::expert_ffn and the gradient of its result. With a density, gates are zeros and ones."""

    x: Tensor
    gates: Tensor
    weights: FfnWeights
    activation: str
    expert_size: int
    constants: tuple[Tensor, ...]
    density: float | None
    grad: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        """What gets gradients: x, the weights, and gates that are not a selection."""
        gates = [] if self.density is not None else [self.gates]
        return [self.x, *gates, *(weight for weight in self.weights if weight is not None)]

    def by_op(self) -> list[Tensor]:
        """The result and the gradients of the leaves."""
        leaves = [leaf.requires_grad_() for leaf in self.leaves]
        rest = (self.activation, self.expert_size, None, list(self.constants) or None, self.density)
        result = torch.ops.lte.expert_ffn(self.x, self.gates, *self.weights, *rest)
        return [result.detach(), *torch.autograd.grad(result, leaves, self.grad)]

    def exact(self) -> list[Tensor]:
        """The same in float64."""
        wide = {
            id(t): t.detach().double().requires_grad_() for t in (self.x, self.gates, *self.weights) if t is not None
        }
        weights = FfnWeights._make(None if t is None else wide[id(t)] for t in self.weights)
        constants = [constant.double() for constant in self.constants]
        rest = (self.activation, self.expert_size, None, constants)
        result = expert_ffn_reference(wide[id(self.x)], wide[id(self.gates)], weights, *rest)
        leaves = [wide[id(leaf)] for leaf in self.leaves]
        return [result.detach(), *torch.autograd.grad(result, leaves, self.grad.double())]

    def error(self) -> float:
        """The largest relative error among them."""
        return max(map(relative_error, self.by_op(), self.exact()))


def make_problem(
    shape: Shape,
    *,
    activation: str = "silu",
    gated: bool = True,
    dtype: torch.dtype = torch.float32,
    density: float | None = None,
    constants: Sequence[Tensor] = (),
    device: str = "cpu",
) -> TrainingProblem:
    def move(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).to(device)  # which keeps a transposed layout

    weights = make_weights(shape, gated=gated, biases=gated)
    gates = torch.rand(*shape.tokens, shape.experts)
    return TrainingProblem(
        x=move(torch.randn(*shape.tokens, shape.width)),
        gates=(gates if density is None else (gates < density).float()).to(device),
        weights=FfnWeights._make(None if t is None else move(t) for t in weights),
        activation=activation,
        expert_size=shape.expert_size,
        constants=tuple(constant.to(device) for constant in constants),
        density=density,
        grad=move(torch.randn(*shape.tokens, shape.width)),
    )
