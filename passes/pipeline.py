"""Running passes: levels are checked between them, and what a pass leaves unused is swept away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import pairwise
from typing import Any

import torch.fx as fx

from lte_compile.passes.ir import CapturedGraph, Pass, PassReport
from lte_compile.passes.rendering import render
from lte_compile.passes.verify import find_violation, verify


@dataclass(frozen=True)
class PipelineStep:
    """One pass as it ran: its report, and the graph's text before and after."""

    report: PassReport
    before: str
    after: str


def run_pipeline(
    graph: CapturedGraph,
    passes: Sequence[Pass],
    on_step: Callable[[PipelineStep], None] | None = None,
    *,
    max_rewrites: int | None = None,
) -> tuple[PassReport, ...]:
    """Run `passes` over `graph` in place and return their reports.

    Args:
        on_step: called after every pass with the graph's text before and after it.
        max_rewrites: stop changing the graph after this many rewrites over all passes; halving it finds the rewrite
            that breaks a model. The passes need a `limit` field then, as this project's have.

    Raises:
        ValueError: the passes do not fit one another or the graph's level. Nothing was changed.
        RuntimeError: a pass left an illegal graph, which is a bug in the pass.
    """
    _check_chain(graph, passes)
    left = max_rewrites
    reports = []
    for step in passes:
        before = render(graph) if on_step else ""
        report = _run_pass(graph, step if left is None else _limited(step, left), complete=left is None)
        left = None if left is None else left - len(report.changes)
        reports.append(report)
        if on_step:
            on_step(PipelineStep(report, before, render(graph)))
    return tuple(reports)


def _check_chain(graph: CapturedGraph, passes: Sequence[Pass]) -> None:
    if not passes:
        return
    first = passes[0]
    if violation := find_violation(graph, first.requires):
        raise ValueError(
            f"pass {first.name!r} takes a {first.requires.value} graph, and this one is not: "
            f"node {violation.node.name}: {violation.complaint}"
        )
    for earlier, later in pairwise(passes):
        if earlier.ensures is not later.requires:
            raise ValueError(
                f"pass {later.name!r} takes a {later.requires.value} graph, "
                f"but {earlier.name!r} before it leaves a {earlier.ensures.value} one"
            )


def _limited(step: Pass, limit: int) -> Pass:
    if not is_dataclass(step) or "limit" not in {field.name for field in fields(step)}:
        raise ValueError(f"pass {step.name!r} has no `limit` field, so max_rewrites cannot bound it")
    limited: Any = replace(step, limit=limit)
    bounded: Pass = limited
    return bounded


def _run_pass(graph: CapturedGraph, step: Pass, *, complete: bool) -> PassReport:
    unused_before = {node for node in graph.module.graph.nodes if not node.users}
    report = step(graph)
    _sweep(graph.module.graph, unused_before)
    graph.module.graph.lint()
    graph.module.recompile()
    verify(graph, step.ensures, after=step.name, complete=complete)
    return report


def _sweep(graph: fx.Graph, kept: set[fx.Node]) -> None:
    """Erase nodes that became unused. Those unused before stay: in-place updates, such as a cache's, look like that."""
    for node in reversed(graph.nodes):
        if not node.users and node not in kept and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
