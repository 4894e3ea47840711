"""Which nodes of a broken-up trace run only if data says so: those on the lines of an `if` or loop that broke it.

Dynamo stops at a branch it cannot decide and traces on along the side that the example inputs take. What it recorded
inside that branch is marked (`BRANCH_KEY`), so that the matcher leaves it alone: the other side was never seen.
"""

from __future__ import annotations

import ast
import linecache
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch.fx as fx

from lte_compile.passes.dataflow import BRANCH_KEY
from lte_compile.passes.ir import CapturedGraph

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')  # as in node.meta["stack_trace"]
_SCALARS = re.compile(r"item\(\)|tolist|[Dd]ata[- ]dependent")  # a tensor's value became a Python number


class Branch(NamedTuple):
    """Lines [first, last] of a file that run depending on `condition`."""

    filename: str
    first: int
    last: int
    condition: str


def mark_branches(graphs: Iterable[CapturedGraph]) -> None:
    """Marks the nodes of data-dependent branches with the condition they hang on."""
    graphs = tuple(graphs)
    branches = {branch for graph in graphs for branch in _branches_of(graph.module)}
    if not branches:
        return
    for graph in graphs:
        for node in graph.module.graph.nodes:
            places = {(name, int(line)) for name, line in _FRAME.findall(node.meta.get("stack_trace") or "")}
            for branch in branches:
                if any(name == branch.filename and branch.first <= line <= branch.last for name, line in places):
                    node.meta[BRANCH_KEY] = branch.condition


def _branches_of(module: fx.GraphModule) -> Iterator[Branch]:
    reason: Any = getattr(module, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break or not reason.user_stack:
        return
    frame = reason.user_stack[-1]
    tree = _parsed(frame.filename)
    for statement in [] if tree is None else _deciding(tree, frame.lineno, bool(_SCALARS.search(reason.reason))):
        parts = _decided(statement)
        condition = f"`{ast.unparse(_condition(statement))}` ({frame.filename.rpartition('/')[2]}:{statement.lineno})"
        last = max(part.end_lineno or part.lineno for part in parts)
        yield Branch(frame.filename, min(part.lineno for part in parts), last, condition)


def _parsed(filename: str) -> ast.Module | None:
    source = "".join(linecache.getlines(filename))
    try:
        return ast.parse(source) if source else None
    except SyntaxError:  # a notebook cell with magics
        return None


_Statement = ast.If | ast.While | ast.IfExp | ast.For


def _condition(statement: _Statement) -> ast.expr:
    return statement.iter if isinstance(statement, ast.For) else statement.test


def _decided(statement: _Statement) -> list[ast.stmt] | list[ast.expr]:
    if isinstance(statement, ast.IfExp):
        return [statement.body, statement.orelse]
    return [*statement.body, *statement.orelse]


def _deciding(tree: ast.Module, line: int, is_scalar: bool) -> Iterator[_Statement]:
    """Statements whose condition is on `line`, or reads a name that a number was assigned to there."""
    function = _innermost_function(tree, line)
    statements = [node for node in ast.walk(function) if isinstance(node, _Statement)]
    names = set(_assigned_names(function, line)) if is_scalar else set()
    return (item for item in statements if _is_on(line, _condition(item)) or names & _names_in(_condition(item)))


def _is_on(line: int, node: ast.expr | ast.stmt) -> bool:
    return node.lineno <= line <= (node.end_lineno or node.lineno)


def _names_in(node: ast.expr) -> set[str]:
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}


def _innermost_function(tree: ast.Module, line: int) -> ast.AST:
    functions = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.lineno <= line <= (node.end_lineno or 0)
    ]
    return max(functions, key=lambda node: node.lineno, default=tree)


def _assigned_names(function: ast.AST, line: int) -> Iterator[str]:
    for node in ast.walk(function):
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) and _is_on(line, node):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (name for target in targets for name in _names_in(target))
