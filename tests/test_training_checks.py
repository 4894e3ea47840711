"""What a training refuses, and what is left of its checkpoints where a disk is full or settings have changed."""

from __future__ import annotations

import copy
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lte_compile.checkpoints.persistence import save_pretrained
from lte_compile.config import TransformConfig
from lte_compile.routing.router import routers
from lte_compile.training.checkpointing import latest_checkpoint
from lte_compile.training.config import TrainConfig
from lte_compile.training.loop import StepEvent, train
from lte_compile.transform import transform
from tests.planted import Planted, PlantedBatches, batches, example

CONFIG = TrainConfig(target_density=0.5, stage1_steps=4, stage2_steps=2, checkpoint_every=2)
HELD_OUT = batches(1, 1)


def _model() -> nn.Module:
    return transform(Planted(), TransformConfig(expert_size=8), example())


def _frozen() -> nn.Module:
    model = _model().requires_grad_(False)
    for router in routers(model):
        router.requires_grad_(True)
    return model


@pytest.mark.parametrize(
    ("stop", "changes", "reason"),
    [
        (3, {"stage1_steps": 1}, "is at step 2 of stage 1 in a run of stage 1 of 4 steps, stage 2 of 2 steps"),
        (3, {"stage1_steps": 0}, "give phases that are the same up to there"),
        (6, {"stage1_steps": 8}, "is at step 1 of stage 2"),
        (6, {"stage1_steps": 0}, "is at step 1 of stage 2"),
    ],
)
def test_phases_that_were_others_so_far_are_refused(
    stop: int, changes: dict[str, int], reason: str, tmp_path: Path
) -> None:
    class StoppedError(RuntimeError):
        pass

    def stopping(event: StepEvent) -> None:
        if event.step + (4 if event.phase == "stage 2" else 0) == stop:
            raise StoppedError

    config = replace(CONFIG, checkpoint_every=1 if stop > 4 else 2)
    with pytest.raises(StoppedError):
        train(_model(), PlantedBatches(0), config, held_out=HELD_OUT, directory=tmp_path, on_step=stopping)
    with pytest.raises(ValueError, match=reason):
        train(_model(), PlantedBatches(0), replace(config, **changes), held_out=HELD_OUT, directory=tmp_path)  # type: ignore[arg-type]
    events = train(_model(), PlantedBatches(0), replace(config, stage2_steps=5), held_out=HELD_OUT, directory=tmp_path)
    assert [event.phase for event in events] == ["stage 1"] * 4 + ["stage 2"] * 5


def test_a_checkpoint_of_other_shapes_changes_nothing(tmp_path: Path) -> None:
    train(_model(), PlantedBatches(0), CONFIG, held_out=HELD_OUT, directory=tmp_path)
    other = transform(Planted(), TransformConfig(expert_size=16), example())
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"is of another model: .* is \[4.*\] there and \[2.*\] here"):
        train(other, PlantedBatches(0), CONFIG, held_out=HELD_OUT, directory=tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_a_teacher_is_left_in_its_mode() -> None:
    teacher = Planted().train()
    train(_model(), PlantedBatches(0), replace(CONFIG, distillation=0.5), held_out=HELD_OUT, teacher=teacher)
    assert teacher.training


def test_a_single_held_out_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"held_out are several batches.*put it into a list"):
        train(_model(), PlantedBatches(0), CONFIG, held_out=HELD_OUT[0])  # type: ignore[arg-type]


def test_batches_without_labels_are_refused() -> None:
    class Unlabelled(PlantedBatches):
        def next_batch(self) -> dict[str, torch.Tensor]:
            return {name: value for name, value in super().next_batch().items() if name != "labels"}

    with pytest.raises(ValueError, match='returned no loss; give batches "labels"'):
        train(_model(), Unlabelled(0), CONFIG, held_out=HELD_OUT)


def test_routers_of_a_frozen_model_train_in_stage_1_alone() -> None:
    with pytest.raises(ValueError, match="nothing would train in stage 2: all weights but the routers' are frozen"):
        train(_frozen(), PlantedBatches(0), CONFIG, held_out=HELD_OUT)
    model = _frozen()
    before = copy.deepcopy(model.state_dict())
    train(model, PlantedBatches(0), replace(CONFIG, stage2_steps=0), held_out=HELD_OUT)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".router." in name}


def test_gradient_checkpointing_of_a_plain_module_is_refused() -> None:
    with pytest.raises(ValueError, match="gradient_checkpointing is for transformers models; Planted cannot"):
        train(_model(), PlantedBatches(0), replace(CONFIG, gradient_checkpointing=True), held_out=HELD_OUT)


def test_layer_distillation_needs_layers() -> None:
    config = replace(CONFIG, layer_distillation=0.5)
    with pytest.raises(ValueError, match=r"compares layers in an nn\.ModuleList; Planted has none"):
        train(_model(), PlantedBatches(0), config, held_out=HELD_OUT, teacher=Planted())


def test_choices_are_listed() -> None:
    with pytest.raises(ValueError, match="gates must be one of soft, straight_through; got 'hard'"):
        replace(CONFIG, gates="hard")  # type: ignore[arg-type]


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    train(_model(), PlantedBatches(0), CONFIG, held_out=HELD_OUT, directory=tmp_path)
    other = replace(CONFIG, target_density=0.25)
    with pytest.raises(ValueError, match=r"another run \(target_density was 0\.5, now 0\.25\); give another directory"):
        train(_model(), PlantedBatches(0), other, held_out=HELD_OUT, directory=tmp_path)
    longer = replace(CONFIG, stage2_steps=3, checkpoint_every=1)
    assert len(train(_model(), PlantedBatches(0), longer, held_out=HELD_OUT, directory=tmp_path)) == 7


@contextmanager
def _files_of_at_most(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    with _files_of_at_most(1000), pytest.raises(OSError, match=r"cannot write .*model\.safetensors"):
        train(_model(), PlantedBatches(0), CONFIG, held_out=HELD_OUT, directory=tmp_path)
    assert list(tmp_path.iterdir()) == []
    train(_model(), PlantedBatches(0), CONFIG, held_out=HELD_OUT, directory=tmp_path)
    kept, longer = latest_checkpoint(tmp_path), replace(CONFIG, stage2_steps=4)
    with _files_of_at_most(1000), pytest.raises(OSError, match="cannot write"):
        train(_model(), PlantedBatches(0), longer, held_out=HELD_OUT, directory=tmp_path)
    assert latest_checkpoint(tmp_path) == kept
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_leaves_no_half_model(tmp_path: Path) -> None:
    with _files_of_at_most(1000), pytest.raises(OSError, match="cannot save to"):
        save_pretrained(_model(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
