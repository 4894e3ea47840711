"""InsertRouter: flattened graphs get routers and anchors, and stay modules that run, train, copy and trace."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.fx as fx
from torch import Tensor, nn

from lte_compile.capture.capture import capture, capture_graph_module
from lte_compile.config import TransformConfig
from lte_compile.passes.anchors import lte_nodes
from lte_compile.passes.exported import rewrite_exported
from lte_compile.passes.fuse import FuseExperts
from lte_compile.passes.insert import InsertRouter
from lte_compile.passes.ir import CapturedGraph
from lte_compile.passes.lower import LowerSparse
from lte_compile.passes.match import find_ffns
from lte_compile.passes.pipeline import run_pipeline
from lte_compile.passes.rendering import render
from lte_compile.routing.router import Router, set_stage
from tests.passes.parsing import parse
from tests.routed import stack, tokens
from tests.zoo import build

SIZE = 12


class HalfOpen(nn.Module):
    """A stand-in for a router: every other expert is selected."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.register_buffer("gates", (torch.arange(num_experts) % 2).double())

    def forward(self, x: Tensor) -> Tensor:
        gates = self.get_buffer("gates")
        return gates.expand(*x.shape[:-1], len(gates))


def flattened(model: nn.Module, x: Tensor) -> fx.GraphModule:
    """The model as a GraphModule that owns its parameters, as users of torch.export have it."""
    module = torch.export.export(model, (x,)).module()
    assert isinstance(module, fx.GraphModule)
    return module


def with_routers(module: fx.GraphModule) -> CapturedGraph:
    graph = capture_graph_module(module)
    config = TransformConfig(expert_size=SIZE)
    routers: dict[str, nn.Module] = {}
    for seed, site in enumerate(find_ffns(graph).sites):
        router = Router(site, config, like=module.get_parameter(site.up))
        weights = torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(seed))
        router.load_initial(weights, torch.zeros(router.num_experts))
        routers[site.name] = router
    (report,) = run_pipeline(graph, (InsertRouter(routers=routers, expert_size=SIZE),))
    assert not report.refusals
    return graph


PLAIN = """
x = input(2, 3, 4)
w_up = parameter(8, 4)
w_down = parameter(4, 8)
return aten.linear(aten.relu(aten.linear(x, w_up)), w_down)
"""


def test_gates_scale_the_hidden_value() -> None:
    graph = parse(PLAIN)
    (report,) = run_pipeline(graph, (InsertRouter(routers={"w_down": HalfOpen(2)}, expert_size=4),))
    assert render(graph).splitlines() == [
        "x = input()  # float64[2, 3, 4]",
        "linear = aten.linear(x, w_up)  # float64[2, 3, 8]",
        "relu = aten.relu(linear)  # float64[2, 3, 8]",
        "router = self.router(x)  # float64[2, 3, 2]",
        "gate_hidden = lte.gate_hidden(relu, gates=router, expert_size=4)  # float64[2, 3, 8]",
        "linear_1 = aten.linear(gate_hidden, w_down)  # float64[2, 3, 4]",
        "return linear_1",
    ]
    assert report.changes == ("w_down: router router",)
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    w_up, w_down = graph.module.get_parameter("w_up"), graph.module.get_parameter("w_down")
    expected = torch.relu(x @ w_up[4:].T) @ w_down[:, 4:].T
    torch.testing.assert_close(graph.module(x), expected, rtol=1e-12, atol=1e-12)


def test_tokens_that_are_flat_between_the_projections() -> None:
    graph = parse("""
x = input(2, 3, 4)
w_up = parameter(8, 4)
w_down = parameter(4, 8)
return aten.linear(aten.view(aten.relu(aten.linear(x, w_up)), [6, 8]), w_down)
""")
    run_pipeline(graph, (InsertRouter(routers={"w_down": HalfOpen(2)}, expert_size=4),))
    assert "aten.reshape(router, [-1, 2])  # float64[6, 2]" in render(graph)
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert graph.module(x).shape == (6, 4)


def test_a_site_without_a_router_is_left_alone() -> None:
    graph = parse(PLAIN)
    before = render(graph)
    (report,) = run_pipeline(graph, (InsertRouter(routers={}, expert_size=4),))
    assert render(graph) == before
    assert [refusal.reason for refusal in report.refusals] == ["no router was given for site 'w_down'"]


