"""TrainConfig(compile=True): the same training, one compiled function for all layers, and a model left as it was."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from lte_compile.config import TransformConfig
from lte_compile.data.batches import Example, TextBatches
from lte_compile.routing.router import routers, set_stage
from lte_compile.running.tracing import trace_routers
from lte_compile.training import layer_compilation
from lte_compile.training.budgets import lower_logits
from lte_compile.training.config import TrainConfig
from lte_compile.training.layer_compilation import Accelerated, repeated_layers
from lte_compile.training.loop import StepEvent, train
from lte_compile.training.losses import LossWeights, MicroBatch, micro_batches, weighted_loss
from lte_compile.training.rows import Rows
from lte_compile.transform import transform
from tests import zoo
from tests.routed import routed

WEIGHTS = LossWeights(efficiency=0.7, separability=0.3, distillation=0.5)


@pytest.fixture(autouse=True)
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """Dynamo traces, and torch runs what it traced: what inductor would add is not this project's."""
    counted = CompileCounterWithBackend("eager")
    monkeypatch.setattr(layer_compilation, "BACKEND", counted)
    monkeypatch.setattr(layer_compilation, "DENSE_BACKEND", counted)
    yield counted
    torch._dynamo.reset()


def second_step(accelerated: Accelerated) -> AbstractContextManager[None]:
    """Of one shape: the first of a shape runs eagerly."""
    with accelerated.step("shape"):
        pass
    return accelerated.step("shape")


def _batch(model_inputs: dict[str, Any]) -> dict[str, Any]:
    """With labels of the kind that the family's head takes."""
    batch = dict(model_inputs)
    tokens: Tensor = batch.get("decoder_input_ids", batch["input_ids"])
    return batch | {"labels": tokens.masked_fill(tokens == 0, -100)}


def _gradients(
    model: nn.Module, teacher: nn.Module, part: MicroBatch, *, compiled: bool
) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    with second_step(Accelerated(model, teacher, enabled=compiled)):
        loss = weighted_loss(model, part, WEIGHTS, teacher)
        loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rule", ["soft", "straight_through", "threshold"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bart"])
def test_losses_and_gradients_are_those_of_eager_training(family: str, rule: str) -> None:
    model, inputs = routed(family, torch.float32)
    teacher = set_stage(copy.deepcopy(model), "dense")
    set_stage(model, "hard" if rule == "threshold" else "soft", selection=rule)
    [part] = micro_batches(_batch(inputs), 1)
    expected = _gradients(model, teacher, part, compiled=False)
    loss, gradients = _gradients(model, teacher, part, compiled=True)
    # The same float32 operations, but for the sums of the losses.
    assert loss == pytest.approx(expected[0], rel=1e-6)
    assert gradients.keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_rows_at_densities_of_their_own_are_compiled_once(counter: CompileCounterWithBackend) -> None:
    model, inputs = deep_llama()
    set_stage(model, "soft", selection="straight_through")
    rows, losses, pulls = len(inputs["input_ids"]), {}, {}
    for compiled in (False, True):
        accelerated = Accelerated(model, None, enabled=compiled)
        for step in range(3):
            at = Rows(
                shift_B=torch.linspace(-1.0, 1.0 + step, rows), share_BN=torch.eye(rows), weight_B=torch.ones(rows)
            )
            [part] = micro_batches(_batch(inputs), 1, rows=at)
            part = part.moved_to(model)
            assert part.rows is not None
            lower_logits(model, part.rows.shift_B)
            with second_step(accelerated):
                loss = weighted_loss(model, part, WEIGHTS, None)
            loss.backward()  # type: ignore[no-untyped-call]
            losses[compiled, step] = float(loss.detach())
            pulls[compiled, step] = part.rows.pulls()
    lower_logits(model, None)
    for step in range(3):
        assert losses[True, step] == pytest.approx(losses[False, step], rel=1e-6)
        torch.testing.assert_close(pulls[True, step], pulls[False, step], rtol=1e-4, atol=1e-7)  # float32 sums
    assert len({losses[False, step] for step in range(3)}) == 3
    assert counter.frame_count == 1


@pytest.mark.parametrize("stage", ["soft", "hard"])
def test_all_layers_share_what_the_first_one_compiled(stage: str, counter: CompileCounterWithBackend) -> None:
    """Although each has hooks, a router and calibrated scores of its own."""
    model, inputs = deep_llama()
    set_stage(model, stage)
    for number, router in enumerate(routers(model)):
        router.score_quantiles = tuple(0.1 * number + 0.01 * step for step in range(40))
    [part] = micro_batches(_batch(inputs), 1)
    accelerated = Accelerated(model, None, enabled=True)
    for _ in range(2):
        with second_step(accelerated):
            loss = weighted_loss(model, part, WEIGHTS, None)
        loss.backward()  # type: ignore[no-untyped-call]
    assert len(repeated_layers(model)) == 5
    assert counter.frame_count == 1


def test_the_next_training_of_such_a_model_compiles_nothing(counter: CompileCounterWithBackend) -> None:
    first, inputs = deep_llama()
    set_stage(first, "soft")
    second = copy.deepcopy(first)
    [part] = micro_batches(_batch(inputs), 1)
    with second_step(Accelerated(first, None, enabled=True)):
        weighted_loss(first, part, WEIGHTS, None)
    del first
    gc.collect()
    with second_step(Accelerated(second, None, enabled=True)):
        weighted_loss(second, part, WEIGHTS, None).backward()  # type: ignore[no-untyped-call]
    assert counter.frame_count == 1
    assert all(router.weight.grad is not None for router in routers(second))


