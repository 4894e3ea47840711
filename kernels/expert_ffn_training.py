"""What training takes beside lte::expert_ffn: an op that returns the projections too, and one for the gradients.

Shape suffixes: T tokens (all leading dimensions), D model width, F neurons, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from lte_compile.kernels.autocast import register_autocast
from lte_compile.kernels.expert_ffn_gradients import expert_ffn_gradients
from lte_compile.kernels.experts import check_experts, check_offsets
from lte_compile.kernels.ffn import FfnWeights, check_ffn, project_down
from lte_compile.kernels.ffn_products import choose_products
from lte_compile.kernels.gated_hidden import GatedRegion, gated_hidden
from lte_compile.kernels.layout import as_rows, is_neuron_major, own
from lte_compile.kernels.selection import check_density

_DOWN: Final = 4  # the down-projection among x, gates and the six weights


def check_expert_ffn(x: Tensor, gates: Tensor, weights: FfnWeights, region: GatedRegion) -> None:
    """ValueError unless shapes and dtypes fit one another."""
    check_ffn(x, weights, region.activation, region.constants)
    if x.dtype != weights.up_FD.dtype:
        raise ValueError(f"x is {x.dtype} and the weights {weights.up_FD.dtype}; cast one of them")
    if gates.ndim != x.ndim or not gates.is_floating_point():
        raise ValueError(
            f"gates must be floating point [..., experts] beside x {list(x.shape)}; "
            f"got {gates.dtype} {list(gates.shape)}"
        )
    check_experts(weights.up_FD.shape[0], gates.shape[-1], region.expert_size, region.offsets_E1)


def _check_values(x: Tensor, gates: Tensor, weights: FfnWeights, region: GatedRegion, density: float | None) -> None:
    """What fake tensors need not fulfil, too."""
    check_expert_ffn(x, gates, weights, region)
    if gates.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"gates {list(gates.shape)} and x {list(x.shape)} need the same leading dimensions")
    check_offsets(region.offsets_E1, weights.up_FD.shape[0])
    check_density(density)


def projected(
    x: Tensor, gates: Tensor, weights: FfnWeights, region: GatedRegion, density: float | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(y [..., D], up [T, F], gate [T, F]) of checked arguments."""
    _check_values(x, gates, weights, region, density)
    x_TD, gates_TE = as_rows(x), as_rows(gates)
    products = choose_products(x_TD, gates_TE, weights, region, density)
    up_TF, gate_TF = products.into_hidden(x_TD, weights)
    gated_TF = gated_hidden(up_TF, gate_TF, gates_TE, region, skip=products.skips)
    y_TD = project_down(gated_TF, weights)
    return own(y_TD.view(*x.shape[:-1], y_TD.shape[-1])), up_TF, gate_TF


@torch.library.custom_op("lte::expert_ffn_projections", mutates_args=())
def expert_ffn_projections(
    x: Tensor,
    gates: Tensor,
    w_up: Tensor,
    w_gate: Tensor | None,
    w_down: Tensor,
    b_up: Tensor | None,
    b_gate: Tensor | None,
    b_down: Tensor | None,
    activation: str,
    expert_size: int,
    expert_offsets: Tensor | None,
    constants: Sequence[Tensor],
    density: float | None,
) -> list[Tensor]:
    """lte::expert_ffn's result and what its backward pass wants to find: [y, up [T, F]], gated [y, up, gate [T, F]].

    Where `density` makes the products skip gates of zero, up and gate are unset there.
    """
    weights = FfnWeights(w_up, w_gate, w_down, b_up, b_gate, b_down)
    region = GatedRegion(activation, constants, expert_size, expert_offsets)
    return [tensor for tensor in projected(x, gates, weights, region, density) if tensor is not None]


@expert_ffn_projections.register_fake
def _(
    x: Tensor,
    gates: Tensor,
    w_up: Tensor,
    w_gate: Tensor | None,
    w_down: Tensor,
    b_up: Tensor | None,
    b_gate: Tensor | None,
    b_down: Tensor | None,
    activation: str,
    expert_size: int,
    expert_offsets: Tensor | None,
    constants: Sequence[Tensor],
    density: float | None,
) -> list[Tensor]:
    weights = FfnWeights(w_up, w_gate, w_down, b_up, b_gate, b_down)
    check_expert_ffn(x, gates, weights, GatedRegion(activation, constants, expert_size, expert_offsets))
    sides = (weights.up_FD, weights.gate_FD)
    tokens = math.prod(x.shape[:-1])
    projections = [x.new_empty((tokens, weight.shape[0])) for weight in sides if weight is not None]
    return [x.new_empty((*x.shape[:-1], w_down.shape[0])), *projections]


@torch.library.custom_op("lte::expert_ffn_backward", mutates_args=())
def expert_ffn_backward(
    grad: Tensor,
    x: Tensor,
    gates: Tensor,
    w_up: Tensor,
    w_gate: Tensor | None,
    w_down: Tensor,
    b_up: Tensor | None,
    b_gate: Tensor | None,
    b_down: Tensor | None,
    activation: str,
    expert_size: int,
    expert_offsets: Tensor | None,
    constants: Sequence[Tensor],
    wanted: Sequence[bool],
    up: Tensor | None = None,
    gate: Tensor | None = None,
    density: float | None = None,
) -> list[Tensor]:
    """Gradients of (x, gates, w_up, ... b_down, *constants), those `wanted` marks.

    `up` and `gate` are the projections that the forward pass saved; they are computed anew where it did not.
    """
    weights = FfnWeights(w_up, w_gate, w_down, b_up, b_gate, b_down)
    region = GatedRegion(activation, constants, expert_size, expert_offsets)
    grad_TD, x_TD, gates_TE = as_rows(grad), as_rows(x), as_rows(gates)
    products = choose_products(x_TD, gates_TE, weights, region, density)
    projections = (up, gate) if up is not None else products.into_hidden(x_TD, weights)
    found = expert_ffn_gradients(grad_TD, x_TD, gates_TE, weights, region, products, projections, wanted)
    inputs = (x, gates, *weights, *constants)
    return [g.reshape(like.shape) for g, like in zip(found, inputs, strict=True) if g is not None and like is not None]


@expert_ffn_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    gates: Tensor,
    w_up: Tensor,
    w_gate: Tensor | None,
    w_down: Tensor,
    b_up: Tensor | None,
    b_gate: Tensor | None,
    b_down: Tensor | None,
    activation: str,
    expert_size: int,
    expert_offsets: Tensor | None,
    constants: Sequence[Tensor],
    wanted: Sequence[bool],
    up: Tensor | None = None,
    gate: Tensor | None = None,
    density: float | None = None,
) -> list[Tensor]:
    inputs = (x, gates, w_up, w_gate, w_down, b_up, b_gate, b_down, *constants)
    grads = [t.new_empty(t.shape) if want and t is not None else None for t, want in zip(inputs, wanted, strict=True)]
    if grads[_DOWN] is not None and is_neuron_major(w_down):
        grads[_DOWN] = w_down.t().new_empty(w_down.t().shape).t()
    return [gradient for gradient in grads if gradient is not None]


register_autocast("expert_ffn_projections")
register_autocast("expert_ffn_backward")
