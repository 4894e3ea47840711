"""lte_compile.inspection.graphs: what is printed for models in each state, and that looking changes nothing."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from lte_compile.config import TransformConfig
from lte_compile.inspection.graphs import graph
from lte_compile.routing.router import set_stage
from lte_compile.transform import transform
from tests.routed import routed, stack, tokens
from tests.zoo import build


def transformed(stage: str) -> tuple[nn.Module, Tensor]:
    model, x = stack(blocks=1), tokens(2, 3)
    transform(model, TransformConfig(expert_size=8), x)
    return set_stage(model, stage), x


def test_small_graphs_are_printed_whole_before_and_after_each_pass() -> None:
    model, x = transformed("hard")
    assert str(graph(model, x)) == GOLDEN.strip()


GOLDEN = """
=== captured (routed) ===
input = input()  # float64[2, 3, 16]
route = lte.route(input, weight=0.up.router.weight, bias=0.up.router.bias)  # float64[2, 3, 5]
select = lte.select(route, rule='threshold', tau=0.5)  # float64[2, 3, 5]
linear = aten.linear(input, 0.up.weight, 0.up.bias)  # float64[2, 3, 40]
relu = aten.relu(linear)  # float64[2, 3, 40]
gate_hidden = lte.gate_hidden(relu, gates=select, expert_size=8)  # float64[2, 3, 40]
linear_1 = aten.linear(gate_hidden, 0.down.weight, 0.down.bias)  # float64[2, 3, 16]
add = aten.add(input, linear_1)  # float64[2, 3, 16]
return (add,)

=== after fuse-experts (routed) ===
input = input()  # float64[2, 3, 16]
route = lte.route(input, weight=0.up.router.weight, bias=0.up.router.bias)  # float64[2, 3, 5]
select = lte.select(route, rule='threshold', tau=0.5)  # float64[2, 3, 5]
expert_ffn = lte.expert_ffn(input, gates=select, w_up=0.up.weight, w_down=0.down.weight, b_up=0.up.bias, \
b_down=0.down.bias, activation='relu', expert_size=8)  # float64[2, 3, 16]
add = aten.add(input, expert_ffn)  # float64[2, 3, 16]
return (add,)

fuse-experts: 1 changed, 0 left alone
  + 0: 4 nodes became expert_ffn

=== after lower-sparse (lowered) ===
input = input()  # float64[2, 3, 16]
sparse_ffn = lte.sparse_ffn(input, w_router=0.up.router.weight, b_router=0.up.router.bias, w_up=0.up.weight, \
w_down=0.down.weight, b_up=0.up.bias, b_down=0.down.bias, activation='relu', expert_size=8, tau=0.5)  \
# float64[2, 3, 16]
add = aten.add(input, sparse_ffn)  # float64[2, 3, 16]
return (add,)

lower-sparse: 1 changed, 0 left alone
  + 0.down.weight: expert_ffn became sparse_ffn, kernel named relu
"""


def test_refusals_are_printed_with_their_reason() -> None:
    model, x = transformed("soft")
    assert str(graph(model, x)).endswith("  - expert_ffn: soft gates scale experts, they do not select")


def test_without_lowering_the_graph_stays_trainable() -> None:
    model, x = transformed("hard")
    trace = graph(model, x, lower=False)
    assert [stage.title for stage in trace.stages] == ["captured (routed)", "after fuse-experts (routed)"]
    assert "lte.sparse_ffn" not in str(trace)


def test_an_untransformed_model_shows_the_ffns_that_were_found() -> None:
    (stage,) = graph(stack(blocks=2), tokens(2, 3)).stages
    assert stage.title == "captured (dense)"
    assert "lte." not in stage.text
    assert stage.note.splitlines() == ["2 FFNs found, none has a router; lte_compile.transform adds them", "  0", "  1"]


def test_long_graphs_are_shortened_to_their_ffns() -> None:
    model, inputs = build("llama")
    (stage,) = graph(model, inputs).stages
    shown = stage.shown.splitlines()
    assert shown.count("...") == 3
    assert sum("mlp." in line for line in shown) == 6
    assert not any("self_attn" in line for line in shown)
    assert "self_attn" in stage.text


def test_a_long_transformed_graph_shows_what_each_pass_changed() -> None:
    model, inputs = routed("llama", torch.float32)
    set_stage(model, "hard")
    captured, fused, lowered = graph(model, inputs).stages
    assert captured.shown.count("lte.gate_hidden") == 2
    assert fused.shown.count("lte.expert_ffn") == 2
    assert lowered.shown.count("lte.sparse_ffn") == 2
    assert "self_attn" not in captured.shown + fused.shown + lowered.shown
    assert len(lowered.text.splitlines()) > 100


def test_a_model_that_traces_to_several_graphs_shows_each() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = stack(blocks=1), stack(blocks=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            if x.sum() > 1e9:  # depends on data: no tracer follows both ways
                x = -x
            result: Tensor = self.second(x)
            return result

    stages = graph(Branching(), tokens(2, 3)).stages
    assert [stage.title for stage in stages] == ["graph 1 of 2, captured (dense)", "graph 2 of 2, captured (dense)"]
    assert ["first.0" in stage.note for stage in stages] == [True, False]


def test_looking_changes_nothing() -> None:
    """A GraphModule and an ExportedProgram own the very graph that is captured."""
    model, x = transformed("hard")
    with torch.no_grad():
        program = torch.export.export(model, (x,))
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    before = str(program.graph), str(module.graph)
    assert "lte.sparse_ffn" in str(graph(program))
    assert "lte.sparse_ffn" in str(graph(module, x))
    assert (str(program.graph), str(module.graph)) == before
