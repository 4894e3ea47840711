"""torch.compile(model, backend="lte"): what the graphs become, and that results and gradients stay eager's."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.fx as fx
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lte_compile.backend import lte_backend, rewrite_graph
from lte_compile.config import TransformConfig
from lte_compile.passes.anchors import is_lte, lte_name
from lte_compile.passes.ir import PassReport
from lte_compile.routing.router import routers, set_stage
from lte_compile.running.tracing import trace_routers
from lte_compile.transform import transform
from tests.routed import routed, stack, tokens

AOT_EAGER: dict[str, Any] = {"compiler": "aot_eager"}
# Fused and unfused float32 sums in another order, over two layers.
assert_same = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small(stage: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    model, x = stack(dtype=dtype), tokens(2, 3, dtype=dtype)
    transform(model, TransformConfig(expert_size=12), x)
    return set_stage(model, stage), x


class Recorder:
    """A backend that rewrites as ours does, keeps what came out and runs it as it is."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []
        self.reports: list[PassReport] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        code = str(gm.graph)
        rewritten, reports = rewrite_graph(gm, example_inputs)
        assert str(gm.graph) == code, "Dynamo's own graph was changed"
        self.graphs.append(rewritten)
        self.reports += reports
        return rewritten.forward

    @property
    def inner_ops(self) -> list[str]:
        """Of the graphs that the graphs call."""
        called = [module for graph in self.graphs for module in graph.children() if isinstance(module, fx.GraphModule)]
        return [lte_name(node) for graph in called for node in graph.graph.nodes if is_lte(node)]

    @property
    def ops(self) -> list[str]:
        return [lte_name(node) for graph in self.graphs for node in graph.graph.nodes if is_lte(node)]


def recorded(model: nn.Module, x: Tensor) -> tuple[Recorder, Tensor]:
    recorder = Recorder()
    result: Tensor = torch.compile(model, backend=recorder, fullgraph=True)(x)
    return recorder, result


def test_inference_runs_on_sparse_ffn() -> None:
    model, x = small("hard")
    with torch.no_grad():
        recorder, result = recorded(model, x)
        assert_same(result, model(x))
    assert recorder.ops == ["sparse_ffn", "sparse_ffn"]


@pytest.mark.parametrize("stage", ["dense", "soft", "hard"])
def test_graphs_that_need_gradients_keep_their_router(stage: str) -> None:
    model, x = small(stage)
    recorder, result = recorded(model, x)
    assert recorder.ops == ["route", "select", "expert_ffn"] * 2
    assert_same(result, model(x))


def test_without_trainable_inputs_no_gradients_are_needed() -> None:
    model, x = small("hard")
    recorder, _ = recorded(model.requires_grad_(False), x)
    assert recorder.ops == ["sparse_ffn", "sparse_ffn"]


def test_traced_routers_keep_their_scores_in_inference() -> None:
    model, x = small("hard")
    with torch.no_grad(), trace_routers(model) as trace:
        recorder, _ = recorded(model, x)
    assert recorder.ops == ["route", "select", "expert_ffn"] * 2
    assert [refusal.reason for refusal in recorder.reports[1].refusals] == ["its scores are read elsewhere"] * 2
    with torch.no_grad(), trace_routers(model) as eager:
        model(x)
    assert trace.density() == eager.density()


def test_two_models_in_one_graph_keep_their_own_weights() -> None:
    """Dynamo names parameters relative to the module, so both models' have the same names."""
    (first, x), (second, _) = small("hard"), small("hard")
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(-0.5)

        def both(left: nn.Module, right: nn.Module, x: Tensor) -> Tensor:
            result: Tensor = left(x) - right(x)
            return result

        recorder = Recorder()
        result = torch.compile(both, backend=recorder, fullgraph=True)(first, second, x)
        assert_same(result, both(first, second, x))
    assert recorder.ops == ["sparse_ffn"] * 4


