"""Small graphs from text, in the form `lte_compile.passes.rendering` prints them:

    x = input(2, 3, 4)
    w = parameter(8, 4)
    h = aten.linear(x, w)
    return aten.relu(h)

Parameters hold fixed random float64 values, so that a parsed graph runs.
"""

from __future__ import annotations

import ast
from textwrap import dedent
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import lte_compile.kernels.ops  # noqa: F401  (registers the ops)
from lte_compile.passes.ir import CapturedGraph


def parse(text: str) -> CapturedGraph:
    """The graph, with fake values on its nodes. Raises ValueError for a statement that is no assignment or return."""
    root, graph = nn.Module(), fx.Graph()
    names: dict[str, fx.Node] = {}
    inputs: list[Tensor] = []
    generator = torch.Generator().manual_seed(0)
    for statement in ast.parse(dedent(text)).body:
        if isinstance(statement, ast.Expr) or not isinstance(statement, (ast.Assign, ast.Return)):
            raise ValueError(f"cannot read {ast.unparse(statement)!r}")
        if isinstance(statement, ast.Return):
            assert statement.value is not None
            graph.output(_value(graph, names, statement.value))
            continue
        (target,) = statement.targets
        assert isinstance(target, ast.Name)
        call = statement.value
        assert isinstance(call, ast.Call)
        kind = ast.unparse(call.func)
        if kind in ("input", "parameter"):
            tensor = torch.randn([ast.literal_eval(arg) for arg in call.args], generator=generator, dtype=torch.float64)
        if kind == "input":
            inputs.append(tensor)
            names[target.id] = graph.placeholder(target.id)
        elif kind == "parameter":
            root.register_parameter(target.id, nn.Parameter(tensor))
            names[target.id] = graph.get_attr(target.id)
        else:
            names[target.id] = _call(graph, names, call, target.id)
    module = fx.GraphModule(root, graph)
    FakeTensorProp(module, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*inputs)
    module.recompile()
    parameters = {node.name: str(node.target) for node in graph.find_nodes(op="get_attr")}
    return CapturedGraph(module=module, parameters=parameters, route="fx")


def _value(graph: fx.Graph, names: dict[str, fx.Node], expression: ast.expr) -> Any:
    if isinstance(expression, ast.Name):
        return names[expression.id]
    if isinstance(expression, ast.Call):
        return _call(graph, names, expression, None)
    if isinstance(expression, ast.Tuple):
        return tuple(_value(graph, names, item) for item in expression.elts)
    return ast.literal_eval(expression)


def _call(graph: fx.Graph, names: dict[str, fx.Node], call: ast.Call, name: str | None) -> fx.Node:
    namespace, op, *chosen = ast.unparse(call.func).split(".")
    packet = getattr(getattr(torch.ops, namespace), op)
    args = tuple(_value(graph, names, arg) for arg in call.args)
    kwargs = {str(keyword.arg): _value(graph, names, keyword.value) for keyword in call.keywords}
    overload = next((name for name in (*chosen, "Tensor", "default") if name in packet.overloads()), None)
    target = packet if overload is None else getattr(packet, overload)
    return graph.create_node("call_function", target, args, kwargs, name=name or op)
