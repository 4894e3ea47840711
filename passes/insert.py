"""InsertRouter: routers and anchors go into a graph whose modules were flattened away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.fx as fx
from torch import nn

from lte_compile.passes.anchors import lte_nodes
from lte_compile.passes.building import LIMIT_REACHED, Builder, leading_sizes, same_sizes
from lte_compile.passes.dataflow import shape_of
from lte_compile.passes.ir import CapturedGraph, Level, PassReport, Rejection
from lte_compile.passes.layout import same_width_views
from lte_compile.passes.match import FfnMatch, find_ffns


@dataclass(frozen=True)
class InsertRouter:
    """Gates from a router scale the hidden value of every site that `routers` names.

        y = linear(hidden, w_down)   ==>   y = linear(lte.gate_hidden(hidden, router(x)), w_down)

    1. A router is a module that maps x [..., D] to gates [..., E], by lte.route and lte.select if the graph is to be
       traced again. `routers` is keyed by the name of the down-projection's weight, or by site name.
    2. It becomes the child `router` of the module that owns the first projection's weight, or what `paths` says by the
       down-projection's weight. It is called as a module, so that the graph can be trained, copied and traced again.
    3. A site that runs several times gets one router, called as often. A graph with anchors is left alone.

    For graphs that own their parameters: `ExportedProgram.module()` and FX-traced modules.
    """

    name: ClassVar[str] = "insert-router"
    requires: ClassVar[Level] = Level.DENSE
    ensures: ClassVar[Level] = Level.ROUTED
    routers: Mapping[str, nn.Module]
    expert_size: int
    limit: int | None = None
    paths: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, graph: CapturedGraph) -> PassReport:
        if any(lte_nodes(graph)):
            return PassReport(name=self.name, refusals=(_ALREADY,))
        changes: list[str] = []
        refusals: list[Rejection] = []
        for match in find_ffns(graph).matches:
            label = match.site.name or match.site.down
            path = self.paths.get(match.site.down, match.site.router_path)
            router = self.routers.get(match.site.down, self.routers.get(match.site.name))
            if router is None:
                reason: str | None = f"no router was given for site {label!r}"
            elif self.limit is not None and len(changes) >= self.limit:
                reason = LIMIT_REACHED
            else:
                reason = _insert(graph, match, router, self.expert_size, path)
            if reason is None:
                changes.append(f"{label}: router {path}")
            else:
                refusals.append(Rejection(node=match.down.node.name, parameter=match.site.down, reason=reason))
        graph.module.graph.lint()
        graph.module.recompile()
        return PassReport(name=self.name, changes=tuple(changes), refusals=tuple(refusals))


_ALREADY = Rejection(node="graph", reason="it has lte nodes already")


def _insert(graph: CapturedGraph, match: FfnMatch, router: nn.Module, expert_size: int, path: str) -> str | None:
    """Adds router call and anchor; says why not where it cannot."""
    down = match.down
    readers = {down.node, *down.readers}
    builder = Builder(graph, min(readers))  # the first in graph order
    hidden = _axis_last(builder, down.data, down.axis)
    x = _input_like(builder, match, hidden)
    if len(shape_of(hidden)) != 2 and not same_sizes(leading_sizes(x), leading_sizes(hidden)):
        return "its input and its hidden value group tokens differently"
    if _submodule(graph.module, path) not in (None, router):
        return f"the model has a module {path!r} of its own"
    graph.module.add_submodule(path, router)
    gates = builder.call_module(path, x)
    if not same_sizes(leading_sizes(x), leading_sizes(hidden)):
        gates = builder.reshape(gates, [-1, shape_of(gates)[-1]])
    gated = builder.call(torch.ops.lte.gate_hidden.default, hidden, gates, expert_size)
    if hidden is not down.data:
        gated = builder.call(torch.ops.aten.movedim.int, gated, -1, down.axis)
    for reader in (down.node, *down.readers):
        reader.replace_input_with(down.data, gated)
    return None


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    """The submodule of that path, found without listing all of them."""
    found: nn.Module | None = module
    for name in path.split("."):
        found = None if found is None else found._modules.get(name)
    return found


def _axis_last(builder: Builder, node: fx.Node, axis: int) -> fx.Node:
    """The node with `axis` moved behind the others, as routers and gates want it; convolutions use axis 1."""
    if axis == len(shape_of(node)) - 1:
        return node
    return builder.call(torch.ops.aten.movedim.int, node, axis, -1)


def _input_like(builder: Builder, match: FfnMatch, hidden: fx.Node) -> fx.Node:
    """A view of the FFN's input whose tokens are grouped as those of `hidden`, else the first projection's own."""
    first = match.projections[0]
    own = _axis_last(builder, first.data, first.axis)
    return next((v for v in same_width_views(own) if same_sizes(leading_sizes(v), leading_sizes(hidden))), own)
