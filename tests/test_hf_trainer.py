"""LTE inside transformers' Trainer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from lte_compile.config import Stage
from lte_compile.huggingface.trainer import LteTrainer
from lte_compile.routing.router import routers
from lte_compile.running.tracing import trace_routers
from lte_compile.training.config import Gates, TrainConfig
from tests import zoo
from tests.routed import routed


def _batch() -> dict[str, Tensor]:
    _, inputs = zoo.build("bert")
    return {**inputs, "labels": torch.tensor([0, 2])}


def _examples() -> list[dict[str, Any]]:
    batch = _batch()
    return [{name: value[row] for name, value in batch.items()} for row in (0, 1)] * 4


def _trainer(directory: Path, lte: TrainConfig, **options: Any) -> LteTrainer:
    model, _ = routed("bert", torch.float32)
    settings = {
        "save_strategy": "no",
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        **options,
    }
    arguments = tf.TrainingArguments(
        output_dir=str(directory), report_to=[], use_cpu=True, disable_tqdm=True, **settings
    )
    return LteTrainer(model=model, args=arguments, train_dataset=_examples(), lte=lte, held_out=[_batch()])


@pytest.mark.parametrize("gates", list(Gates))
def test_it_goes_through_both_stages_and_trains_routers_in_the_first(tmp_path: Path, gates: Gates) -> None:
    lte = TrainConfig(
        target_density=0.5, stage1_steps=3, stage2_steps=1, gates=gates, separability=0.5, measure_every=2
    )
    trainer = _trainer(tmp_path, lte)
    seen: list[Stage] = []
    original = trainer.compute_loss

    def watch(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(next(routers(model)).stage)
        return original(model, inputs, *args, **kwargs)

    trainer.compute_loss = watch  # type: ignore[method-assign]
    trainer.train()
    assert seen == [Stage.SOFT] * 6 + [Stage.HARD] * 2  # three quarters of eight steps
    assert trainer.controller.latest is not None
    assert all(router.score_quantiles for router in routers(trainer.model))


def test_routers_have_their_own_group(tmp_path: Path) -> None:
    lte = TrainConfig(target_density=0.5, stage1_steps=1, stage2_steps=1, router_learning_rate=0.007)
    trainer = _trainer(tmp_path, lte)
    groups = trainer.create_optimizer().param_groups
    router_ids = {id(p) for router in routers(trainer.model) for p in router.parameters()}
    assert {id(p) for p in groups[-1]["params"]} == router_ids
    assert groups[-1]["lr"] == 0.007
    assert not router_ids & {id(p) for group in groups[:-1] for p in group["params"]}


def test_the_loss_holds_the_auxiliary_losses_of_the_first_stage_only(tmp_path: Path) -> None:
    lte = TrainConfig(target_density=0.5, stage1_steps=1, stage2_steps=1)
    trainer = _trainer(tmp_path, lte)
    trainer.controller.eta = 0.7
    batch, model = _batch(), trainer.model
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    for router in routers(model):
        router.stage, router.rule = Stage.SOFT, "soft"
    with trace_routers(model) as trace:
        task = model(**batch).loss
    expected = task + 0.7 * trace.efficiency_loss()
    # float32, the same operations in the same order
    torch.testing.assert_close(trainer.compute_loss(model, batch), expected, rtol=1e-6, atol=0)
    for router in routers(model):
        router.stage, router.rule = Stage.HARD, "threshold"
    torch.testing.assert_close(trainer.compute_loss(model, batch), model(**batch).loss, rtol=1e-6, atol=0)


def test_held_out_data_is_needed(tmp_path: Path) -> None:
    model, _ = routed("bert", torch.float32)
    arguments = tf.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    lte = TrainConfig(target_density=0.5, stage1_steps=1, stage2_steps=1)
    with pytest.raises(ValueError, match="held_out is empty"):
        LteTrainer(model=model, args=arguments, train_dataset=_examples(), lte=lte, held_out=[])
    ranged = replace(lte, budget_range=(0.2, 0.6))
    with pytest.raises(ValueError, match="LteTrainer trains for one budget"):
        LteTrainer(model=model, args=arguments, train_dataset=_examples(), lte=ranged, held_out=[{}])


def test_a_resumed_run_ends_as_one_without_an_interruption(tmp_path: Path) -> None:
    lte = TrainConfig(target_density=0.4, stage1_steps=5, stage2_steps=3, measure_every=2)
    options = {"save_strategy": "steps", "save_steps": 2}
    whole = _trainer(tmp_path / "whole", lte, **options)
    whole.train()
    expected = whole.model.state_dict()
    for step in (2, 6):  # in stage 1, and in stage 2
        resumed = _trainer(tmp_path / f"from-{step}", lte, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())
        assert resumed.controller.state_dict() == whole.controller.state_dict()
        for after, before in zip(routers(resumed.model), routers(whole.model), strict=True):
            assert after.threshold == before.threshold != 0.5
            assert after.score_quantiles == before.score_quantiles


def test_lambda_is_reached_at_the_end_of_stage_1(tmp_path: Path) -> None:
    lte = TrainConfig(target_density=0.5, stage1_steps=3, stage2_steps=1, gates=Gates.SOFT, separability=0.5)
    trainer, batch = _trainer(tmp_path, lte), _batch()
    trainer.state.max_steps, trainer.state.global_step = 8, 5  # the last step of six
    model = trainer.model.eval()
    for router in routers(model):
        router.stage, router.rule = Stage.SOFT, "soft"
    with trace_routers(model) as trace:
        expected = model(**batch).loss + 0.5 * trace.separability_loss()
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.testing.assert_close(trainer.compute_loss(model, batch), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distillation": 0.5, "hold_density": True}, "does not do hold_density, distillation; leave it out"),
        ({"stage1_steps": 0, "stage2_steps": 0}, "both are 0"),
    ],
)
def test_what_would_have_no_effect_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    lte = replace(TrainConfig(target_density=0.5, stage1_steps=1, stage2_steps=1), **change)
    with pytest.raises(ValueError, match=message):
        _trainer(tmp_path, lte)
