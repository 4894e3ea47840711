"""Constants with one value per neuron: which parameters they are made of, so that these can follow their neurons."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch.fx as fx

from lte_compile.passes.dataflow import GraphView, is_pointwise, is_tensor, shape_of
from lte_compile.passes.steps import Blocked, step_back


def neuron_parameters(view: GraphView, node: fx.Node, hidden: int) -> frozenset[str] | None:
    """The per-neuron parameters that a constant of `hidden` values is computed from, value by value.

    `scale`, `scale.view(1, 1, F)`, `torch.exp(scale)`, `scale * strength` with a single number; None for anything else,
    such as a table of tokens times neurons, a buffer, or `scale / scale.norm()`.
    """
    shape = shape_of(node)
    if math.prod(shape) != hidden or hidden not in shape:
        return None
    name = view.parameter_name(node)
    if name is not None:
        return None if name in view.buffers else frozenset((name,))
    step = step_back(view, node, shape.index(hidden))
    if isinstance(step, Blocked) or not step.sources or not all(_is_single(view, side) for side in step.sides):
        return None
    behind = [neuron_parameters(view, source, hidden) for source, _ in step.sources]
    return None if None in behind else frozenset().union(*(names for names in behind if names is not None))


def _is_single(view: GraphView, node: fx.Node) -> bool:
    """Computed from single numbers only, so that the order of neurons cannot matter to it."""
    if math.prod(shape_of(node)) != 1:
        return False
    return view.parameter_name(node) is not None or all(_is_single(view, source) for source in node.all_input_nodes)


def computed_constants(view: GraphView, nodes: Iterable[fx.Node], hidden: int) -> frozenset[fx.Node]:
    """What computes the constants that `nodes` read from parameters, element-wise: softplus(alpha), -scale.

    Single numbers and values of neurons only. A region is run with these nodes: `clamp(h, -scale, scale)` has one
    constant, not two of any values.
    """
    found: set[fx.Node] = set()
    todo = [source for node in nodes for source in node.all_input_nodes]
    while todo:
        node = todo.pop()
        is_call = node.op in ("call_function", "call_method")
        if node in found or node not in view.constants or not is_call or math.prod(shape_of(node)) not in (1, hidden):
            continue
        if is_tensor(node) and is_pointwise(view, node):
            found.add(node)
            todo += node.all_input_nodes
    return frozenset(found)
