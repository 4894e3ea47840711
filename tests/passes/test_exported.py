"""Passes over exported programs: whole models keep their function, and the programs stay valid."""

from __future__ import annotations

import inspect
import io
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from lte_compile.config import TransformConfig
from lte_compile.passes.anchors import lte_nodes
from lte_compile.passes.exported import captured_program, rewrite_exported
from lte_compile.passes.fuse import FuseExperts
from lte_compile.passes.lower import LowerSparse
from lte_compile.passes.rendering import render
from lte_compile.routing.router import set_stage
from lte_compile.transform import transform
from tests.routed import routed, stack, tokens
from tests.zoo import EXPECTED

MODEL_TOLERANCE = 1e-10  # of the largest output; float64 sums in another order, over all layers
INFERENCE = (FuseExperts(), LowerSparse())


def export(model: nn.Module, inputs: dict[str, Any], shapes: dict[str, Any] | None = None) -> ExportedProgram:
    off = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    dynamic = None if shapes is None else {**shapes, **dict.fromkeys(off)}
    with torch.no_grad():
        return torch.export.export(model, (), {**inputs, **off}, dynamic_shapes=dynamic, strict=False)


def run(program: ExportedProgram, inputs: dict[str, Any]) -> Tensor:
    assert program.example_inputs is not None
    constants = {key: value for key, value in program.example_inputs[1].items() if not isinstance(value, Tensor)}
    with torch.no_grad():
        return main_output(program.module()(**{**constants, **inputs}))


def main_output(output: Any) -> Tensor:
    tensor = output if isinstance(output, Tensor) else output.logits
    assert isinstance(tensor, Tensor)
    return tensor


def distance(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((actual - expected).abs().max() / expected.abs().max())


def count(program: ExportedProgram, op: str) -> int:
    return len(list(lte_nodes(captured_program(program, program.graph_module), op)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "opt", "t5", "phi3", "vit"])
def test_exported_models_keep_their_function(name: str) -> None:
    model, inputs = routed(name)
    set_stage(model, "hard")
    with torch.no_grad():
        expected = main_output(model(**inputs))
    program = export(model, inputs)
    for passes, op in ((INFERENCE[:1], "expert_ffn"), (INFERENCE, "sparse_ffn")):
        rewritten, reports = rewrite_exported(program, passes)
        assert not any(report.refusals for report in reports)
        assert count(rewritten, op) == EXPECTED[name].sites
        assert distance(run(rewritten, inputs), expected) <= MODEL_TOLERANCE


def test_layers_that_share_weights_are_fused_at_every_call() -> None:
    model, inputs = routed("albert")
    set_stage(model, "hard")
    rewritten, _ = rewrite_exported(export(model, inputs), INFERENCE)
    assert count(rewritten, "sparse_ffn") == 2
    with torch.no_grad():
        assert distance(run(rewritten, inputs), main_output(model(**inputs))) <= MODEL_TOLERANCE


@cache
def dynamic_gpt2() -> tuple[nn.Module, ExportedProgram, ExportedProgram]:
    """GPT-2 flattens tokens around its projections, so its sizes are products of symbols."""
    model, inputs = routed("gpt2")
    set_stage(model, "hard")
    axes = {0: Dim("batch"), 1: Dim("tokens", max=64)}
    program = export(model, inputs, {"input_ids": axes, "attention_mask": axes})
    return model, program, rewrite_exported(program, INFERENCE)[0]


def some_text(*shape: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 90, shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("shape", [(2, 3), (3, 17)])
def test_symbolic_sizes_stay_symbolic(shape: tuple[int, int]) -> None:
    model, _, rewritten = dynamic_gpt2()
    with torch.no_grad():
        expected = main_output(model(**some_text(*shape)))
    assert distance(run(rewritten, some_text(*shape)), expected) <= MODEL_TOLERANCE


def test_the_rewritten_program_is_a_valid_program_of_the_same_signature() -> None:
    _, program, rewritten = dynamic_gpt2()
    rewritten.validate()  # type: ignore[no-untyped-call]
    assert rewritten.graph_signature.input_specs == program.graph_signature.input_specs
    assert rewritten.range_constraints == program.range_constraints
    assert rewritten.state_dict.keys() == program.state_dict.keys()
    assert all(rewritten.state_dict[name] is tensor for name, tensor in program.state_dict.items())
    (first, *_) = lte_nodes(captured_program(rewritten, rewritten.graph_module), "sparse_ffn")
    assert str(first.meta["val"].shape) == str(first.args[0].meta["val"].shape)  # type: ignore[union-attr]
    assert "nn_module_stack" in first.meta


def test_the_given_program_is_left_as_it_was() -> None:
    _, program, _ = dynamic_gpt2()
    before = render(captured_program(program, program.graph_module))
    rewrite_exported(program, INFERENCE)
    assert render(captured_program(program, program.graph_module)) == before
    assert count(program, "gate_hidden") == 2


def test_it_can_be_decomposed_saved_and_loaded() -> None:
    model, _, rewritten = dynamic_gpt2()
    stored = io.BytesIO()
    torch.export.save(rewritten, stored)
    stored.seek(0)
    with torch.no_grad():
        expected = main_output(model(**some_text(2, 5)))
    for program in (torch.export.load(stored), rewritten.run_decompositions({})):
        assert count(program, "sparse_ffn") == 2
        assert distance(run(program, some_text(2, 5)), expected) <= MODEL_TOLERANCE


def test_an_ffn_whose_result_is_the_programs_output() -> None:
    """The output's name in the signature follows the node that computes it now."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    x = tokens(3, width=4)
    transform(model, TransformConfig(expert_size=4), x)
    set_stage(model, "hard")
    rewritten, _ = rewrite_exported(torch.export.export(model, (x,)), INFERENCE)
    rewritten.validate()  # type: ignore[no-untyped-call]
    assert rewritten.graph_signature.user_outputs == ("sparse_ffn",)
    with torch.no_grad():
        torch.testing.assert_close(rewritten.module()(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stage, reason", [("soft", "soft gates scale"), ("dense", "dense gates select every")])
def test_other_stages_keep_expert_ffn_with_the_reason(stage: str, reason: str) -> None:
    model, x = stack(), tokens(2, 3)
    transform(model, TransformConfig(expert_size=12), x)
    set_stage(model, stage)
    with torch.no_grad():
        rewritten, (_, lowering) = rewrite_exported(torch.export.export(model, (x,)), INFERENCE)
        assert distance(rewritten.module()(x), model(x)) <= MODEL_TOLERANCE
    assert [count(rewritten, op) for op in ("expert_ffn", "sparse_ffn")] == [2, 0]
    assert [refusal.reason.startswith(reason) for refusal in lowering.refusals] == [True, True]


def test_tied_parameters_go_by_one_name() -> None:
    model, inputs = routed("t5")
    program = export(model, inputs)
    names = set(captured_program(program, program.graph_module).parameters.values())
    assert "shared.weight" in names
    assert "encoder.embed_tokens.weight" not in names
