"""One step back along an axis: where the units along it come from, if the op keeps them apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch.fx as fx

from lte_compile.passes.dataflow import (
    LAYOUT_OPS,
    TRANSPOSE_OPS,
    GraphView,
    argument,
    is_pointwise,
    is_tensor,
    op_name,
    shape_of,
)


@dataclass(frozen=True)
class Step:
    """One step back along an axis: the nodes (and axis) that carry it, and the inputs that do not."""

    sources: tuple[tuple[fx.Node, int], ...]
    sides: tuple[fx.Node, ...] = ()
    through: tuple[fx.Node, ...] = ()  # further nodes passed on the way, such as the split behind a getitem
    anchor: bool = False


@dataclass(frozen=True)
class Blocked:
    """The axis cannot be followed through `node`, and why."""

    node: fx.Node
    reason: str


def step_back(view: GraphView, node: fx.Node, axis: int) -> Step | Blocked:
    """Where `axis` of `node` comes from, if the op keeps the units along it apart."""
    if node.op in ("placeholder", "get_attr", "output"):
        return Blocked(node, f"it reaches the graph input `{node.name}` without passing a linear layer")
    name = op_name(view, node)
    if name == "gate_hidden":
        source, *gates = node.all_input_nodes
        return Step(((source, axis),), tuple(gates), anchor=True)
    if name == "getitem":
        return _step_getitem(view, node, axis)
    if name == "select":
        return _step_select(node, axis)
    if name in ("slice", "narrow"):
        return _step_slice(node, axis)
    if name in LAYOUT_OPS:
        return _step_layout(name, node, axis)
    if name == "prelu":
        return _step_prelu(view, node, axis)
    if is_tensor(node) and is_pointwise(view, node):
        return _step_pointwise(view, node, axis)
    return Blocked(node, f"it passes `{name}`, which is not element-wise")


def _step_pointwise(view: GraphView, node: fx.Node, axis: int) -> Step:
    """Broadcasting aligns shapes at the right; an input without the axis, or with size 1 there, is a side input."""
    shape = shape_of(node)
    from_right = len(shape) - axis
    sources, sides = [], []
    for source in node.all_input_nodes:
        source_shape = shape_of(source)
        carries = len(source_shape) >= from_right and source_shape[-from_right] == shape[axis] != 1
        if carries:
            sources.append((source, len(source_shape) - from_right))
        else:
            sides.append(source)
    return Step(tuple(sources), tuple(sides))


def _step_prelu(view: GraphView, node: fx.Node, axis: int) -> Step | Blocked:
    """Carries no pointwise tag. Its slope is one number, or one per index of axis 1, whatever the rank."""
    source, *slopes = node.all_input_nodes
    if node.op == "call_module":
        single = view.module.get_submodule(str(node.target)).weight.numel() == 1  # type: ignore[operator]
    else:
        single = math.prod(shape_of(slopes[0])) == 1
    if single:
        return Step(((source, axis),), tuple(slopes))
    if slopes and axis == 1:
        return Step(((source, axis), (slopes[0], 0)))
    return Blocked(node, "it passes `prelu`, whose slopes differ along another axis than the hidden one")


_SPLITS = ("chunk", "split", "split_with_sizes", "tensor_split", "unsafe_split", "unsafe_chunk")


def _step_getitem(view: GraphView, node: fx.Node, axis: int) -> Step | Blocked:
    source, index = node.args[0], node.args[1]
    assert isinstance(source, fx.Node)
    if is_tensor(source):
        return _step_index(node, source, index, axis)
    producer = op_name(view, source)
    if (producer == "native_dropout" and index == 0) or producer in _SPLITS:
        whole = source.args[0]
        assert isinstance(whole, fx.Node)
        dim = argument(source, 2, "dim", default=0) if producer in _SPLITS else axis
        if isinstance(dim, int) and dim % len(shape_of(whole)) == axis:
            return Step(((whole, axis),), through=(source,))
        return Blocked(node, f"it passes `{producer}` along another axis than the hidden one")
    if producer == "unbind" and isinstance(source.args[0], fx.Node):
        return _step_unbind(source, source.args[0], axis)
    return Blocked(node, f"it passes `{producer}`, which is not element-wise")


def _step_unbind(unbind: fx.Node, whole: fx.Node, axis: int) -> Step | Blocked:
    """[..., F, 2].unbind(-1) reads interleaved halves. The hidden axis stays beside the one taken apart."""
    dim = argument(unbind, 1, "dim", default=0) % len(shape_of(whole))
    return Step(((whole, axis + (dim <= axis)),), through=(unbind,))


def _step_index(node: fx.Node, source: fx.Node, index: Any, axis: int) -> Step | Blocked:
    """x[..., a:b:c] on the hidden axis, x[..., i] on an axis behind or before it (a pair)."""
    items = list(index) if isinstance(index, tuple) else [index]
    rank = len(shape_of(source))
    if Ellipsis in items:
        gap = items.index(Ellipsis)
        items[gap : gap + 1] = [slice(None)] * (rank - sum(i is not None for i in items) + 1)
    items += [slice(None)] * (rank - sum(item is not None for item in items))
    if not all(item is None or isinstance(item, (slice, int)) for item in items):
        return Blocked(node, "it passes an indexing that picks elements")
    # For each axis of the result, the source's: None where x[:, None] adds one.
    dims = iter(range(rank))
    places = [(None if item is None else next(dims), item) for item in items]
    kept = [dim for dim, item in places if not isinstance(item, int)]
    picked = [dim for dim, item in places if dim is not None and isinstance(item, int)]
    source_axis = kept[axis]
    if source_axis is None:
        return Blocked(node, "it passes an indexing that adds the axis")
    cut = [dim for dim, item in places if dim not in (None, source_axis) and item != slice(None) and dim in kept]
    if cut or any(dim < source_axis and not _is_pair(source, dim, source_axis) for dim in picked):
        return Blocked(node, "it passes an indexing that picks tokens")
    return Step(((source, source_axis),))


def _step_select(node: fx.Node, axis: int) -> Step | Blocked:
    """x.select(dim, i) behind the hidden axis reads interleaved halves; before it, halves or tokens."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dim = argument(node, 1, "dim") % len(shape_of(source))
    source_axis = axis + (dim <= axis)
    if dim > axis or _is_pair(source, dim, source_axis):
        return Step(((source, source_axis),))
    return Blocked(node, "it passes `select`, which picks tokens")