def test_a_module_of_the_models_own_is_not_replaced() -> None:
    graph = parse(PLAIN)
    graph.module.add_submodule("router", nn.Identity())
    (report,) = run_pipeline(graph, (InsertRouter(routers={"w_down": HalfOpen(2)}, expert_size=4),))
    assert [refusal.reason for refusal in report.refusals] == ["the model has a module 'router' of its own"]


def test_a_graph_with_anchors_is_left_alone() -> None:
    graph = parse(PLAIN)
    insert = InsertRouter(routers={"w_down": HalfOpen(2)}, expert_size=4)
    insert(graph)
    once = render(graph)
    report = insert(graph)
    assert render(graph) == once
    assert [refusal.reason for refusal in report.refusals] == ["it has lte nodes already"]


def test_dense_stage_keeps_the_function_and_routers_live_beside_the_first_projection() -> None:
    model, x = stack(), tokens(2, 3)
    module = flattened(model, x)
    graph = with_routers(module)
    torch.testing.assert_close(module(x), model(x), rtol=1e-12, atol=1e-12)
    assert {name for name, child in module.named_modules() if isinstance(child, Router)} == {
        "0.up.router",
        "1.up.router",
    }
    assert len(list(lte_nodes(graph, "gate_hidden"))) == 2


def test_it_trains() -> None:
    module = flattened(stack(), x := tokens(2, 3))
    with_routers(module)
    set_stage(module, "soft")
    module(x).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values())
    assert "0.up.router.weight" in gradients


def test_a_deep_copy_is_a_model_of_its_own() -> None:
    module = flattened(stack(), x := tokens(2, 3))
    with_routers(module)
    set_stage(module, "hard")
    copied = deepcopy(module)
    expected = module(x)
    with torch.no_grad():
        module.get_parameter("0.up.router.weight").zero_()
    torch.testing.assert_close(copied(x), expected, rtol=0, atol=0)
    assert not torch.equal(module(x), expected)


def test_traced_again_it_lowers_like_any_transformed_model() -> None:
    module = flattened(stack(), x := tokens(2, 3))
    with_routers(module)
    set_stage(module, "hard")
    with torch.no_grad():
        expected = module(x)
        rewritten, _ = rewrite_exported(torch.export.export(module, (x,)), (FuseExperts(), LowerSparse()))
        torch.testing.assert_close(rewritten.module()(x), expected, rtol=1e-12, atol=1e-12)
    assert "lte.sparse_ffn" in str(rewritten.graph)


def test_fused_without_tracing_again_it_keeps_the_router_module() -> None:
    """The graph calls the router whole, so nothing can look into it: the experts fuse, the router stays."""
    module = flattened(stack(), x := tokens(2, 3))
    graph = with_routers(module)
    set_stage(module, "soft")
    expected = module(x)
    fusing, lowering = run_pipeline(graph, (FuseExperts(), LowerSparse()))
    assert len(fusing.changes) == 2
    assert all("not from lte.select in this graph" in refusal.reason for refusal in lowering.refusals)
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


def test_graphs_from_symbolic_trace_whose_linear_layers_are_modules() -> None:
    """No parameter is a node there; the fused node reads them through new get_attr nodes."""

    class Ffn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8, dtype=torch.float64), nn.Linear(8, 4, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            down: Tensor = self.down(torch.relu(self.up(x)))
            return down

    module, x = fx.symbolic_trace(Ffn()), tokens(3, width=4)
    graph = capture(module, x)
    expected = module(x)
    insert = InsertRouter(routers={"down.weight": HalfOpen(2)}, expert_size=4)
    run_pipeline(graph, (insert, FuseExperts()))
    assert "w_up=up.weight" in render(graph)
    assert not torch.equal(module(x), expected)
    with torch.no_grad():
        module.get_submodule("up.router").get_buffer("gates").fill_(1)
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["gpt2", "albert"])
def test_whole_models(name: str) -> None:
    model, inputs = build(name, torch.float64)
    with torch.no_grad():
        off = {"use_cache": False} if name == "gpt2" else {}
        module = torch.export.export(model, (), {**inputs, **off}, strict=False).module()
        assert isinstance(module, fx.GraphModule)
        expected = model(**inputs, **off).logits
        graph = with_routers(module)
        got = module(**inputs, **off).logits
    assert len(list(lte_nodes(graph, "gate_hidden"))) == 2
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
