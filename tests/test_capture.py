"""capture: every kind of model, every form of inputs, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

from lte_compile.capture.capture import Call, capture, capture_all, capture_by_dynamo, dummy_inputs
from lte_compile.capture.dummies import BATCH
from lte_compile.passes.dataflow import fake_value
from lte_compile.passes.match import find_ffns
from tests.zoo import build, families


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.dropout, self.down = nn.Linear(8, 32), nn.Dropout(0.5), nn.Linear(32, 8)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y: Tensor = self.down(self.dropout(F.relu(self.up(x))))
        return scale * y


class Branching(Mlp):
    """Looks at its data between two FFN calls: beyond torch.export, a graph break for Dynamo."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = super().forward(x, scale)
        return super().forward(-y if bool(y.sum() > 1e9) else y)


@pytest.mark.parametrize("inputs", [torch.ones(2, 8), (torch.ones(2, 8),), [torch.ones(2, 8)], {"x": torch.ones(2, 8)}])
def test_forms_of_inputs(inputs: Any) -> None:
    graph = capture(Mlp(), inputs)
    assert graph.route == "export"
    assert set(graph.parameters.values()) == {"up.weight", "up.bias", "down.weight", "down.bias"}


@pytest.mark.parametrize("inputs", [3, "text"])
def test_other_inputs_are_refused(inputs: Any) -> None:
    with pytest.raises(ValueError, match="give a dict of keyword arguments, a tuple of positional arguments"):
        capture(Mlp(), inputs)


def test_inputs_are_asked_for_where_they_cannot_be_guessed() -> None:
    with pytest.raises(ValueError, match=r"Mlp is not a transformers model.*pass example_inputs"):
        capture(Mlp())


def test_exported_programs_and_graph_modules() -> None:
    model, x = Mlp().eval(), torch.ones(2, 8)
    program = torch.export.export(model, (x,))
    expected = find_ffns(capture(model, x)).sites
    assert len(expected) == 1
    assert find_ffns(capture(program)).sites == expected
    assert find_ffns(capture(fx.symbolic_trace(model), x)).sites == expected
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    assert find_ffns(capture(module, x)).sites == expected


def test_a_bare_graph_module_needs_inputs() -> None:
    with pytest.raises(ValueError, match="carries no fake values; pass example_inputs"):
        capture(fx.symbolic_trace(Mlp()))


def test_missing_graph_inputs_are_named() -> None:
    class Pair(nn.Module):
        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return left + right

    with pytest.raises(ValueError, match="the graph reads 'right', which example_inputs does not give"):
        capture(fx.symbolic_trace(Pair()), {"left": torch.ones(2)})


def test_graph_breaks_give_several_graphs() -> None:
    x = torch.ones(2, 8)
    graphs = capture_all(Branching(), x)
    assert len(graphs) > 1
    assert {graph.route for graph in graphs} == {"dynamo"}
    assert find_ffns(graphs[0]).sites == find_ffns(capture(Mlp(), x)).sites
    with pytest.raises(ValueError, match=r"traced as \d graphs .* use capture_all"):
        capture(Branching(), x)


@pytest.mark.parametrize("model", [Mlp(), Branching()])
def test_the_model_is_left_as_it_was(model: nn.Module) -> None:
    model.train()
    model.dropout.eval()  # type: ignore[union-attr]
    model(torch.ones(2, 8)).sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    flags = [module.training for module in model.modules()]
    fused_encoder_layers = torch.backends.mha.get_fastpath_enabled()
    state, random_state = dict(model.state_dict()), torch.get_rng_state()

    capture_all(model, torch.ones(2, 8))

    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True) if p.grad is not None)
    assert list(model.state_dict()) == list(state)
    assert not model._forward_pre_hooks
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled() is fused_encoder_layers


def test_configuration_is_restored() -> None:
    model, inputs = build("llama")
    assert model.config.use_cache  # type: ignore[union-attr]
    capture(model, inputs)
    assert model.config.use_cache  # type: ignore[union-attr]


def test_dropout_is_off_while_capturing() -> None:
    graph = capture(Mlp().train(), torch.ones(2, 8))
    dropouts = [node for node in graph.module.graph.nodes if "dropout" in str(node.target)]
    assert all(node.args[2] is False for node in dropouts)


def test_dynamo_keeps_nothing() -> None:
    """A second capture is not served from the first one's compiled code."""
    model, call = Mlp(), Call((torch.ones(2, 8),), {})
    assert len(capture_by_dynamo(model, call)) == len(capture_by_dynamo(model, call)) == 1


def test_tied_parameters_have_one_name() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.head(self.table(ids))
            return logits

    graph = capture(Tied(), torch.zeros(2, 3, dtype=torch.long))
    assert set(graph.parameters.values()) == {"table.weight"}


def test_encoder_layers_show_their_ffn() -> None:
    """In eval mode without gradients torch runs them as one fused op."""
    layer = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True)
    assert len(find_ffns(capture(layer, torch.randn(2, 5, 16))).sites) == 1


@pytest.mark.parametrize("family", families())
def test_dummy_inputs_run(family: str) -> None:
    model, _ = build(family)
    inputs = dummy_inputs(model)
    with torch.no_grad():
        output = model(**inputs)
    assert len(output[0]) == BATCH


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dummy_inputs_follow_the_models_dtype(dtype: torch.dtype) -> None:
    model, _ = build("vit", dtype)
    assert dummy_inputs(model)["pixel_values"].dtype is dtype


def test_an_end_token_outside_of_the_vocabulary_is_left_out() -> None:
    """A GPT2Config with fewer tokens than GPT-2 has keeps its end token, 50256."""
    model = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    inputs = dummy_inputs(model)
    assert int(inputs["input_ids"].max()) < 40
    model(**inputs)


def test_unknown_main_inputs_are_named() -> None:
    model, _ = build("vit")
    model.main_input_name = "point_cloud"  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"reads 'point_cloud'.*known inputs: input_ids, pixel_values"):
        dummy_inputs(model)


def test_nodes_carry_fake_values() -> None:
    graph = capture(Mlp(), torch.ones(2, 8))
    values = [fake_value(node) for node in graph.module.graph.nodes if node.op == "call_function"]
    assert values
    assert all(isinstance(value, Tensor) for value in values)


class InPlace(Mlp):
    """Changes its hidden value in place and reads it by its old name."""

    def __init__(self, change: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        hidden = self.up(x)
        self.change(hidden)
        y: Tensor = self.down(hidden)
        return y


@pytest.mark.parametrize(
    "change", [lambda h: h.relu_(), torch.relu_, lambda h: F.relu(h, inplace=True), lambda h: h.relu_().mul_(2)]
)
def test_in_place_activations_are_seen_on_every_route(change: Callable[[Tensor], object]) -> None:
    model, x = InPlace(change).eval(), torch.randn(2, 8)
    traced = fx.symbolic_trace(model)
    graphs = [capture(model, x), *capture_by_dynamo(model, Call((x,), {})), capture(traced, x)]
    assert [len(find_ffns(graph).sites) for graph in graphs] == [1, 1, 1]
    traced.recompile()
    torch.testing.assert_close(traced(x), model(x))
