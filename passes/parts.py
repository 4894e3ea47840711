"""Layers that an FFN has a part of: a projection split into query, key, value and neurons, a down-projection that reads
cat[attention, neurons].

The parts are layers of their own for the search: they share `node` and `weight` with the whole and read or write a
window of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch.fx as fx

from lte_compile.passes.dataflow import CAST_OPS, GraphView, argument, fake_value, is_tensor, op_name, shape_of
from lte_compile.passes.linear import Linear

SPLITS = frozenset(("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk"))
_CATS = frozenset(("cat", "concat", "concatenate"))


def with_output_parts(view: GraphView, linears: Mapping[fx.Node, Linear]) -> dict[fx.Node, Linear]:
    """`linears` by result, and the parts that their results are split into by the node of each part."""
    found = dict(linears)
    for linear in linears.values():
        for node, start in output_windows(view, linear):
            found[node] = replace(
                linear, result=node, out_width=shape_of(node)[linear.out_axis], start=start, whole=linear
            )
    return found


def input_parts(view: GraphView, down: Linear) -> tuple[Linear, ...]:
    """`down` as a reader of each tensor that its input is put together from; none where it reads one tensor."""
    cat = down.data
    while op_name(view, cat) in CAST_OPS and cat.all_input_nodes:
        cat = cat.all_input_nodes[0]
    operands = argument(cat, 0, "tensors")
    if op_name(view, cat) not in _CATS or not isinstance(operands, (list, tuple)):
        return ()
    if argument(cat, 1, "dim", "axis", default=0) % len(shape_of(cat)) != down.axis:
        return ()
    parts, start = [], 0
    for operand in operands:
        width = shape_of(operand)[down.axis]
        parts.append(replace(down, data=operand, in_width=width, start=start, whole=down, readers=(*down.readers, cat)))
        start += width
    return tuple(parts)


def output_windows(view: GraphView, linear: Linear) -> Iterator[tuple[fx.Node, int]]:
    """Nodes that hold a window of the layer's outputs, and where each begins."""
    for user in linear.result.users:
        name = op_name(view, user)
        if name in SPLITS and _along(user, linear, position=2, default=0):
            yield from _split_windows(user, linear.out_axis)
        elif name in ("slice", "narrow") and _along(user, linear, position=1, default=0):
            start = argument(user, 2, "start", default=0) or 0
            if argument(user, 4, "step", default=1) == 1 and isinstance(start, int):
                yield user, start % linear.out_width
        elif name == "getitem" and (window := _indexed(user, linear)) is not None:
            yield user, window


def _along(node: fx.Node, linear: Linear, position: int, default: int) -> bool:
    dim = argument(node, position, "dim", default=default)
    return isinstance(dim, int) and dim % len(shape_of(linear.result)) == linear.out_axis


def _split_windows(split: fx.Node, axis: int) -> Iterator[tuple[fx.Node, int]]:
    starts, start = [], 0
    for value in fake_value(split) or ():
        starts.append(start)
        start += int(value.shape[axis])
    for user in split.users:
        if isinstance(user.args[1], int) and is_tensor(user):
            yield user, starts[user.args[1]]


def _indexed(node: fx.Node, linear: Linear) -> int | None:
    """The start of x[..., a:b] on the layer's output axis, its last."""
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    window, others = index[-1], index[:-1]
    rank = len(shape_of(linear.result))
    reaches_last = Ellipsis in others or len(index) == rank
    whole = all(item is Ellipsis or item == slice(None) for item in others)
    if not isinstance(window, slice) or window.step not in (None, 1) or not (reaches_last and whole):
        return None
    is_last = linear.out_axis == rank - 1 and isinstance(window.start or 0, int)
    return (window.start or 0) % linear.out_width if is_last else None
