"""The pipeline's contract: levels are checked, broken passes are caught, dead code goes and in-place updates stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.fx as fx

from lte_compile.passes.anchors import level_of, lte_nodes
from lte_compile.passes.copying import copy_captured
from lte_compile.passes.fuse import FuseExperts
from lte_compile.passes.ir import CapturedGraph, Level, PassReport
from lte_compile.passes.lower import LowerSparse
from lte_compile.passes.pipeline import PipelineStep, run_pipeline
from lte_compile.passes.rendering import ELISION, excerpt, render
from lte_compile.passes.verify import find_violation, verify
from tests.passes.parsing import parse

TWO_FFNS = """
x = input(3, 4)
w_router = parameter(2, 4)
w_up = parameter(8, 4)
w_down = parameter(4, 8)
gates = lte.select(lte.route(x, w_router, None), 'threshold', 0.5)
y = aten.linear(lte.gate_hidden(aten.relu(aten.linear(x, w_up)), gates, 4), w_down)
w_router2 = parameter(2, 4)
w_up2 = parameter(8, 4)
w_down2 = parameter(4, 8)
gates2 = lte.select(lte.route(y, w_router2, None), 'threshold', 0.5)
return aten.linear(lte.gate_hidden(aten.relu(aten.linear(y, w_up2)), gates2, 4), w_down2)
"""


@dataclass(frozen=True)
class Edit:
    """A pass that does whatever `edit` does."""

    name: ClassVar[str] = "edit"
    requires: ClassVar[Level] = Level.ROUTED
    ensures: ClassVar[Level] = Level.ROUTED
    edit: Callable[[fx.Graph], None]

    def __call__(self, graph: CapturedGraph) -> PassReport:
        self.edit(graph.module.graph)
        return PassReport(name=self.name, changes=("edited",))


def node_named(graph: fx.Graph, name: str) -> fx.Node:
    nodes: list[fx.Node] = list(graph.nodes)
    return next(node for node in nodes if node.name == name)


def test_every_pass_is_reported_and_shown_before_and_after() -> None:
    graph = parse(TWO_FFNS)
    steps: list[PipelineStep] = []
    reports = run_pipeline(graph, (FuseExperts(), LowerSparse()), steps.append)
    assert [report.name for report in reports] == ["fuse-experts", "lower-sparse"]
    assert [len(report.changes) for report in reports] == [2, 2]
    assert [isinstance(step, PipelineStep) for step in steps] == [True, True]
    assert "lte.gate_hidden" in steps[0].before
    assert "lte.gate_hidden" not in steps[0].after
    assert steps[0].after == steps[1].before
    assert steps[1].after == render(graph)
    assert level_of(graph) is Level.LOWERED


def test_a_pipeline_whose_levels_do_not_meet_is_refused_before_it_starts() -> None:
    graph = parse(TWO_FFNS)
    before = render(graph)
    with pytest.raises(
        ValueError, match="'fuse-experts' takes a routed graph, but 'lower-sparse' before it leaves a lowered"
    ):
        run_pipeline(graph, (LowerSparse(), FuseExperts()))
    assert render(graph) == before


def test_a_graph_of_another_level_is_refused() -> None:
    graph = parse(TWO_FFNS)
    run_pipeline(graph, (FuseExperts(), LowerSparse()))
    with pytest.raises(ValueError, match="takes a routed graph, and this one is not: node sparse_ffn"):
        run_pipeline(graph, (FuseExperts(),))


def test_a_pass_that_leaves_an_illegal_graph_is_an_internal_error_that_shows_the_place() -> None:
    def bypass_selection(graph: fx.Graph) -> None:
        gates = node_named(graph, "gates")
        gates.replace_all_uses_with(gates.args[0])  # type: ignore[arg-type]

    with pytest.raises(
        RuntimeError, match=r"(?s)rule 'gates-from-selection'.*route.*neither lte.select.*> gate_hidden = "
    ):
        run_pipeline(parse(TWO_FFNS), (Edit(bypass_selection),))


@pytest.mark.parametrize(
    "line, rule",
    [
        ("lte.gate_hidden(h, aten.relu(scores), 4)", "gates-from-selection"),
        ("lte.gate_hidden(h, lte.select(aten.relu(scores), 'soft', 0.5), 4)", "scores-from-route"),
    ],
)
def test_verifier_names_the_broken_rule(line: str, rule: str) -> None:
    graph = parse(f"""
