"""The reference of lte::sparse_ffn, and the call that every implementation of it takes.

Shape suffixes: T tokens (all leading dimensions), D model width, F neurons, E experts, C columns that the router
reads.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lte_compile.kernels.experts import expand_to_neurons
from lte_compile.kernels.ffn import FfnWeights, hidden_value, project_down
from lte_compile.kernels.route import route_reference


class SparseFfnCall(NamedTuple):
    """The arguments of one call of lte::sparse_ffn, checked."""

    x_D: Tensor
    router_ED: Tensor
    router_bias_E: Tensor | None
    weights: FfnWeights
    activation: str
    expert_size: int
    tau: float
    offsets_E1: Tensor | None
    constants: tuple[Tensor, ...] = ()  # of a region program given as `activation`
    density: float | None = None  # share of active experts to expect: guides the choice of a kernel, never the result
    router_x_C: Tensor | None = None  # what the router reads, [..., C], where that is not x

    @property
    def router_input(self) -> Tensor:
        """x, or what the router reads in its place: the router's weight has as many columns."""
        return self.x_D if self.router_x_C is None else self.router_x_C


def active_experts(call: SparseFfnCall) -> Tensor:
    """Bool [..., E]: score > tau, decided in fp32 (fp64 for fp64 x) on x as it came. NaN > tau is False."""
    return route_reference(call.router_input, call.router_ED, call.router_bias_E) > call.tau


def sparse_ffn_reference(call: SparseFfnCall) -> Tensor:
    """Every expert computed, the unselected ones set to zero: right for any shape, dtype and device."""
    active_E = active_experts(call)
    hidden_F = hidden_value(call.x_D.to(call.weights.up_FD.dtype), call.weights, call.activation, call.constants)
    active_F = expand_to_neurons(active_E, hidden_F.shape[-1], call.expert_size, call.offsets_E1)
    return project_down(hidden_F.masked_fill(~active_F, 0), call.weights)