def _is_pair(source: fx.Node, dim: int, axis: int) -> bool:
    """The axis of size 2 in front of the hidden one in [..., 2, F]: a view of both halves, if a view made it."""
    return dim == axis - 1 and shape_of(source)[dim] == 2


def _step_slice(node: fx.Node, axis: int) -> Step | Blocked:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dim = argument(node, 1, "dim", default=0)
    if dim % len(shape_of(source)) != axis and shape_of(source) != shape_of(node):
        return Blocked(node, "it passes a slice that picks tokens")
    return Step(((source, axis),))


def _step_layout(name: str, node: fx.Node, axis: int) -> Step | Blocked:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    shape, source_shape = shape_of(node), shape_of(source)
    if name in TRANSPOSE_OPS or name == "movedim":
        return Step(((source, _permutation(name, node, len(shape))[axis]),))
    tail = math.prod(shape[axis + 1 :])
    same = [i for i, n in enumerate(source_shape) if n == shape[axis] and math.prod(source_shape[i + 1 :]) == tail]
    if same:
        return Step(((source, same[-1]),))
    return _step_pair_view(node, source, axis)


def _step_pair_view(node: fx.Node, source: fx.Node, axis: int) -> Step | Blocked:
    """[..., 2F] viewed as [..., F, 2] or [..., 2, F]: a fused projection taken apart by its shape."""
    shape, source_shape = shape_of(node), shape_of(source)
    last_two = axis >= len(shape) - 2 and len(shape) == len(source_shape) + 1
    if last_two and shape[-1] * shape[-2] == source_shape[-1] == 2 * shape[axis]:
        return Step(((source, len(source_shape) - 1),))
    return Blocked(node, "it passes a view that splits or merges the hidden axis")


def _permutation(name: str, node: fx.Node, rank: int) -> list[int]:
    """For each output axis, the input axis it was."""
    order = list(range(rank))
    if name == "permute":
        given = node.args[1] if isinstance(node.args[1], (list, tuple)) else node.args[1:]
        return [int(dim) % rank for dim in given]  # type: ignore[arg-type]
    if name == "movedim":
        origin, target = (int(argument(node, i, n)) % rank for i, n in ((1, "source"), (2, "destination")))
        order.insert(target, order.pop(origin))
        return order
    if name in ("T", "numpy_T"):
        return order[::-1]
    if name == "mT":  # under Dynamo a getattr, whose argument is that name
        return [*order[:-2], order[-1], order[-2]]
    first = argument(node, 1, "dim0", "axis0", default=rank - 2) % rank
    second = argument(node, 2, "dim1", "axis1", default=rank - 1) % rank
    order[first], order[second] = order[second], order[first]
    return order
