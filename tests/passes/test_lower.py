"""LowerSparse on small graphs; tests/passes/test_exported.py has it on whole models."""

from __future__ import annotations

import pytest
import torch

from lte_compile.passes.copying import copy_captured
from lte_compile.passes.lower import LowerSparse
from lte_compile.passes.pipeline import run_pipeline
from lte_compile.passes.rendering import render
from tests.passes.parsing import parse

HEAD = """
x = input(2, 3, 4)
w_router = parameter(3, 4)
b_router = parameter(3)
w_up = parameter(8, 4)
w_down = parameter(4, 8)
scores = lte.route(x, w_router, b_router)
"""
FFN = "lte.expert_ffn(x, gates, w_up, None, w_down, None, None, None, 'relu', 3)"
LOWERABLE = HEAD + f"gates = lte.select(scores, 'threshold', 0.4)\nreturn {FFN}"


def test_route_threshold_and_experts_become_one_node() -> None:
    graph = parse(LOWERABLE)
    before = copy_captured(graph)
    (report,) = run_pipeline(graph, (LowerSparse(),))
    assert render(graph).splitlines()[1:] == [
        "sparse_ffn = lte.sparse_ffn(x, w_router=w_router, b_router=b_router, w_up=w_up, w_down=w_down, "
        "activation='relu', expert_size=3, tau=0.4)  # float64[2, 3, 4]",
        "return sparse_ffn",
    ]
    assert report.changes == ("w_down: expert_ffn became sparse_ffn, kernel named relu",)
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(graph.module(x), before.module(x), rtol=1e-12, atol=1e-12)


MUST_STAY = {
    "soft": ("gates = lte.select(scores, 'soft', 0.5)", "soft gates scale experts, they do not select"),
    "dense": ("gates = lte.select(scores, 'dense', 0.5)", "dense gates select every expert"),
    "straight_through": ("gates = lte.select(scores, 'straight_through', 0.5)", "pass gradients to the router"),
}


@pytest.mark.parametrize("case", MUST_STAY)
def test_what_the_kernel_does_not_compute_keeps_its_nodes(case: str) -> None:
    gates, reason = MUST_STAY[case]
    graph = parse(f"{HEAD}{gates}\nreturn {FFN}")
    before = render(graph)
    (report,) = run_pipeline(graph, (LowerSparse(),))
    assert render(graph) == before
    (refusal,) = report.refusals
    assert reason in refusal.reason
    assert refusal.parameter == "w_down"


def test_scores_that_are_read_elsewhere_keep_their_router() -> None:
    """A traced router returns its scores: computing them twice would cost more than it saves."""
    graph = parse(f"{HEAD}gates = lte.select(scores, 'threshold', 0.5)\nreturn {FFN}, scores")
    (report,) = run_pipeline(graph, (LowerSparse(),))
    assert [refusal.reason for refusal in report.refusals] == ["its scores are read elsewhere"]


def test_a_second_run_is_refused_because_the_graph_is_lowered() -> None:
    graph = parse(LOWERABLE)
    run_pipeline(graph, (LowerSparse(),))
    with pytest.raises(ValueError, match="'lower-sparse' takes a routed graph"):
        run_pipeline(graph, (LowerSparse(),))


def test_the_density_to_expect_reaches_the_kernel() -> None:
    graph = parse(HEAD + f"gates = lte.select(scores, 'threshold', 0.4, 0.25)\nreturn {FFN}")
    run_pipeline(graph, (LowerSparse(),))
    assert "tau=0.4, density=0.25)" in render(graph)


FEATURES = """
x = input(2, 3, 4)
features = input(2, 3, 7)
flat = aten.reshape(x, [6, 4])
w_router = parameter(3, 7)
w_up = parameter(8, 4)
w_down = parameter(4, 8)
scores = lte.route(features, w_router, None)
gates = lte.select(scores, 'threshold', 0.4)
"""


def test_a_router_that_reads_another_tensor_hands_it_to_the_kernel() -> None:
    graph = parse(f"{FEATURES}return {FFN}")
    before = copy_captured(graph)
    run_pipeline(graph, (LowerSparse(),))
    assert "tau=0.4, x_router=features)" in render(graph)
    draw = torch.Generator().manual_seed(3)
    inputs = [torch.randn(2, 3, size, dtype=torch.float64, generator=draw) for size in (4, 7)]
    torch.testing.assert_close(graph.module(*inputs), before.module(*inputs), rtol=1e-12, atol=1e-12)


def test_what_the_router_reads_takes_the_shape_of_what_the_projections_read() -> None:
    """Models that flatten tokens between the router and the projections (GPT-2's Conv1D)."""
    flat_gates = f"{FEATURES}flat_gates = aten.reshape(gates, [6, 3])\n"
    graph = parse(flat_gates + f"return {FFN.replace('(x, gates', '(flat, flat_gates')}")
    before = copy_captured(graph)
    run_pipeline(graph, (LowerSparse(),))
    assert "aten.reshape(features, [-1, 7])" in render(graph)
    draw = torch.Generator().manual_seed(3)
    inputs = [torch.randn(2, 3, size, dtype=torch.float64, generator=draw) for size in (4, 7)]
    torch.testing.assert_close(graph.module(*inputs), before.module(*inputs), rtol=1e-12, atol=1e-12)
