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
    settings = {"max_steps": 8, "per_device_train_batch_size": 2, "learning_rate": 1e-3, **options}
    arguments = tf.TrainingArguments(
        output_dir=str(directory), report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, **settings
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
