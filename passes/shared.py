"""Parameters with several uses: a site may only own weights that nothing else in the graph reads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch.fx as fx

from lte_compile.passes.dataflow import GraphView
from lte_compile.passes.ir import FfnSite, SiteKind
from lte_compile.passes.linear import Linear
from lte_compile.passes.reasons import Refusal


@dataclass(frozen=True, eq=False)
class FfnMatch:
    """One FFN in one graph: its site and the nodes that compute it.

    `up` and `gate` are the same layer when fused. `region` holds the nodes between the projections and `down`, in graph
    order. `anchor` is the `lte::gate_hidden` node inside the region of a transformed model, None otherwise.
    """

    site: FfnSite
    x: fx.Node
    up: Linear
    gate: Linear | None
    down: Linear
    region: tuple[fx.Node, ...]
    anchor: fx.Node | None

    @property
    def projections(self) -> tuple[Linear, ...]:
        """The layers that read x, in graph order, each once."""
        pair = (self.up,) if self.gate is None or self.gate is self.up else (self.up, self.gate)
        return pair if pair[0].weight == self.site.first_projection else pair[::-1]

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (*self.projections, self.down)


def refuse_shared_weights(
    view: GraphView, verdicts: Mapping[Linear, FfnMatch | Refusal]
) -> dict[Linear, FfnMatch | Refusal]:
    """Turns matches whose parameters are read outside of their site into refusals.

    Permuting the neurons of such a weight would change the other reader. One site at several places of the graph
    (ALBERT's shared layers) is fine: every reader then agrees on the order.
    """
    readers = parameter_readers(view)
    places: dict[FfnSite, set[fx.Node]] = defaultdict(set)
    for verdict in verdicts.values():
        if isinstance(verdict, FfnMatch) and verdict.site.kind is SiteKind.FFN:
            places[verdict.site] |= _own_nodes(verdict)
    refusals = {site: _foreign_use(site, nodes, readers) for site, nodes in places.items()}
    return {
        down: (verdict if isinstance(verdict, Refusal) else _verdict(verdict, refusals.get(verdict.site)))
        for down, verdict in verdicts.items()
    }


def _verdict(match: FfnMatch, reason: str | None) -> FfnMatch | Refusal:
    return match if reason is None else Refusal(reason, match.projections, final=True)


def _own_nodes(match: FfnMatch) -> set[fx.Node]:
    own = (node for linear in match.linears for node in (linear.node, linear.result, *linear.readers))
    return {*match.region, *own}


def _foreign_use(site: FfnSite, own: set[fx.Node], readers: Mapping[str, set[fx.Node]]) -> str | None:
    permuted = [name for name in site.parameters if name != site.down_bias]  # a down bias has no neurons
    for name in permuted:
        if foreign := sorted(node.name for node in readers[name] - own):
            return f"`{name}` is also used by `{foreign[0]}`: reordering its neurons would change that"
    return None


def parameter_readers(view: GraphView) -> dict[str, set[fx.Node]]:
    """For each parameter, the nodes that read it together with data."""
    behind: dict[fx.Node, frozenset[str]] = {}
    readers: dict[str, set[fx.Node]] = defaultdict(set)
    for node in view.order:
        below = [behind[source] for source in node.all_input_nodes if source in behind]
        if node in view.constants:
            name = view.parameter_name(node)
            behind[node] = frozenset().union(*below, [name] if name else [])
            continue
        names = set[str]().union(*below)
        if node.op == "call_module":
            module = view.module.get_submodule(str(node.target))
            names |= {f"{node.target}.{name}" for name, _ in module.named_parameters()}
        for name in names:
            readers[name].add(node)
    return readers
