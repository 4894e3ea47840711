"""Region questions, asked of a networkx graph: does everything between x and the down-projection enter through x?"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import networkx as nx
import torch.fx as fx

from lte_compile.passes.dataflow import METADATA_OPS, GraphView, is_tensor, op_name

_OUTSIDE = "outside"  # a virtual node in front of every entry from outside of the region


def window(view: GraphView, start: fx.Node, end: fx.Node) -> nx.DiGraph[fx.Node]:
    """The data flow among the nodes from `start` to `end` in graph order: no path between them can leave it."""
    first, last = view.order[start], view.order[end]
    graph: nx.DiGraph[fx.Node] = nx.DiGraph()
    graph.add_nodes_from((start, end))
    stack = [end]
    seen = {end}
    while stack:
        node = stack.pop()
        for source in node.all_input_nodes:
            if first <= view.order[source] <= last:
                graph.add_edge(source, node)
                if source not in seen and source is not start:
                    seen.add(source)
                    stack.append(source)
    return graph


def between(view: GraphView, start: fx.Node, end: fx.Node) -> frozenset[fx.Node]:
    """Every node on a path from `start` to `end`, both included."""
    graph = window(view, start, end)
    return frozenset((nx.descendants(graph, start) & nx.ancestors(graph, end)) | {start, end})


def reachable(view: GraphView, sources: Iterable[fx.Node], end: fx.Node) -> frozenset[fx.Node]:
    """What is computed from `sources` before `end`."""
    last = view.order[end]
    todo = list(sources)
    seen: set[fx.Node] = set()
    while todo:
        for user in todo.pop().users:
            if user not in seen and view.order[user] < last:
                seen.add(user)
                todo.append(user)
    return frozenset(seen)


def second_entry(view: GraphView, x: fx.Node, down: fx.Node, ignored: Collection[fx.Node]) -> fx.Node | None:
    """A value that flows into the region without coming from x, or None when x dominates `down`.

    Parameters, literals and sizes are no entries; neither is anything in `ignored` (a router's gates, which may be
    computed from another tensor).
    """
    region = between(view, x, down)
    graph: nx.DiGraph[object] = nx.DiGraph()
    graph.add_edge(_OUTSIDE, x)
    for node in region - {x}:
        for source in node.all_input_nodes:
            if source in region:
                graph.add_edge(source, node)
            elif source not in ignored and source not in view.constants and is_tensor(source):
                graph.add_edge(_OUTSIDE, source)
                graph.add_edge(source, node)
    if _dominates(graph, x, down):
        return None
    entries = [node for node in graph.successors(_OUTSIDE) if isinstance(node, fx.Node) and node is not x]
    return min(entries, key=lambda node: view.order[node])


def _dominates(graph: nx.DiGraph[object], x: fx.Node, node: fx.Node) -> bool:
    dominator = nx.immediate_dominators(graph, _OUTSIDE)
    current: object = node
    while current is not _OUTSIDE:
        if current is x:
            return True
        current = dominator[current]
    return False


def escape(
    view: GraphView, hidden: Collection[fx.Node], allowed: Collection[fx.Node]
) -> tuple[fx.Node, fx.Node] | None:
    """A hidden value and a user of it outside of the region, or None.

    Reading a value's size is no use; neither is taking a part that nobody reads, as torch.export records of each split.
    """
    for node in sorted(hidden, key=lambda node: view.order[node]):
        for user in node.users:
            name = op_name(view, user)
            unread = name == "getitem" and not user.users
            if user in hidden or user in allowed or unread or name in METADATA_OPS:
                continue
            return node, user
    return None
