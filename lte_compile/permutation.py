"""Reordering a site's neurons in place, so that consecutive neurons form an expert. Parameters keep names and shapes.

Shapes: D model width, F neurons.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lte_compile.kernels.layout import neuron_major
from lte_compile.passes.ir import FfnSite, Fusion, WeightLayout


def projection_rows(model: nn.Module, site: FfnSite) -> Tensor:
    """The weights grouping looks at, [F, D]: the gate projection's rows in a gated FFN, else the up projection's."""
    weight = model.get_parameter(site.gate or site.up).detach()
    rows = weight.flatten(1) if site.up_layout is WeightLayout.OUT_IN else weight.t()
    return rows if site.fusion is Fusion.SEPARATE else rows[_gate_rows(site)]


def _gate_rows(site: FfnSite) -> Tensor:
    neurons_F = torch.arange(site.hidden)
    match site.fusion:
        case Fusion.GATE_THEN_UP:
            return neurons_F
        case Fusion.UP_THEN_GATE:
            return neurons_F + site.hidden
        case Fusion.INTERLEAVED_GATE_FIRST:
            return 2 * neurons_F
        case Fusion.INTERLEAVED_UP_FIRST:
            return 2 * neurons_F + 1
        case _:
            raise AssertionError(f"{site.fusion} shares no parameter")


def _up_order(site: FfnSite, order_F: Tensor) -> Tensor:
    """The order of the up parameter's output axis: `order_F` itself, or [2F] where gate and up share the parameter."""
    if site.fusion is Fusion.SEPARATE:
        return order_F
    if site.fusion in (Fusion.GATE_THEN_UP, Fusion.UP_THEN_GATE):
        return torch.cat([order_F, order_F + site.hidden])
    return torch.stack([2 * order_F, 2 * order_F + 1], dim=1).flatten()


@torch.no_grad()
def permute_neurons(model: nn.Module, site: FfnSite, order_F: Tensor) -> None:
    """Neuron i of the result is neuron order_F[i] of before. The FFN's function is unchanged up to summation order."""
    up_axis = 0 if site.up_layout is WeightLayout.OUT_IN else 1
    down_axis = 1 if site.down_layout is WeightLayout.OUT_IN else 0
    up_order = _up_order(site, order_F)
    axes = {site.up: (up_axis, up_order), site.down: (down_axis, order_F)}
    if site.gate:
        axes[site.gate] = (up_axis, up_order)
    for bias in (site.up_bias, site.gate_bias):
        if bias:
            axes[bias] = (0, up_order)
    for name, (axis, order) in axes.items():
        _reorder(model.get_parameter(name), axis, order)
    for name in site.hidden_parameters:
        parameter = model.get_parameter(name)
        _reorder(parameter, list(parameter.shape).index(site.hidden), order_F)


def _reorder(parameter: nn.Parameter, axis: int, order: Tensor) -> None:
    parameter.copy_(parameter.index_select(axis, order.to(parameter.device)))


@torch.no_grad()
def lay_out_neuron_major(model: nn.Module, site: FfnSite) -> None:
    """Give the 2-d weights a memory layout in which one neuron's numbers are adjacent, so that decode reads rows.

    Shapes, names and values stay; only strides change: nn.Linear's down-projection, Conv1D's up-projection.
    """
    across = [site.down] if site.down_layout is WeightLayout.OUT_IN else []
    across += [site.up] if site.up_layout is WeightLayout.IN_OUT else []
    for name in across:
        parameter = model.get_parameter(name)
        if parameter.dim() == 2:
            parameter.data = neuron_major(parameter.data)
