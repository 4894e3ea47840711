"""InsertRouter: routers and anchors go into a graph whose modules were flattened away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx
from torch import nn

from lte_compile.passes.anchors import lte_nodes
from lte_compile.passes.building import LIMIT_REACHED, Builder, leading_sizes, same_sizes
from lte_compile.passes.dataflow import shape_of
from lte_compile.passes.ir import CapturedGraph, FfnSite, Level, PassReport, Rejection
from lte_compile.passes.layout import same_width_views
from lte_compile.passes.match import FfnMatch, find_ffns


@dataclass(frozen=True)
class InsertRouter:
    """Gates from a router scale the hidden value of every site that `routers` names.

        y = linear(hidden, w_down)   ==>   y = linear(lte.gate_hidden(hidden, router(x)), w_down)

    1. A router is a module that maps x [..., D] to gates [..., E], by lte.route and lte.select if the graph is to be
       traced again. `routers` is keyed by the name of the down-projection's weight, or by site name.
    2. It becomes the child `router` of the module that owns the first projection's weight, and is called as a module,
       so that the graph can be trained, copied and traced again.
    3. A site that runs several times gets one router, called as often. A graph with anchors is left alone.

    For graphs that own their parameters: `ExportedProgram.module()` and FX-traced modules.
    """

    name: ClassVar[str] = "insert-router"
    requires: ClassVar[Level] = Level.DENSE
    ensures: ClassVar[Level] = Level.ROUTED
    routers: Mapping[str, nn.Module]
    expert_size: int
    limit: int | None = None

    def __call__(self, graph: CapturedGraph) -> PassReport:
        if any(lte_nodes(graph)):
            return PassReport(name=self.name, refusals=(_ALREADY,))
        changes: list[str] = []
        refusals: list[Rejection] = []
        for match in find_ffns(graph).matches:
            label = match.site.name or match.site.down
            router = self.routers.get(match.site.down, self.routers.get(match.site.name))
            if router is None:
                reason: str | None = f"no router was given for site {label!r}"
            elif self.limit is not None and len(changes) >= self.limit:
                reason = LIMIT_REACHED
            else:
                reason = _insert(graph, match, router, self.expert_size)
            if reason is None:
                changes.append(f"{label}: router {router_path(match.site)}")
            else:
                refusals.append(Rejection(node=match.down.node.name, parameter=match.site.down, reason=reason))
        graph.module.graph.lint()
        graph.module.recompile()
        return PassReport(name=self.name, changes=tuple(changes), refusals=tuple(refusals))


_ALREADY = Rejection(node="graph", reason="it has lte nodes already")


def router_path(site: FfnSite) -> str:
    """Where the site's router lives: beside the parameter of its first projection."""
    owner = site.first_projection.rpartition(".")[0]
    return f"{owner}.router" if owner else "router"


def _insert(graph: CapturedGraph, match: FfnMatch, router: nn.Module, expert_size: int) -> str | None:
    """Adds router call and anchor; says why not where it cannot."""
    down, first = match.down, match.projections[0]
    if not all(linear.is_last_axis for linear in match.linears):
        return "a projection reads or writes another axis than the last"
    hidden = down.data
    x = next((v for v in _inputs(match) if same_sizes(leading_sizes(v), leading_sizes(hidden))), first.data)
    if len(shape_of(hidden)) != 2 and not same_sizes(leading_sizes(x), leading_sizes(hidden)):
        return "its input and its hidden value group tokens differently"
    path = router_path(match.site)
    present = dict(graph.module.named_modules()).get(path)
    if present is not None and present is not router:
        return f"the model has a module {path!r} of its own"
    graph.module.add_submodule(path, router)
    builder = Builder(graph, down.node)
    gates = builder.call_module(path, x)
    if not same_sizes(leading_sizes(x), leading_sizes(hidden)):
        gates = builder.reshape(gates, [-1, shape_of(gates)[-1]])
    gated = builder.call(torch.ops.lte.gate_hidden.default, hidden, gates, expert_size)
    down.node.replace_input_with(hidden, gated)
    return None


def _inputs(match: FfnMatch) -> tuple[fx.Node, ...]:
    """Views of the FFN's input, the first projection's own first."""
    return tuple(same_width_views(match.projections[0].data))