x = input(3, 4)
w_router = parameter(2, 4)
h = input(3, 8)
scores = lte.route(x, w_router, None)
return {line}
""")
    violation = find_violation(graph, Level.ROUTED)
    assert violation is not None
    assert violation.rule == rule


def test_verifier_catches_arguments_that_the_op_refuses() -> None:
    graph = parse(TWO_FFNS)
    (first, _) = lte_nodes(graph, "gate_hidden")
    first.args = (*first.args[:2], 3)  # 8 neurons in experts of 3 need 3 gates, not 2
    with pytest.raises(
        RuntimeError, match=r"rule 'fits-op': the op refuses its arguments: 8 neurons .* got gates for 2"
    ):
        verify(graph, Level.ROUTED, after="a test")


def test_verifier_wants_kernels_where_they_fit_on_the_lowered_level() -> None:
    graph = parse(TWO_FFNS)
    run_pipeline(graph, (FuseExperts(),))
    violation = find_violation(graph, Level.LOWERED)
    assert violation is not None
    assert violation.rule == "lowered-where-possible"
    assert find_violation(graph, Level.LOWERED, complete=False) is None


def test_dense_graphs_hold_no_lte_nodes() -> None:
    violation = find_violation(parse(TWO_FFNS), Level.DENSE)
    assert violation is not None
    assert (violation.rule, violation.node.name) == ("no-lte-ops", "route")


@pytest.mark.parametrize("allowed, left", [(0, 2), (1, 1), (3, 0)])
def test_rewrites_can_be_rationed_to_find_the_one_that_breaks_a_model(allowed: int, left: int) -> None:
    graph = parse(TWO_FFNS)
    reports = run_pipeline(graph, (FuseExperts(), LowerSparse()), max_rewrites=allowed)
    assert sum(len(report.changes) for report in reports) == min(allowed, 4)
    assert len(list(lte_nodes(graph, "gate_hidden"))) == left
    assert all("limit" in refusal.reason for refusal in reports[0].refusals)


def test_rationing_needs_a_limit_field() -> None:
    with pytest.raises(ValueError, match="'edit' has no `limit` field"):
        run_pipeline(parse(TWO_FFNS), (Edit(lambda graph: None),), max_rewrites=1)


def test_what_a_pass_orphans_is_erased_and_what_was_unused_before_stays() -> None:
    """An in-place update without a user, such as a cache's, has its effect all the same."""
    graph = parse("""
x = input(3, 4)
cache = input(3, 4)
update = aten.copy_(cache, x)
old = aten.relu(x)
return aten.neg(old)
""")

    def skip_relu(nodes: fx.Graph) -> None:
        node_named(nodes, "old").replace_all_uses_with(node_named(nodes, "x"))

    run_pipeline(graph, (Edit(skip_relu),))
    cache = torch.zeros(3, 4, dtype=torch.float64)
    (result,) = [graph.module(torch.ones(3, 4, dtype=torch.float64), cache)]
    assert "old" not in render(graph)
    assert torch.equal(cache, torch.ones_like(cache))
    assert torch.equal(result, -torch.ones_like(result))


def test_a_copied_graph_can_be_changed_alone() -> None:
    graph = parse(TWO_FFNS)
    before = render(graph)
    copied = copy_captured(graph)
    run_pipeline(copied, (FuseExperts(),))
    assert render(graph) == before
    assert render(copied) != before
    assert copied.module.w_up is graph.module.w_up


def test_excerpt_marks_gaps() -> None:
    lines = [str(number) for number in range(9)]
    assert excerpt(lines, {4}, context=1).splitlines() == [ELISION, "3", "4", "5", ELISION]
    assert excerpt(lines, {0, 8}).splitlines() == ["0", ELISION, "8"]
