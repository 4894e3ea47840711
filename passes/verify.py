"""What a legal graph of each level looks like: a table of rules, checked between passes.

A broken rule after a pass is a bug in that pass, never the user's mistake, hence RuntimeError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch.fx as fx
from torch import Tensor
from torch.fx.node import map_arg

from lte_compile.kernels.selection import SELECTION_RULES
from lte_compile.passes.anchors import arguments, computed_value, is_lte, lte_name, lte_nodes
from lte_compile.passes.building import fake_mode_of
from lte_compile.passes.dataflow import fake_value, hint, shape_of
from lte_compile.passes.ir import CapturedGraph, Level
from lte_compile.passes.lower import lowering_obstacle
from lte_compile.passes.rendering import render_around

Check = Callable[[CapturedGraph, fx.Node], str | None]


@dataclass(frozen=True)
class Rule:
    """`check(graph, node)` runs on every lte node and says what is wrong with it, or None."""

    name: str
    check: Check


@dataclass(frozen=True)
class Violation:
    node: fx.Node
    rule: str
    complaint: str


def find_violation(graph: CapturedGraph, level: Level, *, complete: bool = True) -> Violation | None:
    """The first node that breaks a rule of `level`, in graph order.

    `complete=False` leaves out the rules that say a level's work is finished, for a pipeline cut short on purpose.
    """
    rules = RULES[level] + (COMPLETENESS[level] if complete else ())
    for node in lte_nodes(graph):
        for rule in rules:
            if complaint := rule.check(graph, node):
                return Violation(node, rule.name, complaint)
    return None


def verify(graph: CapturedGraph, level: Level, *, after: str, complete: bool = True) -> None:
    """RuntimeError, naming rule and node and showing the graph around it, unless `graph` is legal at `level`."""
    violation = find_violation(graph, level, complete=complete)
    if violation is None:
        return
    node = violation.node
    raise RuntimeError(
        f"internal error: after {after} the graph is no legal {level.value} graph: node {node.name} breaks "
        f"rule {violation.rule!r}: {violation.complaint}\n{render_around(graph, node)}"
    )


def _not_dense(graph: CapturedGraph, node: fx.Node) -> str | None:
    return f"it calls lte.{lte_name(node)}"


def _no_kernels(graph: CapturedGraph, node: fx.Node) -> str | None:
    return "it calls lte.sparse_ffn" if is_lte(node, "sparse_ffn") else None


def _fits_op(graph: CapturedGraph, node: fx.Node) -> str | None:
    """Arity, types, shapes and expert counts: the op's own checks, run on the recorded fake values."""
    recorded = fake_value(node)
    if not isinstance(recorded, Tensor):
        return "it carries no fake tensor"
    try:
        with fake_mode_of(node):
            value = node.target(*map_arg(node.args, fake_value), **map_arg(node.kwargs, fake_value))  # type: ignore[operator]
    except (ValueError, TypeError, RuntimeError) as error:
        return f"the op refuses its arguments: {error}"
    if tuple(hint(size) for size in value.shape) != shape_of(node):
        return f"its recorded shape is {list(recorded.shape)}, the op returns {list(value.shape)}"
    return None


def _gates_come_from_selection(graph: CapturedGraph, node: fx.Node) -> str | None:
    if not is_lte(node, "gate_hidden", "expert_ffn"):
        return None
    source = computed_value(arguments(node)["gates"])
    # A router kept whole is a call_module; gates of an earlier graph (after a graph break) are an input.
    if is_lte(source, "select") or source.op in ("call_module", "placeholder"):
        return None
    return f"its gates come from {source.name}, which is neither lte.select nor a router module"


def _scores_come_from_route(graph: CapturedGraph, node: fx.Node) -> str | None:
    if not is_lte(node, "select"):
        return None
    source = computed_value(arguments(node)["scores"])
    if is_lte(source, "route") or source.op == "placeholder":
        return None
    return f"its scores come from {source.name}, which is not lte.route"


def _known_rule(graph: CapturedGraph, node: fx.Node) -> str | None:
    if not is_lte(node, "select"):
        return None
    rule = arguments(node)["rule"]
    return None if rule in SELECTION_RULES else f"selection rule {rule!r} is not registered"


def _lowered_where_possible(graph: CapturedGraph, node: fx.Node) -> str | None:
    if not is_lte(node, "expert_ffn") or lowering_obstacle(node) is not None:
        return None
    return "an lte.sparse_ffn could stand here"


_WELL_FORMED = (
    Rule("fits-op", _fits_op),
    Rule("gates-from-selection", _gates_come_from_selection),
    Rule("scores-from-route", _scores_come_from_route),
    Rule("known-selection-rule", _known_rule),
)
RULES: Mapping[Level, tuple[Rule, ...]] = {
    Level.DENSE: (Rule("no-lte-ops", _not_dense),),
    Level.ROUTED: (Rule("no-kernels", _no_kernels), *_WELL_FORMED),
    Level.LOWERED: _WELL_FORMED,
}
COMPLETENESS: Mapping[Level, tuple[Rule, ...]] = {
    Level.DENSE: (),
    Level.ROUTED: (),
    Level.LOWERED: (Rule("lowered-where-possible", _lowered_where_possible),),
}
