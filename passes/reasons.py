"""Why a linear layer is no FFN's, in words: attention, heads, poolers and adapters told by their surroundings."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.fx as fx

from lte_compile.passes.anchors import is_lte
from lte_compile.passes.dataflow import GraphView, argument, is_tensor, op_name, shape_of
from lte_compile.passes.ir import Rejection
from lte_compile.passes.linear import Linear
from lte_compile.passes.walk import tensor_behind

_NEIGHBOURHOOD = 64  # nodes looked at around a linear layer; an attention block has about 20 between its layers
_PRODUCTS = frozenset(("matmul", "bmm", "baddbmm", "mm", "einsum", "__matmul__"))


@dataclass(frozen=True, eq=False)
class Refusal:
    """A refused down-projection. `producers` are layers to blame along with it; a `final` reason needs no context."""

    reason: str
    producers: tuple[Linear, ...] = ()
    final: bool = False


def explain(view: GraphView, linears: Mapping[fx.Node, Linear], linear: Linear, reason: str) -> str:
    """The refusal of `linear`, led by what kind of layer its surroundings say it is."""
    if mixer := _first(_before(view, linears, linear), lambda node: mixes_tokens(view, node)):
        return f"attention output projection: its input comes from `{op_name(view, mixer)}`, which mixes tokens"
    if mixer := _first(_after(linears, linear), lambda node: mixes_tokens(view, node)):
        return (
            f"attention input projection (query, key or value): its output goes into `{op_name(view, mixer)}`, "
            "which mixes tokens"
        )
    widths = f"its output width {linear.out_width} differs from the model width {linear.in_width}"
    if _is_head(linears, linear):
        return f"language-model head or classifier: {reason if 'output width' in reason else widths}"
    if linear.experts > 1:
        return f"one of {linear.experts} experts, which are not brought together in a known way: {reason}"
    if pick := _first(_before(view, linears, linear), lambda node: picks_tokens(view, node)):
        return f"pooler or head: it reads tokens picked by `{op_name(view, pick)}`"
    differs = linear.out_width != linear.in_width and "width" not in reason
    return f"not a down-projection: {reason}; {widths}" if differs else f"not a down-projection: {reason}"


def _is_head(linears: Mapping[fx.Node, Linear], linear: Linear) -> bool:
    """Reaches the graph's output, with a width that no layer reads."""
    reaches_output = _first(_after(linears, linear), lambda node: node.op == "output") is not None
    return reaches_output and all(
        linear.out_width not in (other.in_width, linear.in_width) for other in linears.values()
    )


def inside_higher_order(view: GraphView) -> Iterator[Rejection]:
    """Matrices that torch.cond, loops and the like pass on to their branches, which are graphs of their own."""
    for node in view.order:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            for source in node.all_input_nodes:
                name = view.parameter_name(source)
                if name is not None and len(shape_of(source)) > 1:
                    reason = f"read inside a branch of `{op_name(view, node)}`, which is not looked into"
                    yield Rejection(node=node.name, parameter=name, reason=reason)


def mixes_tokens(view: GraphView, node: fx.Node) -> bool:
    """Attention proper: a fused attention op, or a product of two activations."""
    if node.op not in ("call_function", "call_method", "call_module"):
        return False
    name = op_name(view, node)
    if "attention" in name:
        return True
    activations = [source for source in node.all_input_nodes if source not in view.constants and is_tensor(source)]
    return name in _PRODUCTS and len(activations) > 1


def picks_tokens(view: GraphView, node: fx.Node) -> bool:
    """Takes some positions of an axis before the last: x[:, 0], select, gather, index."""
    if is_lte(node):  # lte.select picks experts
        return False
    name = op_name(view, node)
    if name == "getitem":
        source = node.args[0]
        return isinstance(source, fx.Node) and is_tensor(source) and shape_of(source)[:-1] != shape_of(node)[:-1]
    return name in ("select", "index", "gather", "index_select") and not _is_parameter_lookup(view, node)


