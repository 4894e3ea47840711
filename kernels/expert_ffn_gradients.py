"""The gradients of lte::expert_ffn, from the projections into the hidden value.

Shape suffixes: T tokens (all leading dimensions), D model width, F neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from torch import Tensor

from lte_compile.kernels.ffn import FfnWeights
from lte_compile.kernels.ffn_products import Pair, Products
from lte_compile.kernels.gated_hidden import GatedGradients, GatedRegion, Wanted, gated_hidden_gradients

_NAMES: Final = ("x", "gates", "up", "gate", "down", "up_bias", "gate_bias", "down_bias")
_INTO_HIDDEN: Final = ("x", "up", "gate", "up_bias", "gate_bias")
Wants = dict[str, bool]
Gradients = dict[str, Tensor]


def expert_ffn_gradients(
    grad_TD: Tensor,
    x_TD: Tensor,
    gates_TE: Tensor,
    weights: FfnWeights,
    region: GatedRegion,
    products: Products,
    projections_TF: Pair,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Of (x, gates, the six weights, *constants); None where `wanted` says False."""
    names = (*_NAMES, *(f"constant {i}" for i in range(len(region.constants))))
    want = dict(zip(names, wanted, strict=True))
    grads: Gradients = {}
    if want["down_bias"]:
        grads["down_bias"] = grad_TD.sum(0)
    if needed := _needed(want):
        grad_gated_TF = products.back_through_down(grad_TD, weights.down_DF)
        of_hidden = gated_hidden_gradients(
            *(grad_gated_TF, *projections_TF, gates_TE, region, needed), overwrite=True, skip=products.skips
        )
        del grad_gated_TF
        if of_hidden.gated_F is not None:
            grads["down"] = products.down_gradient(grad_TD, of_hidden.gated_F, weights.down_DF)
            of_hidden = of_hidden._replace(gated_F=None)  # gives its memory back before x's gradient needs some
        if of_hidden.gates_E is not None:
            grads["gates"] = of_hidden.gates_E
        grads |= {f"constant {i}": gradient for i, gradient in enumerate(of_hidden.constants)}
        _into_hidden(grads, want, x_TD, weights, products, of_hidden)
    return [grads[name] if is_wanted else None for name, is_wanted in want.items()]


def _needed(want: Wants) -> Wanted | None:
    """What of the hidden region's gradients the wanted ones are made of."""
    into_hidden = any(want[name] for name in _INTO_HIDDEN)
    constants = any(want[name] for name in want if name not in _NAMES)
    needed = Wanted(want["down"], into_hidden, want["gates"], constants)
    return needed if any(needed) else None


def _into_hidden(
    grads: Gradients, want: Wants, x_TD: Tensor, weights: FfnWeights, products: Products, of_hidden: GatedGradients
) -> None:
    """Adds the gradients of x and of the projections into the hidden value."""
    sides = (("up", weights.up_FD, of_hidden.up_F), ("gate", weights.gate_FD, of_hidden.gate_F))
    given = {name: (weight, grad) for name, weight, grad in sides if weight is not None and grad is not None}
    asked = [name for name in given if want[name]]
    grads |= zip(asked, products.into_hidden_gradients([given[name][1] for name in asked], x_TD), strict=True)
    for name, (weight_FD, grad_TF) in given.items():
        if want[f"{name}_bias"]:
            grads[f"{name}_bias"] = grad_TF.sum(0)
        if want["x"]:
            grads["x"] = grads["x"].addmm_(grad_TF, weight_FD) if "x" in grads else grad_TF @ weight_FD