def test_checkpointed_layers_are_rewritten_inside() -> None:
    """Hooks hand the gates over by an attribute, which Dynamo traces in a checkpointed region only if told to."""

    class Checkpointed(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = checkpoint(self.block, x, use_reentrant=False)
            return result

    block, x = small("soft")
    model = Checkpointed(block)
    parameters = list(model.parameters())
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        recorder, _ = recorded(model, x)
        compiled = torch.compile(model, backend="lte", options=AOT_EAGER, fullgraph=True)
        results = [torch.autograd.grad(call(x).square().sum(), parameters) for call in (model, compiled)]
    assert recorder.inner_ops == ["route", "select", "expert_ffn"] * 2
    assert_same(results[1], results[0])


def test_symbolic_sizes() -> None:
    model, x = small("hard")
    recorder = Recorder()
    compiled = torch.compile(model, backend=recorder, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for shape in ((2, 3), (4, 7), (5, 2)):
            x = tokens(*shape, dtype=torch.float32)
            assert_same(compiled(x), model(x))
    assert len(recorder.graphs) == 1
    assert recorder.ops == ["sparse_ffn", "sparse_ffn"]


def test_the_threshold_can_be_moved_after_compiling() -> None:
    model, x = small("hard")
    compiled = torch.compile(model, backend="lte", options=AOT_EAGER, fullgraph=True)
    with torch.no_grad():
        for threshold in (0.5, 0.3, 0.7):
            for router in routers(model):
                router.threshold = threshold
            assert_same(compiled(x), model(x))


def test_autocast() -> None:
    """The op casts x and weights as autocast would; scores stay float32 on both sides, so the same experts run."""
    model, x = small("hard")
    compiled = torch.compile(model, backend="lte", options=AOT_EAGER, fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, actual = model(x), compiled(x)
    assert actual.dtype == expected.dtype
    assert_same(actual, expected, rtol=2e-2, atol=2e-2)  # bfloat16 keeps 8 bits


def test_a_graph_break_between_the_projections_leaves_the_anchor() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 40), nn.Linear(40, 16)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.up(x))
            torch._dynamo.graph_break()  # does nothing where torch.export traces
            result: Tensor = self.down(hidden)
            return result

    model, x = Broken(), tokens(2, 3, dtype=torch.float32)
    transform(model, TransformConfig(expert_size=12), x)
    set_stage(model, "hard")
    recorder = Recorder()
    with torch.no_grad():
        assert_same(torch.compile(model, backend=recorder)(x), model(x))
    assert "gate_hidden" in recorder.ops


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_inference_of_transformers_models(name: str) -> None:
    model, inputs = routed(name, torch.float32)
    set_stage(model, "hard")
    compiled = torch.compile(model, backend="lte", options=AOT_EAGER, fullgraph=True)
    with torch.no_grad():
        assert_same(compiled(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_training_step_with_router_losses(name: str) -> None:
    model, inputs = routed(name, torch.float32)
    set_stage(model, "soft")
    labels = inputs["input_ids"] if name == "llama" else torch.tensor([0, 2])
    batch = {**inputs, "labels": labels}

    def step(call: Any) -> dict[str, Tensor]:
        model.zero_grad()
        with trace_routers(model) as trace:
            out = call(**batch)
        loss = out.loss + 0.3 * trace.efficiency_loss() + 0.5 * trace.separability_loss()
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return {"loss": loss.detach(), **gradients}

    expected = step(model)
    actual = step(torch.compile(model, backend="lte", options=AOT_EAGER, fullgraph=True))
    assert actual.keys() == expected.keys()
    assert sum("router" in name for name in actual) == 4
    for key in expected:
        assert_same(actual[key], expected[key])


def test_dynamo_explains_one_graph_without_breaks() -> None:
    model, inputs = routed("llama", torch.float32)
    set_stage(model, "soft")
    explained = torch._dynamo.explain(model)(**inputs, use_cache=False)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


@pytest.mark.parametrize("trains", [False, True])
def test_inductor(trains: bool) -> None:
    model, x = small("soft" if trains else "hard")
    compiled = torch.compile(model, backend="lte", fullgraph=True)
    with torch.set_grad_enabled(trains):
        expected, actual = model(x), compiled(x)
    assert_same(actual, expected)
    if trains:
        parameters = list(model.parameters())
        gradients = [torch.autograd.grad(result.square().sum(), parameters) for result in (expected, actual)]
        assert_same(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)  # gradients are sums over tokens


def test_a_model_without_routers_compiles_as_it_is_with_a_warning() -> None:
    model, x = stack(dtype=torch.float32), tokens(2, 3, dtype=torch.float32)
    with pytest.warns(UserWarning, match="found no routed FFN"), torch.no_grad():
        result = torch.compile(model, backend="lte", options=AOT_EAGER)(x)
    assert_same(result, model(x))


def test_a_graph_without_parameters_is_no_reason_to_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = torch.compile(torch.neg, backend="lte", options={"compiler": "eager"})(torch.ones(2))
    assert torch.equal(result, -torch.ones(2))


def test_the_backend_is_registered() -> None:
    assert "lte" in torch._dynamo.list_backends()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"options": {"compilr": "eager"}}, "no option 'compilr'.*its own are compiler, lower, fallback; did you mean"),
        ({"options": {"max_autotun": True}}, "no option 'max_autotun'.*did you mean 'max_autotune'"),
        ({"options": {"max_autotune": True, **AOT_EAGER}}, "'max_autotune', and compiler 'aot_eager' has none"),
        ({"options": {"lower": "yes"}}, "lower must be True or False; got 'yes'"),
        ({"options": {"fallback": "refse"}}, "must be 'allow' or 'refuse'; got 'refse'; did you mean 'refuse'"),
        ({"options": {"compiler": "aot_eagre"}}, "got 'aot_eagre'; did you mean 'aot_eager'"),
        ({"mode": "fastest"}, r"mode must be one of default, (?!default).*reduce-overhead.*got 'fastest'"),
        ({"mode": "reduce-overhead", "options": AOT_EAGER}, "mode='reduce-overhead' is inductor's"),
    ],
)
def test_mistakes_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lte_backend(fx.symbolic_trace(torch.nn.Identity()), [], **arguments)
