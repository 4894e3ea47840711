"""Giving an FFN the part of a layer that is its own, so that it can be fused while the rest of the layer stays.

q, h = linear(x, w).split(...)    ==>   q = linear(x, w[:n]); h = linear(x, w[n:])
linear(cat([a, h]), w, b)         ==>   linear(a, w[:, :n], b) + linear(h, w[:, n:])
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.fx as fx

from lte_compile.passes.building import Builder
from lte_compile.passes.dataflow import GraphView, argument, fake_value, op_name, shape_of
from lte_compile.passes.ir import CapturedGraph, WeightLayout
from lte_compile.passes.linear import Linear
from lte_compile.passes.parts import SPLITS, input_parts, output_windows


def look_through_joins(graph: CapturedGraph) -> None:
    """What a split takes out of a `cat` is read from the cat's operand instead, where the two agree on sizes.

    The hook of a down-projection that reads cat[attention, neurons] leaves such a pair.
    """
    view = GraphView.of(graph)
    for node in [node for node in view.order if op_name(view, node) == "getitem" and node.users]:
        operand = _joined_operand(view, node)
        if operand is None:
            continue
        node.replace_all_uses_with(operand)
        split = node.all_input_nodes[0]
        _erase_unread(graph, [*split.users, split, *split.all_input_nodes])


def _erase_unread(graph: CapturedGraph, nodes: list[fx.Node]) -> None:
    """A cat that nothing reads any more would still count as a use of the hidden value."""
    for node in nodes:
        if not node.users:
            graph.module.graph.erase_node(node)


def _joined_operand(view: GraphView, node: fx.Node) -> fx.Node | None:
    """The operand of the cat that `node`, one tensor of a split, is all of."""
    split, index = node.args[:2]
    if not isinstance(split, fx.Node) or not isinstance(index, int) or op_name(view, split) not in SPLITS:
        return None
    cat, dim = split.args[0], argument(split, 2, "dim", default=0)
    if not isinstance(cat, fx.Node) or op_name(view, cat) not in ("cat", "concat", "concatenate"):
        return None
    rank = len(shape_of(cat))
    if dim % rank != argument(cat, 1, "dim", "axis", default=0) % rank:
        return None
    windows = list(_windows([value.shape[dim] for value in fake_value(split)]))
    operands = argument(cat, 0, "tensors")
    for operand, window in zip(operands, _windows([fake_value(each).shape[dim] for each in operands]), strict=True):
        if window == windows[index]:
            return operand if isinstance(operand, fx.Node) else None
    return None


def _windows(sizes: list[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for size in sizes:
        yield start, start + size
        start += size


def separable(view: GraphView, linear: Linear) -> bool:
    """Whether a part's layer can be taken apart: every use of its result is one of a known part."""
    whole = linear.whole
    if whole is None or linear.data is not whole.data:  # a down-projection's part reads another tensor than the whole
        return True
    parts = {node for node, _ in output_windows(view, whole)}
    users = [user for user in whole.result.users if user not in parts]
    return all(op_name(view, user) in SPLITS and parts.issuperset(user.users) for user in users)


def write_other_outputs(graph: CapturedGraph, part: Linear) -> None:
    """Layers of their own for what else is read of the layer that `part` is a part of."""
    whole = part.whole
    assert whole is not None
    view = GraphView.of(graph)
    for node, start in list(output_windows(view, whole)):
        if node.users:
            builder = Builder(graph, node)
            weight = cut_outputs(builder, whole, (start, start + shape_of(node)[-1], 1))
            node.replace_all_uses_with(builder.call(torch.ops.aten.linear.default, whole.data, *weight))


def write_other_inputs(builder: Builder, view: GraphView, part: Linear) -> fx.Node | None:
    """What a down-projection makes of the tensors beside the hidden value, its bias included; None without any."""
    assert part.whole is not None
    total: fx.Node | None = None
    bias = None if part.bias is None else builder.parameter(part.bias)
    for other in input_parts(view, part.whole):
        if other.start == part.start:
            continue
        result = builder.call(torch.ops.aten.linear.default, other.data, cut_inputs(builder, other), bias)
        total, bias = (result if total is None else builder.call(torch.ops.aten.add.Tensor, total, result)), None
    return total


def weight_of(builder: Builder, linear: Linear) -> fx.Node:
    """The layer's weight in nn.Linear orientation, [out, in]."""
    assert linear.weight is not None
    node = builder.parameter(linear.weight)
    return builder.call(torch.ops.aten.t.default, node) if linear.layout is WeightLayout.IN_OUT else node


def cut_inputs(builder: Builder, linear: Linear) -> fx.Node:
    """The columns of the weight that belong to the part, [out, in]; all of them if it is no part."""
    weight = weight_of(builder, linear)
    if linear.whole is None:
        return weight
    return builder.call(torch.ops.aten.slice.Tensor, weight, 1, linear.start, linear.start + linear.in_width)


def cut_outputs(builder: Builder, linear: Linear, rows: tuple[int, int, int]) -> tuple[fx.Node, fx.Node | None]:
    """Rows (start, end, step) of weight and bias."""
    cut = torch.ops.aten.slice.Tensor
    bias = None if linear.bias is None else builder.parameter(linear.bias)
    return builder.call(cut, weight_of(builder, linear), 0, *rows), bias and builder.call(cut, bias, 0, *rows)
