"""Reordering a site's neurons in place, so that consecutive neurons form an expert. Parameters keep names and shapes.

Shapes: D model width, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lte_compile.kernels.layout import neuron_major
from lte_compile.passes.ir import FfnSite, Fusion, WeightLayout


class Reordering(NamedTuple):
    """Entries [start, start + len(order)) of one axis of a parameter get a new order: the i-th was the order[i]-th."""

    parameter: str
    axis: int
    start: int
    order: Tensor

    def of(self, tensor: Tensor) -> Tensor:
        """The parameter's values in the new order."""
        index = torch.arange(tensor.shape[self.axis], device=tensor.device)
        index[self.start : self.start + len(self.order)] = self.order.to(tensor.device) + self.start
        return tensor.index_select(self.axis, index)


def reorderings(site: FfnSite, order_F: Tensor, shape_of: Callable[[str], Sequence[int]]) -> tuple[Reordering, ...]:
    """What makes neuron order_F[i] the i-th, for every parameter that follows the neurons; `shape_of` takes a name."""
    return (
        *_of_projections(site, order_F, shape_of),
        *_of_down_projection(site, order_F, shape_of),
        *(Reordering(name, list(shape_of(name)).index(site.hidden), 0, order_F) for name in site.hidden_parameters),
    )


def _of_projections(site: FfnSite, order_F: Tensor, shape_of: Callable[[str], Sequence[int]]) -> Iterator[Reordering]:
    projections = [(site.up, site.up_layout, site.up_bias, site.up_start, site.up_low_rank)]
    if site.gate is not None and site.fusion is Fusion.SEPARATE:
        projections.append((site.gate, site.gate_layout, site.gate_bias, site.gate_start, site.gate_low_rank))
    order = _up_order(site, order_F)
    for weight, layout, bias, start, low_rank in projections:
        axis = 0 if layout is WeightLayout.OUT_IN else 1
        yield Reordering(weight, axis, start, order)
        if bias is not None:
            yield Reordering(bias, 0, start, order)
        for factor in low_rank:
            yield Reordering(factor, _long_axis(factor, shape_of(weight)[axis], shape_of), start, order)


def _of_down_projection(
    site: FfnSite, order_F: Tensor, shape_of: Callable[[str], Sequence[int]]
) -> Iterator[Reordering]:
    axis = 1 if site.down_layout is WeightLayout.OUT_IN else 0
    yield Reordering(site.down, axis, site.down_start, order_F)
    for factor in site.down_low_rank:
        yield Reordering(factor, _long_axis(factor, shape_of(site.down)[axis], shape_of), site.down_start, order_F)


def _long_axis(factor: str, width: int, shape_of: Callable[[str], Sequence[int]]) -> int:
    """The axis of a low-rank factor that the layer's own width is on; the rank is smaller."""
    return list(shape_of(factor)).index(width)


def _up_order(site: FfnSite, order_F: Tensor) -> Tensor:
    """The order of the up parameter's output axis: `order_F` itself, or [2F] where gate and up alternate or follow."""
    if site.fusion is Fusion.SEPARATE:
        return order_F
    if site.fusion in (Fusion.GATE_THEN_UP, Fusion.UP_THEN_GATE):
        return torch.cat([order_F, order_F + site.hidden])
    return torch.stack([2 * order_F, 2 * order_F + 1], dim=1).flatten()


def projection_rows(model: nn.Module, site: FfnSite) -> Tensor:
    """The weights grouping looks at, [F, D]: the gate projection's rows in a gated FFN, else the up projection's."""
    weight = model.get_parameter(site.gate or site.up).detach()
    layout = site.up_layout if site.gate is None else site.gate_layout
    return _of_neurons(weight.flatten(1) if layout is WeightLayout.OUT_IN else weight.t(), site)


def up_projection(model: nn.Module, site: FfnSite) -> tuple[Tensor, Tensor | None]:
    """The up-projection's weight [F, D] and bias [F], also where one parameter holds the gate's too."""
    weight = model.get_parameter(site.up).detach()
    rows = weight.flatten(1) if site.up_layout is WeightLayout.OUT_IN else weight.t()
    bias = None if site.up_bias is None else model.get_parameter(site.up_bias).detach()
    neurons = _neurons_of_up(site)
    return rows[neurons], None if bias is None else bias[neurons]


def _neurons_of_up(site: FfnSite) -> slice:
    """Which rows of the up parameter are the up-projection's."""
    start, hidden = site.up_start, site.hidden
    match site.fusion:
        case Fusion.SEPARATE | Fusion.UP_THEN_GATE:
            return slice(start, start + hidden)
        case Fusion.GATE_THEN_UP:
            return slice(start + hidden, start + 2 * hidden)
        case Fusion.INTERLEAVED_GATE_FIRST:
            return slice(start + 1, start + 2 * hidden, 2)
        case Fusion.INTERLEAVED_UP_FIRST:
            return slice(start, start + 2 * hidden, 2)


def projection_bias(model: nn.Module, site: FfnSite) -> Tensor | None:
    """The bias that goes with `projection_rows`, [F], if there is one."""
    name = site.up_bias if site.gate is None else site.gate_bias
    return None if name is None else _of_neurons(model.get_parameter(name).detach(), site)


def _of_neurons(rows: Tensor, site: FfnSite) -> Tensor:
    """Of what the gate projection (or else the up projection) has a row for, the rows that are the FFN's neurons."""
    start = site.up_start if site.gate is None else site.gate_start
    match site.fusion:
        case Fusion.SEPARATE | Fusion.GATE_THEN_UP:
            return rows[start : start + site.hidden]
        case Fusion.UP_THEN_GATE:
            return rows[start + site.hidden : start + 2 * site.hidden]
        case Fusion.INTERLEAVED_GATE_FIRST:
            return rows[start : start + 2 * site.hidden : 2]
        case Fusion.INTERLEAVED_UP_FIRST:
            return rows[start + 1 : start + 2 * site.hidden : 2]


@torch.no_grad()
def permute_neurons(model: nn.Module, site: FfnSite, order_F: Tensor) -> None:
    """Neuron i of the result is neuron order_F[i] of before. The FFN's function is unchanged up to summation order."""
    for reordering in reorderings(site, order_F, lambda name: model.get_parameter(name).shape):
        parameter = model.get_parameter(reordering.parameter)
        parameter.copy_(reordering.of(parameter))


@torch.no_grad()
def lay_out_neuron_major(model: nn.Module, site: FfnSite) -> None:
    """Give the 2-d weights a memory layout in which one neuron's numbers are adjacent, so that decode reads rows.

    Shapes, names and values stay; only strides change: nn.Linear's down-projection, Conv1D's up-projection.
    """
    for parameter in _across_neurons(model, site):
        parameter.data = neuron_major(parameter.data)


@torch.no_grad()
def lay_out_contiguous(model: nn.Module, site: FfnSite) -> None:
    """Undo `lay_out_neuron_major`."""
    for parameter in _across_neurons(model, site):
        parameter.data = parameter.data.contiguous()


def _across_neurons(model: nn.Module, site: FfnSite) -> Iterator[nn.Parameter]:
    """The matrices that, stored contiguously, keep a neuron's numbers apart."""
    across = [site.down] if site.down_layout is WeightLayout.OUT_IN else []
    across += [site.up] if site.up_layout is WeightLayout.IN_OUT else []
    return (p for p in map(model.get_parameter, across) if p.dim() == 2)
