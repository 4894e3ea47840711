"""LowerSparse: router, threshold and expert FFN become one lte.sparse_ffn node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from lte_compile.kernels.program import is_program
from lte_compile.passes.anchors import arguments, computed_value, is_lte, lte_nodes
from lte_compile.passes.building import LIMIT_REACHED, Builder, leading_sizes, same_sizes
from lte_compile.passes.dataflow import shape_of
from lte_compile.passes.ir import CapturedGraph, Level, PassReport, Rejection
from lte_compile.passes.layout import same_width_views

LOWERED_RULE = "threshold"
# Why the gates of another rule cannot become lte.sparse_ffn's own [score > tau].
_RULE_OBSTACLES = {
    "dense": "dense gates select every expert",
    "soft": "soft gates scale experts, they do not select",
    "straight_through": "straight-through gates pass gradients to the router, which lte.sparse_ffn does not",
}


@dataclass(frozen=True)
class LowerSparse:
    """For inference: lte.sparse_ffn decides by itself which experts run, and its gates carry no gradient.

        gates = lte.select(lte.route(x, w, b), "threshold", tau)
        y = lte.expert_ffn(x, gates, ...)   ==>   y = lte.sparse_ffn(x, w, b, ..., tau)

    1. Where the router reads another tensor than the FFN (a two-layer router's features), it becomes `x_router`.
    2. Only rule "threshold"; other rules keep lte.expert_ffn.
    3. Scores or gates read elsewhere (a traced router) keep their nodes, and lte.expert_ffn with them.
    """

    name: ClassVar[str] = "lower-sparse"
    requires: ClassVar[Level] = Level.ROUTED
    ensures: ClassVar[Level] = Level.LOWERED
    limit: int | None = None

    def __call__(self, graph: CapturedGraph) -> PassReport:
        changes: list[str] = []
        refusals = [
            Rejection(node=anchor.name, reason="it is no lte.expert_ffn: fuse-experts left it alone, in reference form")
            for anchor in lte_nodes(graph, "gate_hidden")
        ]
        for node in list(lte_nodes(graph, "expert_ffn")):
            reason = lowering_obstacle(node)
            if reason is None and self.limit is not None and len(changes) >= self.limit:
                reason = LIMIT_REACHED
            if reason is None:
                changes.append(_rewrite(graph, node))
            else:
                refusals.append(Rejection(node=node.name, parameter=_down_name(graph, node), reason=reason))
        return PassReport(name=self.name, changes=tuple(changes), refusals=tuple(refusals))


def lowering_obstacle(node: fx.Node) -> str | None:
    """Why an lte.expert_ffn node cannot become lte.sparse_ffn; None when it can."""
    given = arguments(node)
    select = computed_value(given["gates"])
    if not is_lte(select, "select"):
        return f"its gates come from {select.name}, not from lte.select in this graph"
    selection = arguments(select)
    if selection["rule"] != LOWERED_RULE:
        return _RULE_OBSTACLES.get(selection["rule"], f"lte.sparse_ffn has no selection rule {selection['rule']!r}")
    route = computed_value(selection["scores"])
    if not is_lte(route, "route"):
        return f"its scores come from {route.name}, not from lte.route in this graph"
    if not _lines_up(arguments(route)["x"], given["x"]):
        return "its router's input and its own group tokens differently"
    if len(route.users) > 1:
        return "its scores are read elsewhere"
    return None


def _rewrite(graph: CapturedGraph, node: fx.Node) -> str:
    given = arguments(node)
    selection = arguments(computed_value(given["gates"]))
    router = arguments(computed_value(selection["scores"]))
    weights = (given[name] for name in ("w_up", "w_gate", "w_down", "b_up", "b_gate", "b_down"))
    optional: tuple[Any, ...] = () if given["expert_offsets"] is None else (given["expert_offsets"],)
    if given["constants"]:
        optional = (given["expert_offsets"], given["constants"])
    builder = Builder(graph, node)
    hints = {"density": selection["density"], "x_router": _router_input(builder, router["x"], given["x"])}
    lowered = builder.call(
        torch.ops.lte.sparse_ffn.default,
        *(given["x"], router["weight"], router["bias"], *weights),
        *(given["activation"], given["expert_size"], selection["tau"], *optional),
        **{name: value for name, value in hints.items() if value is not None},
    )
    node.replace_all_uses_with(lowered)
    return f"{_down_name(graph, node)}: {node.name} became {lowered.name}, kernel {_kernel(given['activation'])}"


def _lines_up(read: fx.Node, x: fx.Node) -> bool:
    """Whether what the router reads is x, or has a view whose tokens are grouped as those of x."""
    return _is_same(read, x) or len(shape_of(x)) == 2 or _view_like(read, x) is not None


def _router_input(builder: Builder, read: fx.Node, x: fx.Node) -> fx.Node | None:
    """What the router reads, its tokens grouped as those of x; None where that is x."""
    if _is_same(read, x):
        return None
    return _view_like(read, x) or builder.reshape(read, [-1, shape_of(read)[-1]])


def _is_same(read: fx.Node, x: fx.Node) -> bool:
    return computed_value(read) is computed_value(x)


def _view_like(read: fx.Node, x: fx.Node) -> fx.Node | None:
    views = same_width_views(read)
    return next((view for view in views if same_sizes(leading_sizes(view), leading_sizes(x))), None)


def _kernel(activation: str) -> str:
    """Where the GPU kernel gets the hidden function from, for the report."""
    return "generated" if is_program(activation) else f"named {activation}"


def _down_name(graph: CapturedGraph, node: fx.Node) -> str | None:
    """The name of the down-projection's weight, seen through its transpose."""
    source = computed_value(arguments(node)["w_down"])
    return graph.parameters.get(source.name)