def _is_parameter_lookup(view: GraphView, node: fx.Node) -> bool:
    return argument(node, 0, "input") in view.constants


def low_rank_update(view: GraphView, linears: Mapping[fx.Node, Linear], ups: Iterable[Linear]) -> str | None:
    """Names the unmerged LoRA among producers: one reads a narrow layer that reads what another producer reads."""
    ups = tuple(ups)
    inputs = {tensor_behind(view, up.data) for up in ups}
    for up in ups:
        narrow = _narrow_layer_before(view, linears, up)
        if narrow is not None and inputs & set(_behind_dropout(view, narrow.data)):
            return f"unmerged LoRA: `{narrow.label}` and `{up.label}` add a low-rank update; merge the adapter first"
    return None


def low_rank_reader(view: GraphView, linears: Mapping[fx.Node, Linear], user: fx.Node, down: Linear) -> str | None:
    """Names the LoRA pair beside `down` when `user`, another reader of its hidden value, leads into one."""
    by_node = {linear.node: linear for linear in linears.values()}
    for node in (user, *_forward(user, stop=lambda n: n in by_node)):
        reader = by_node.get(node)
        if reader is not None and _low_rank_pair(by_node, reader, down):
            return f"unmerged LoRA: `{reader.label}` reads the hidden value beside it; merge the adapter first"
    return None


def _low_rank_pair(linears: Mapping[fx.Node, Linear], reader: Linear, down: Linear) -> bool:
    """`reader` is narrow, and a layer behind it is as wide as `down`."""
    behind = (linears.get(node) for node in _forward(reader.node, stop=lambda node: node in linears))
    widened = any(layer is not None and layer.out_width == down.out_width for layer in behind)
    return reader.out_width < min(reader.in_width, down.out_width) and widened


def _narrow_layer_before(view: GraphView, linears: Mapping[fx.Node, Linear], up: Linear) -> Linear | None:
    for node in _behind_dropout(view, up.data):
        layer = linears.get(node)
        if layer is not None and layer.out_width < min(layer.in_width, up.out_width):
            return layer
    return None


def _behind_dropout(view: GraphView, node: fx.Node) -> Iterator[fx.Node]:
    """The node and what it is a view, cast or dropout of."""
    while True:
        node = tensor_behind(view, node)
        yield node
        if "dropout" not in op_name(view, node) or not node.all_input_nodes:
            return
        node = node.all_input_nodes[0]


def _before(view: GraphView, linears: Mapping[fx.Node, Linear], linear: Linear) -> Iterator[fx.Node]:
    """Nodes that lead into `linear` without a linear layer in between, nearest first."""
    inputs: Callable[[fx.Node], Iterable[fx.Node]] = lambda node: node.all_input_nodes  # noqa: E731
    return _spread([linear.data], inputs, stop=lambda node: node in linears or node in view.constants)


def _after(linears: Mapping[fx.Node, Linear], linear: Linear) -> Iterator[fx.Node]:
    products = {other.node for other in linears.values()}
    return _forward(linear.result, stop=lambda node: node in products)


def _forward(start: fx.Node, stop: Callable[[fx.Node], bool]) -> Iterator[fx.Node]:
    return _spread(list(start.users), lambda node: node.users, stop)


def _spread(
    start: list[fx.Node], neighbours: Callable[[fx.Node], Iterable[fx.Node]], stop: Callable[[fx.Node], bool]
) -> Iterator[fx.Node]:
    """Breadth first, without going on from nodes where `stop` holds, up to a fixed number of nodes."""
    todo, seen = deque(start), set(start)
    for _ in range(_NEIGHBOURHOOD):
        if not todo:
            return
        node = todo.popleft()
        yield node
        if stop(node):
            continue
        for other in neighbours(node):
            if other not in seen:
                seen.add(other)
                todo.append(other)


def _first(nodes: Iterable[fx.Node], holds: Callable[[fx.Node], bool]) -> fx.Node | None:
    return next((node for node in nodes if holds(node)), None)
