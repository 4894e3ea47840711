"""From a down-projection back to the projections that feed it: the element-wise region between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch.fx as fx

from lte_compile.passes.dataflow import CAST_OPS, REGROUP_OPS, GraphView, drops_out, is_tensor, op_name, shape_of
from lte_compile.passes.linear import Linear
from lte_compile.passes.moe import picked_from
from lte_compile.passes.steps import Blocked, step_back

_VIEWS = CAST_OPS | REGROUP_OPS


@dataclass
class Walk:
    """What lies between a down-projection and its producers.

    `nodes` are the element-wise and layout nodes that carry hidden units; `sides` their inputs that do not (with the
    node that reads each), `hidden_constants` the per-neuron constants (experts' biases too) among their inputs.
    """

    ups: list[Linear] = field(default_factory=list)
    nodes: set[fx.Node] = field(default_factory=set)
    sides: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)
    hidden_constants: list[fx.Node] = field(default_factory=list)
    anchor: fx.Node | None = None
    gates: tuple[fx.Node, ...] = ()


def walk_back(view: GraphView, linears: Mapping[fx.Node, Linear], down: Linear) -> Walk | Blocked:
    """Follows the contraction axis of `down` until linear layers; `linears` is keyed by their result nodes.

    Stops as soon as two producers read different tensors: an FFN's never do, and a residual stream has many.
    """
    walk = Walk()
    seen: set[tuple[fx.Node, int]] = set()
    todo = [(down.data, down.axis)]
    while todo:
        node, axis = todo.pop()
        if (node, axis) in seen:
            continue
        seen.add((node, axis))
        if node in view.constants or picked_from(view, node) is not None:
            walk.hidden_constants.append(node)
            continue
        if (producer := linears.get(node)) is not None:
            if producer.out_axis != axis:
                return Blocked(
                    node, f"it reads the outputs of `{producer.label}` along another axis than the hidden one"
                )
            walk.ups.append(producer)
            if not _read_one_tensor(view, walk.ups):
                return walk
            continue
        step = step_back(view, node, axis)
        if isinstance(step, Blocked):
            return step
        walk.nodes.update((node, *step.through))
        todo.extend(step.sources)
        if step.anchor:
            walk.anchor, walk.gates = node, step.sides
        else:
            walk.sides.extend((side, node) for side in step.sides if is_tensor(side))
    walk.ups.sort(key=lambda up: view.order[up.node])
    return walk


def _read_one_tensor(view: GraphView, ups: list[Linear]) -> bool:
    first, last = ups[0], ups[-1]
    return first.data is last.data or tensor_behind(view, first.data) is tensor_behind(view, last.data)


def common_input(view: GraphView, ups: list[Linear]) -> fx.Node | None:
    """The tensor all producers read: their data node itself, or what their views and casts have in common."""
    if len({up.data for up in ups}) == 1:
        return ups[0].data
    roots = {tensor_behind(view, up.data) for up in ups}
    return roots.pop() if len(roots) == 1 else None


def is_same_tensor(view: GraphView, node: fx.Node) -> bool:
    """Whether the node is a view, a cast or an inactive dropout of its first argument."""
    if node.op == "placeholder" or not node.args:
        return False
    return op_name(view, node) in _VIEWS or ("dropout" in op_name(view, node) and not drops_out(view, node))


def tensor_behind(view: GraphView, node: fx.Node) -> fx.Node:
    """The node seen through casts, views that keep its last axis, and dropout that is switched off.

    Such a dropout returns its input itself, so tracing may take either for what is read afterwards (torch 2.14).
    """
    while is_same_tensor(view, node):
        source = node.args[0]
        if not isinstance(source, fx.Node) or shape_of(source)[-1:] != shape_of(node)[-1:]:
            break
        node = source
    return node
