"""A captured graph as text: one line a node, parameters by their names.

gates = lte.select(scores, rule='threshold', tau=0.5)  # float32[2, 12, 4]
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from lte_compile.passes.anchors import arguments, is_lte
from lte_compile.passes.dataflow import fake_value
from lte_compile.passes.ir import CapturedGraph

ELISION = "..."


def render(graph: CapturedGraph) -> str:
    """The whole graph. Placeholders and get_attrs of parameters get no line: their users show the parameter's name."""
    return "\n".join(render_lines(graph).values())


def render_lines(graph: CapturedGraph) -> dict[fx.Node, str]:
    """The line of each node that has one, in graph order."""
    nodes = graph.module.graph.nodes
    return {node: _line(graph.parameters, node) for node in nodes if not _is_parameter(graph.parameters, node)}


def excerpt(lines: Sequence[str], kept: Collection[int], *, context: int = 0) -> str:
    """The kept lines (by index) with `context` lines around each, and `...` for every gap."""
    wide = {i for k in kept for i in range(k - context, k + context + 1) if 0 <= i < len(lines)}
    shown: list[str] = []
    for index, line in enumerate(lines):
        if index in wide:
            shown.append(line)
        elif not shown or shown[-1] != ELISION:
            shown.append(ELISION)
    return "\n".join(shown)


def render_around(graph: CapturedGraph, node: fx.Node, *, context: int = 3) -> str:
    """The lines around one node, for error messages; the node's own is marked with `>`."""
    lines = render_lines(graph)
    texts = [f"{'>' if each is node else ' '} {line}" for each, line in lines.items()]
    return excerpt(texts, [i for i, each in enumerate(lines) if each is node], context=context)


def _is_parameter(parameters: Mapping[str, str], node: fx.Node) -> bool:
    return node.op == "get_attr" or (node.op == "placeholder" and node.name in parameters)


def _line(parameters: Mapping[str, str], node: fx.Node) -> str:
    if node.op == "output":
        return f"return {_argument(parameters, node.args[0])}"
    if node.op == "placeholder":
        return f"{node.name} = input(){_type_comment(node)}"
    return f"{node.name} = {target_name(node)}({', '.join(_arguments(parameters, node))}){_type_comment(node)}"


def _arguments(parameters: Mapping[str, str], node: fx.Node) -> list[str]:
    """lte ops take many tensors, most of them optional: those are named, and left out where None."""
    if is_lte(node):
        (_, first), *rest = arguments(node).items()
        named = [f"{name}={_argument(parameters, value)}" for name, value in rest if value is not None]
        return [_argument(parameters, first), *named]
    shown = [_argument(parameters, arg) for arg in node.args]
    return shown + [f"{key}={_argument(parameters, value)}" for key, value in node.kwargs.items()]


def target_name(node: fx.Node) -> str:
    """`lte.route` for an op overload, `.view` for a method, `self.mlp.router` for a module, `silu` for a function."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target.overloadpacket)
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        return str(node.target)
    if node.op == "call_module":
        return f"self.{node.target}"
    if node.op == "call_method":
        return f".{node.target}"
    return getattr(node.target, "__name__", str(node.target))


def _argument(parameters: Mapping[str, str], arg: Any) -> str:
    if isinstance(arg, fx.Node):
        return parameters.get(arg.name, str(arg.target)) if _is_parameter(parameters, arg) else arg.name
    if isinstance(arg, (tuple, list)):
        inner = ", ".join(_argument(parameters, item) for item in arg)
        return f"[{inner}]" if isinstance(arg, list) else f"({inner}{',' if len(arg) == 1 else ''})"
    if isinstance(arg, dict):
        return "{" + ", ".join(f"{key!r}: {_argument(parameters, value)}" for key, value in arg.items()) + "}"
    return repr(arg)


def _type_comment(node: fx.Node) -> str:
    value = fake_value(node)
    if not isinstance(value, Tensor):
        return ""
    sizes = ", ".join(str(size) for size in value.shape)
    return f"  # {str(value.dtype).removeprefix('torch.')}[{sizes}]"
