"""How far one training layer's result and gradients are from float64, and that repeating it changes no bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lte_compile.kernels.expert_ffn import expert_ffn_reference
from lte_compile.kernels.ffn import FfnWeights
from lte_compile.kernels.route import route_reference

TOKENS, WIDTH, NEURONS, EXPERT_SIZE = 1024, 4096, 11008, 32
REPEATS = 5


def error_of(dtype: torch.dtype, density: float | None) -> float:
    """The largest relative error. With a density, gates are zeros and ones; without, a trained router's scores.

    Raises:
        AssertionError: a repetition gave other bits.
    """
    torch.manual_seed(0)
    leaves, gates_TE, grad_TD = _problem(dtype, density)
    found = _by_ops(leaves, gates_TE, grad_TD, density)
    for _ in range(REPEATS):
        again = _by_ops(leaves, gates_TE, grad_TD, density)
        assert all(map(torch.equal, again, found)), "a repetition gave other bits"
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = _by_reference(wide, None if gates_TE is None else gates_TE.double(), grad_TD.double())
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))


def _problem(dtype: torch.dtype, density: float | None) -> tuple[list[Tensor], Tensor | None, Tensor]:
    """x, up, gate and down, and the router's weight if it trains; gates if it does not; the result's gradient."""

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, device="cuda").div(size[-1] ** 0.5).to(dtype).requires_grad_()

    x_TD = torch.randn(TOKENS, WIDTH, device="cuda").to(dtype).requires_grad_()
    leaves = [x_TD, draw(NEURONS, WIDTH), draw(NEURONS, WIDTH), draw(WIDTH, NEURONS)]
    grad_TD = torch.randn_like(x_TD)
    experts = NEURONS // EXPERT_SIZE
    if density is None:
        return [*leaves, draw(experts, WIDTH)], None, grad_TD
    return leaves, (torch.rand(TOKENS, experts, device="cuda") < density).float(), grad_TD


def _by_ops(leaves: Sequence[Tensor], gates_TE: Tensor | None, grad_TD: Tensor, density: float | None) -> list[Tensor]:
    x_TD, up, gate, down, *router = leaves
    if gates_TE is None:
        gates_TE = torch.ops.lte.route(x_TD, router[0], None)
    weights = (up, gate, down, None, None, None)
    y_TD = torch.ops.lte.expert_ffn(x_TD, gates_TE, *weights, "silu", EXPERT_SIZE, density=density)
    return [y_TD.detach(), *torch.autograd.grad(y_TD, leaves, grad_TD)]


def _by_reference(leaves: Sequence[Tensor], gates_TE: Tensor | None, grad_TD: Tensor) -> list[Tensor]:
    x_TD, up, gate, down, *router = leaves
    if gates_TE is None:
        gates_TE = route_reference(x_TD, router[0], None)
    y_TD = expert_ffn_reference(x_TD, gates_TE, FfnWeights(up, gate, down, None, None, None), "silu", EXPERT_SIZE)
    return [y_TD.detach(), *torch.autograd.grad(y_TD, leaves, grad_TD)]
