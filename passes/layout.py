"""Which view of an FFN's input, and which of its gates, a fused node should read, so that their tokens line up.

A model may flatten tokens between the router and the projections (GPT-2's Conv1D), before both, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch.fx as fx
from torch import Tensor

from lte_compile.passes.anchors import views_back
from lte_compile.passes.building import Builder, leading_sizes, same_sizes
from lte_compile.passes.dataflow import fake_value, shape_of


@dataclass(frozen=True)
class AlignedInputs:
    """x [..., D] and gates [..., E] with the same leading sizes."""

    x: fx.Node
    gates: fx.Node


def align(x_views: Iterable[fx.Node], gates: fx.Node, result: fx.Node) -> AlignedInputs | None:
    """A view of x and a view of the gates that line up, and give `result`'s shape as they are or flattened.

    Pairs that line up with `result` as it is come first. None where there is no such pair.
    """
    pairs = [
        AlignedInputs(x, gate)
        for x in x_views
        for gate in same_width_views(gates)
        if same_sizes(leading_sizes(x), leading_sizes(gate))
    ]
    fitting = (pair for pair in pairs if same_sizes(leading_sizes(pair.x), leading_sizes(result)))
    return next(fitting, pairs[0] if pairs and _is_flat(result) else None)


def same_width_views(node: fx.Node) -> Iterator[fx.Node]:
    """The node, and what it is a view of, as long as the last axis and the dtype stay."""
    dtype, width = _dtype(node), shape_of(node)[-1]
    for view in views_back(node):
        if not isinstance(fake_value(view), Tensor) or _dtype(view) != dtype or shape_of(view)[-1:] != (width,):
            return
        yield view


def shaped_like(builder: Builder, y: fx.Node, target: fx.Node) -> fx.Node:
    """`y` in the shape of `target`, which is y's own or [tokens, D]."""
    if same_sizes(leading_sizes(y), leading_sizes(target)):
        return y
    assert _is_flat(target)
    return builder.reshape(y, [-1, shape_of(target)[-1]])


def _is_flat(node: fx.Node) -> bool:
    return len(shape_of(node)) == 2


def _dtype(node: fx.Node) -> object:
    return getattr(fake_value(node), "dtype", None)