def deep_llama() -> tuple[nn.Module, dict[str, Any]]:
    """Five routed layers; none of the batch is padding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 64}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=5, **shape))
    model.config.use_cache = False
    inputs = {"input_ids": torch.randint(64, (2, 8)), "attention_mask": torch.ones(2, 8, dtype=torch.int64)}
    return transform(model, TransformConfig(expert_size=8)), inputs


def test_the_model_is_left_as_it_was() -> None:
    model, inputs = deep_llama()
    names, hooks = list(model.state_dict()), _always_called(model)
    with second_step(Accelerated(model, None, enabled=True)):
        assert list(model.state_dict()) == names
        model(**inputs)
    assert not any("forward" in vars(module) for module in model.modules())
    assert _always_called(model) == hooks
    assert any(hooks)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(copied(**inputs).logits, model(**inputs).logits)


def _always_called(model: nn.Module) -> list[list[int]]:
    return [list(module._forward_hooks_always_called) for module in model.modules()]


def test_measurements_during_training_run_eagerly(counter: CompileCounterWithBackend) -> None:
    model, inputs = deep_llama()
    with second_step(Accelerated(model, None, enabled=True)), torch.no_grad(), trace_routers(model) as trace:
        model(**inputs)
    assert len(trace.sites) == 5
    assert counter.frame_count == 0


def test_late_shapes_are_not_compiled(counter: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch's last batch is smaller, and one step in a hundred is not worth half a minute."""
    monkeypatch.setattr(layer_compilation, "COMPILING_STEPS", 1)
    model, inputs = deep_llama()
    accelerated = Accelerated(model, None, enabled=True)
    with second_step(accelerated):
        model(**inputs)
    smaller = {name: value[:1] for name, value in inputs.items()}
    with second_step(accelerated):
        result = model(**smaller).logits
    assert counter.frame_count == 1
    torch.testing.assert_close(result, model(**smaller).logits)


def test_a_shape_that_comes_once_is_not_compiled(counter: CompileCounterWithBackend) -> None:
    """Two shapes would make Dynamo compile for any, and an epoch's last batch comes once among the first steps."""
    model, inputs = deep_llama()
    accelerated = Accelerated(model, None, enabled=True)
    smaller = {name: value[:1] for name, value in inputs.items()}
    counts = []
    for shape, batch in (("usual", inputs), ("smaller", smaller), ("usual", inputs)):
        with accelerated.step(shape):
            model(**batch)
        counts.append(counter.frame_count)
    assert counts == [0, 0, 1]


def test_batches_with_padding_run_eagerly(counter: CompileCounterWithBackend) -> None:
    model, inputs = routed("llama", torch.float32)
    assert not inputs["attention_mask"].all()
    batches = TextBatches([Example((3, 4, 5)), Example((6, 7))], batch_size=2, pad_token_id=0, seed=0, by_length=False)
    config = TrainConfig(target_density=0.4, stage1_steps=2, stage2_steps=0, fit_router=False, compile=True)
    train(model, batches, config, held_out=[inputs])
    assert counter.frame_count == 0


def test_a_model_without_repeated_layers_is_compiled_as_a_whole(counter: CompileCounterWithBackend) -> None:
    model, inputs = zoo.build("albert")
    assert repeated_layers(model) == (model,)
    with second_step(Accelerated(model, None, enabled=True)):
        compiled = model(**inputs).logits
    assert counter.frame_count >= 1
    torch.testing.assert_close(compiled, model(**inputs).logits)


def _windows() -> TextBatches:
    """Nine windows, four a batch: the third batch of an epoch is smaller."""
    generator = torch.Generator().manual_seed(0)
    examples = [Example(tuple(torch.randint(64, (8,), generator=generator).tolist())) for _ in range(9)]
    return TextBatches(examples, batch_size=4, pad_token_id=0, seed=0, by_length=False)


def _train(directory: Path | None = None, *, compile: bool, **more: Any) -> tuple[nn.Module, tuple[StepEvent, ...]]:
    model, inputs = deep_llama()
    teacher = set_stage(copy.deepcopy(model), "dense")
    config = TrainConfig(
        target_density=0.4, stage1_steps=6, stage2_steps=5, distillation=0.5, checkpoint_every=4, compile=compile
    )
    return model, train(model, _windows(), config, held_out=[inputs], teacher=teacher, directory=directory, **more)


def test_training_gives_the_same_model() -> None:
    (model, events), (expected, expected_events) = _train(compile=True), _train(compile=False)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-5)  # eleven steps of rounding
    assert [e.loss for e in events] == pytest.approx([e.loss for e in expected_events], rel=1e-5)
    assert [e.density for e in events] == pytest.approx([e.density for e in expected_events], nan_ok=True)


class KilledError(Exception):
    """Stands for whatever ends a process."""


def test_compiled_training_resumes_exactly(tmp_path: Path) -> None:
    def kill(event: StepEvent) -> None:
        if (event.phase, event.step) == ("stage 2", 3):
            raise KilledError

    uninterrupted, expected = _train(tmp_path / "a", compile=True)
    with pytest.raises(KilledError):
        _train(tmp_path / "b", compile=True, on_step=kill)
    resumed, events = _train(tmp_path / "b", compile=True)
    assert events == expected
    for name, value in uninterrupted.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
