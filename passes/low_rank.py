"""Linear layers with low-rank updates, as unmerged LoRA writes them: `x W^T + s (x A^T) B^T` counts as one layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch.fx as fx

from lte_compile.passes.dataflow import CAST_OPS, REGROUP_OPS, GraphView, is_tensor, op_name, shape_of
from lte_compile.passes.linear import Linear

_ADDS = frozenset(("add", "add_", "__add__", "__iadd__", "iadd"))
_SCALES = frozenset(("mul", "mul_", "div", "__mul__", "__rmul__"))
_VIEWS = CAST_OPS | REGROUP_OPS
_DEPTH = 3  # sums between a layer and its update: a bias, a residual, another update


def join_updates(view: GraphView, linears: tuple[Linear, ...]) -> tuple[Linear, ...]:
    """The layers in graph order, those with updates as one each; the updates' own two layers are left out."""
    layers = {linear.result: linear for linear in linears}
    factors: set[Linear] = set()
    for node in view.order:
        joined = _joined(view, layers, node)
        if joined is not None:
            before, after = joined
            del layers[before.result]
            layers[after.result] = after
            factors.update(after.factors[-1])
    kept = (layer for layer in layers.values() if layer not in factors)
    return tuple(sorted(kept, key=lambda layer: view.order[layer.node]))


def _joined(view: GraphView, layers: Mapping[fx.Node, Linear], node: fx.Node) -> tuple[Linear, Linear] | None:
    """A layer that `node` adds an update to, without and with it; None where it adds something else.

    In `x + layer(h) + update(h)` the update comes second to a sum; the layer's result then stays its own.
    """
    if not _is_sum(view, node):
        return None
    for base, update in (node.all_input_nodes, node.all_input_nodes[::-1]):
        second = layers.get(_behind(view, update, scaled=True))
        first = None if second is None else layers.get(_behind(view, second.data, scaled=False))
        if second is None or first is None:
            continue
        for term in _terms(view, base):
            layer = layers.get(term)
            if layer is None or not _is_update(view, layer, first, second):
                continue
            nodes = _nodes_between(view, _source(view, layer.data), update)
            result = node if _read_only_by(node, base, layer.result) else layer.result
            out_axis = len(shape_of(result)) + _from_end(layer.result, layer.out_axis)
            readers, factors = (*layer.readers, *nodes), (*layer.factors, (first, second))
            return layer, replace(layer, result=result, out_axis=out_axis, readers=readers, factors=factors)
    return None


def _is_sum(view: GraphView, node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method") or op_name(view, node) not in _ADDS or not is_tensor(node):
        return False
    return bool(node.kwargs.get("alpha", 1) == 1) and len(node.all_input_nodes) == 2


def _terms(view: GraphView, base: fx.Node, depth: int = _DEPTH) -> Iterator[fx.Node]:
    """What a sum adds up, and the sums among that."""
    term = _behind(view, base, scaled=False)
    yield term
    if depth and _is_sum(view, term):
        for source in term.all_input_nodes:
            yield from _terms(view, source, depth - 1)


def _is_update(view: GraphView, layer: Linear, first: Linear, second: Linear) -> bool:
    plain = all(factor.problem is None and factor.bias is None and not factor.factors for factor in (first, second))
    narrow = first.out_width == second.in_width < min(layer.in_width, layer.out_width)
    widths = (first.in_width, second.out_width) == (layer.in_width, layer.out_width)
    axes = _from_end(layer.data, layer.axis) == _from_end(first.data, first.axis)
    axes &= _from_end(layer.result, layer.out_axis) == _from_end(second.result, second.out_axis)
    return plain and narrow and widths and axes and _source(view, first.data) is _source(view, layer.data)


def _from_end(node: fx.Node, axis: int) -> int:
    """The axis counted from the end, negative: tokens may be flattened for one of two layers only."""
    return axis - len(shape_of(node))


def _behind(view: GraphView, node: fx.Node, *, scaled: bool) -> fx.Node:
    """The node seen through views, casts and, if `scaled`, products with one number."""
    while node.all_input_nodes:
        name = op_name(view, node)
        if name not in _VIEWS and not (scaled and name in _SCALES and len(node.all_input_nodes) == 1):
            break
        node = node.all_input_nodes[0]
    return node


def _source(view: GraphView, node: fx.Node) -> fx.Node:
    """The node seen through views, casts and dropout."""
    while node.all_input_nodes and (op_name(view, node) in _VIEWS or "dropout" in op_name(view, node)):
        node = node.all_input_nodes[0]
    return node


def _read_only_by(reader: fx.Node, base: fx.Node, result: fx.Node) -> bool:
    """Whether `reader` is the only one that sees the layer's result, which it reads as `base`."""
    node = base
    while set(node.users) == {reader}:
        if node is result:
            return True
        node, reader = node.all_input_nodes[0], node
    return False


def _nodes_between(view: GraphView, source: fx.Node, end: fx.Node) -> tuple[fx.Node, ...]:
    """What computes `end` from `source`, parameters left out."""
    found: dict[fx.Node, None] = {}
    todo = [end]
    while todo:
        node = todo.pop()
        if node is not source and node not in view.constants and node not in found:
            found[node] = None
            todo.extend(node.all_input_nodes)
    return tuple(found)
