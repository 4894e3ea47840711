"""What changes how a training runs but not its loop: a falling density, a price, dropout, a temperature, a teacher."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from lte_compile.baselines import find_method
from lte_compile.baselines.traces import joined
from lte_compile.data.batches import Example, TextBatches
from lte_compile.routing.router import set_stage
from lte_compile.running.modes import dropout_of
from lte_compile.running.tracing import trace_routers
from lte_compile.training.config import Teacher, TrainConfig
from lte_compile.training.loop import StepEvent, train
from lte_compile.training.losses import LossWeights, micro_batches, weighted_loss
from tests.planted import workbench
from tests.routed import routed


def _config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"target_density": 0.1, "stage1_steps": 8, "stage2_steps": 0, **changes})


def test_the_density_falls_by_equal_factors() -> None:
    config = _config(start_density=0.4, anneal=0.5)
    wanted = [config.density_after(share) for share in (0.0, 0.125, 0.25, 0.5, 1.0)]
    assert wanted == pytest.approx([0.4, 0.4 / 2**0.5, 0.2, 0.1, 0.1])
    assert _config().density_after(0.0) == 0.1
    assert _config(start_density=0.05).density_after(0.0) == 0.1  # there is nothing to fall from
    assert _config(start_density=0.4, anneal=0.0).density_after(0.0) == 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_density": 1.5}, "start_density must lie between"),
        ({"anneal": 2.0}, "anneal must lie in"),
        ({"dropout": 1.0}, "dropout must lie in"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _config(**changes)


def _densities(**changes: Any) -> list[float]:
    """Held-out densities before each of four shifts, at every second step."""
    model, inputs = routed("bert", torch.float32)
    rows = [Example((3, 4, 5, 6), 0), Example((6, 7, 8), 1)]
    batches = TextBatches(rows, batch_size=2, pad_token_id=0, seed=0, by_length=False)
    config = _config(hold_density=True, measure_every=2, learning_rate=1e-6, router_learning_rate=1e-6, **changes)
    held_out = [{name: value for name, value in inputs.items() if name != "labels"}]
    events = train(model, batches, config, held_out=held_out)
    return [event.density for event in events[1::2] if event.density is not None]


def test_training_follows_the_falling_density() -> None:
    """Hardly moving weights: what is measured is where the shift before has put it."""
    falling = _densities(target_density=0.2, start_density=0.8, anneal=1.0)
    # .8 / 4^(1/4), .8 / 4^(2/4), .8 / 4^(3/4); scores of few tokens are coarse
    assert falling[1:] == pytest.approx([0.566, 0.4, 0.283], abs=0.06)


def test_a_price_goes_with_a_held_density() -> None:
    config = _config(eta=0.5, hold_density=True)
    assert config.is_steered
    assert not _config(eta=0.5).is_steered
    held = _densities(target_density=0.3, eta=0.5)
    assert held[1:] == pytest.approx([0.3] * 3, abs=0.06)


def test_dropout_is_changed_while_a_model_trains() -> None:
    model = nn.Sequential(nn.Dropout(0.1), nn.Linear(2, 2), nn.Dropout(0.3))
    with dropout_of(model, 0.0):
        assert [layer.p for layer in model if isinstance(layer, nn.Dropout)] == [0.0, 0.0]
    assert [layer.p for layer in model if isinstance(layer, nn.Dropout)] == [0.1, 0.3]
    with dropout_of(model, None):
        assert [layer.p for layer in model if isinstance(layer, nn.Dropout)] == [0.1, 0.3]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_distillation_compares_softened_outputs(family: str, temperature: float) -> None:
    model, batch = _labelled(family)
    teacher = set_stage(copy.deepcopy(model), "dense")
    set_stage(model, "hard")
    [part] = micro_batches(batch, 1)
    weights = LossWeights(distillation=1.0, temperature=temperature)
    given = {name: value for name, value in part.inputs.items() if name != "labels"}
    learned, taught = ((m(**given).logits / temperature).log_softmax(-1) for m in (model, teacher))
    per_position = (taught.exp() * (taught - learned)).sum(-1)
    mask = given["attention_mask"]
    expected = per_position[mask.bool()].mean() if per_position.shape == mask.shape else per_position.mean()
    found = weighted_loss(model, part, weights, teacher)
    torch.testing.assert_close(found, expected * temperature**2, rtol=1e-4, atol=1e-6)  # float32 in another order


def _labelled(family: str) -> tuple[nn.Module, dict[str, Any]]:
    """bert has a head of classes, llama one of tokens."""
    model, inputs = routed(family, torch.float32)
    rows, tokens = len(inputs["input_ids"]), inputs["input_ids"]
    labels = torch.arange(rows) % 2 if family == "bert" else tokens.masked_fill(inputs["attention_mask"] == 0, -100)
    return model.eval(), inputs | {"labels": labels}


def test_the_efficiency_loss_leaves_padding_out() -> None:
    """It multiplies padding away: the mean over the scores of all other tokens."""
    model, inputs = routed("llama", torch.float32)
    set_stage(model, "soft")
    assert not inputs["attention_mask"].all()
    with trace_routers(model) as trace:
        model(**inputs)
    kept = torch.cat([trace.scores(site).flatten() for site in trace.sites])
    torch.testing.assert_close(trace.efficiency_loss(), kept.square().mean())


def test_joined_batches_hold_the_same_texts_in_the_same_order() -> None:
    texts = [torch.arange(1, n + 1).repeat(2, 1) for n in (3, 5, 2, 9, 4)]
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in texts]
    found = list(joined(batches, tokens=30))
    assert [batch["input_ids"].shape for batch in found] == [(6, 5), (2, 9), (2, 4)]
    rows = [
        row[mask.bool()].tolist() for b in found for row, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
    ]
    assert rows == [row.tolist() for ids in texts for row in ids]


def test_batches_that_are_no_texts_are_left_alone() -> None:
    batches = [{"x": torch.zeros(2, 3)}, {"x": torch.zeros(2, 3), "attention_mask": torch.ones(2, 4)}]
    assert list(joined(batches, tokens=1000)) == batches


@pytest.mark.parametrize("teacher", list(Teacher))
def test_the_teacher_is_the_start_or_the_dense_model(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    from lte_compile.baselines import workbench as module

    seen: list[nn.Module | None] = []

    def record(model: nn.Module, *args: Any, teacher: nn.Module | None, **more: Any) -> tuple[StepEvent, ...]:
        seen.append(teacher)
        return train(model, *args, teacher=teacher, **more)

    monkeypatch.setattr(module, "train", record)
    bench = workbench(stage1=2, stage2=0)
    bench = replace(bench, teacher=teacher, config=replace(bench.config, distillation=0.5))
    with find_method("lte").fit(bench)(0.25):
        pass
    assert seen[-1] is (bench.dense if teacher is Teacher.DENSE else bench.start)
    assert all(other is None for other in seen[:-1])  # the dense model has none
