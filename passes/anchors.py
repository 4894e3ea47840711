"""Reading the lte nodes of a graph: op tests, arguments by schema name, and where gates and scores come from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.fx as fx

import lte_compile.kernels.ops  # noqa: F401  (registers the ops)
from lte_compile.passes.dataflow import CAST_OPS, LAYOUT_OPS
from lte_compile.passes.ir import CapturedGraph, Level

_PASSED_ON = LAYOUT_OPS | CAST_OPS


def is_lte(node: fx.Node, *names: str) -> bool:
    """Whether the node calls an op of the lte namespace (one of `names` if given)."""
    schema = _schema(node)
    if schema is None or not schema.name.startswith("lte::"):
        return False
    return not names or lte_name(node) in names


def lte_name(node: fx.Node) -> str:
    schema = _schema(node)
    assert schema is not None, node
    return str(schema.name).removeprefix("lte::")


def _schema(node: fx.Node) -> Any:
    """torch.export records overloads, Dynamo the packet an overload belongs to."""
    target = node.target
    overload = getattr(target, "default", None) if isinstance(target, torch._ops.OpOverloadPacket) else target
    return overload._schema if isinstance(overload, torch._ops.OpOverload) else None


def lte_nodes(graph: CapturedGraph, *names: str) -> Iterator[fx.Node]:
    return (node for node in graph.module.graph.nodes if is_lte(node, *names))


def arguments(node: fx.Node) -> dict[str, Any]:
    """An op call's arguments by schema name, defaults filled in."""
    schema = _schema(node).arguments
    given = {argument.name: value for argument, value in zip(schema, node.args, strict=False)} | node.kwargs
    names = [argument.name for argument in schema if argument.name in given or argument.has_default_value()]
    defaults = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    return {name: given.get(name, defaults.get(name)) for name in names}


def views_back(node: fx.Node) -> Iterator[fx.Node]:
    """The node, what it is a view or cast of, and so on to the value that was computed."""
    while True:
        yield node
        source = node.args[0] if node.args else None
        if _bare_name(node) not in _PASSED_ON or not isinstance(source, fx.Node):
            return
        node = source


def computed_value(node: fx.Node) -> fx.Node:
    """The node seen through views and casts."""
    *_, last = views_back(node)
    return last


def _bare_name(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target._schema.name.split("::")[1])
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def level_of(graph: CapturedGraph) -> Level:
    """The level a graph is at: LOWERED once it holds a kernel node, ROUTED once it holds any other lte node."""
    if any(lte_nodes(graph, "sparse_ffn")):
        return Level.LOWERED
    return Level.ROUTED if any(lte_nodes(graph)) else Level.DENSE
