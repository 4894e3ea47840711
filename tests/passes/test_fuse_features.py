"""FuseFeatures on small graphs, and that a compiled model with two-layer routers has the fused node."""

from __future__ import annotations

import pytest
import torch

from lte_compile.backend import rewrite_graph
from lte_compile.config import RouterKind, Stage, TransformConfig
from lte_compile.passes.anchors import lte_name, lte_nodes
from lte_compile.passes.copying import copy_captured
from lte_compile.passes.fuse_features import FuseFeatures
from lte_compile.passes.ir import CapturedGraph
from lte_compile.passes.lower import LowerSparse
from lte_compile.passes.pipeline import run_pipeline
from lte_compile.passes.rendering import render
from lte_compile.routing.router import set_stage
from lte_compile.transform import transform
from tests.passes.parsing import parse
from tests.routed import stack, tokens

FEATURES = "joined = aten.cat((x, aten.relu(aten.linear(x, w, b))), -1)"
FFN = """
w_router = parameter(3, 9)
w_up = parameter(8, 4)
w_down = parameter(4, 8)
scores = lte.route(joined, w_router, None)
gates = lte.select(scores, 'threshold', 0.4)
return lte.expert_ffn(x, gates, w_up, None, w_down, None, None, None, 'relu', 3)
"""
INPUTS = "x = input(2, 3, 4)\nother = input(2, 3, 4)\nw = parameter(5, 4)\nb = parameter(5)\n"


def lowered(features: str) -> CapturedGraph:
    graph = parse(f"{INPUTS}{features}\n{FFN}")
    run_pipeline(graph, (LowerSparse(),))
    return graph


def test_three_nodes_become_one() -> None:
    graph = lowered(FEATURES)
    before = copy_captured(graph)
    (report,) = run_pipeline(graph, (FuseFeatures(),))
    assert "lte.router_features(x, weight=w, bias=b)" in render(graph)
    assert "aten.cat" not in render(graph)
    assert len(report.changes) == 1
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(graph.module(*x), before.module(*x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "features",
    [
        "joined = aten.cat((aten.relu(aten.linear(x, w, b)), x), -1)",
        "joined = aten.cat((x, aten.relu(aten.linear(other, w, b))), -1)",
        "joined = aten.cat((x, aten.linear(x, w, b)), -1)",
        "joined = aten.cat((x, aten.relu(aten.linear(x, w, None))), -1)",
        "joined = input(2, 3, 9)",
    ],
)
def test_anything_else_stays(features: str) -> None:
    graph = lowered(features)
    before = render(graph)
    (report,) = run_pipeline(graph, (FuseFeatures(),))
    assert render(graph) == before
    assert not report.changes


def test_a_limit_leaves_the_rest() -> None:
    graph = lowered(FEATURES)
    (report,) = run_pipeline(graph, (FuseFeatures(),), max_rewrites=0)
    assert not report.changes
    assert "aten.cat" in render(graph)


@torch.no_grad()
def test_compiled_models_have_the_fused_node() -> None:
    model = transform(stack(), TransformConfig(expert_size=12, router=RouterKind.TWO_LAYER, router_rank=5), tokens(3))
    set_stage(model.eval(), Stage.HARD)
    seen: list[list[str]] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        rewritten, _ = rewrite_graph(gm, inputs)
        graph = CapturedGraph(module=rewritten, parameters={}, route="dynamo")
        seen.append([lte_name(node) for node in lte_nodes(graph)])
        return rewritten

    torch.compiler.reset()
    x = tokens(3)
    compiled = torch.compile(model, backend=backend, fullgraph=True)(x)
    assert seen
    assert seen[0] == ["router_features", "sparse_ffn"] * (len(seen[0]) // 2)
    torch.testing.assert_close(compiled, model(x), rtol=1e-6, atol=1e-6)
