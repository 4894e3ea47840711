"""lte-compile train: fine-tune, transform, train through LTE's two stages, measure, save; resumes when killed.

In several processes all run all of it; the first one shows progress and writes.
"""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import typer
from rich.console import Console
from torch import nn

from lte_compile.calibration.density import calibrate
from lte_compile.calibration.effects import fit_to
from lte_compile.checkpoints.loading import has_classifier
from lte_compile.checkpoints.persistence import save_pretrained
from lte_compile.cli.converting import ACTIVATION_BATCHES, activations_for
from lte_compile.cli.evaluating import place_threshold
from lte_compile.cli.options import TaskOptions
from lte_compile.cli.output import Outcome
from lte_compile.cli.preparing import (
    alone_in,
    changed_settings,
    check_output,
    content_of,
    encode,
    find_model,
    find_task,
    load_for,
    pick_device,
    read_settings,
)
from lte_compile.cli.training_outcome import Trained, training_outcome
from lte_compile.config import Stage, TransformConfig
from lte_compile.data.tasks import LabelledTask, Task
from lte_compile.evaluation.tasks import EncodedTask, TaskKind
from lte_compile.reports.results import write_atomically
from lte_compile.routing.router import routers, set_stage
from lte_compile.training.budgets import budgets_of
from lte_compile.training.checkpointing import latest_checkpoint
from lte_compile.training.config import Phase, TrainConfig
from lte_compile.training.distributed import Processes, device_of_process, join
from lte_compile.training.launch import ReportedOnce
from lte_compile.training.loop import FIT_BATCHES, peek_batches, train
from lte_compile.training.losses import Batch
from lte_compile.training.progress import TrainingProgress
from lte_compile.transform import transform

# Two epochs of 4,300 questions in batches of 32: a new classification head is as good after them as after three.
FINETUNE_STEPS_OF_A_NEW_HEAD = 270
# Held-out data that steers the density: up to four batches, about 2,000 short tokens, or 8,000 of windows. More only
# costs time; a batch too many every ten steps is a step in ten lost.
HELD_OUT_BATCHES = 4
HELD_OUT_TOKENS = 8_192
SETTINGS_FILE = "settings.json"


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """One run; `finetune_steps` None decides by whether the head is new, `finetune_learning_rate` None is that of all
    training, `shard` None goes by what the launcher was told."""

    model: str
    out: Path
    task: TaskOptions
    transform: TransformConfig
    train: TrainConfig
    finetune_steps: int | None
    finetune_learning_rate: float | None = None
    device: str
    shard: bool | None
    resume: bool
    overwrite: bool

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"

    def identity(self) -> dict[str, Any]:
        """What has to be the same for a run to go on from another's checkpoints."""
        task = {name: str(value) for name, value in vars(self.task).items() if name != "test_examples"}
        free = ("checkpoint_every", "compile", "step_graphs")
        config = {name: value for name, value in self.train.to_dict().items() if name not in free}
        start = {"finetune_steps": self.finetune_steps, "finetune_learning_rate": self.finetune_learning_rate}
        return {"model": self.model, **task, **content_of(self.task), **self.transform.to_dict(), **config, **start}


def train_model(settings: TrainSettings) -> Outcome:
    """The whole run.

    Raises:
        ValueError: bad input of any kind, found before training where it can be.
        FloatingPointError: the loss is not finite any more.
        typer.Exit: this is not the first of several processes, so it has nothing to show.
    """
    with ReportedOnce():
        device = device_of_process(settings.device, pick_device)
        processes = join(device, shard=settings.shard)
        if processes.is_first:
            return _train_model(settings, device, processes, TrainingProgress())
        warnings.simplefilter("ignore")
        _train_model(settings, device, processes, TrainingProgress(Console(quiet=True)))
    raise typer.Exit


def _train_model(
    settings: TrainSettings, device: torch.device, processes: Processes, progress: TrainingProgress
) -> Outcome:
    start = perf_counter()
    with progress:
        with processes.first_before_others():
            path = find_model(settings.model, progress)
            task = find_task(settings.task, path, progress)
        _check_output(settings, path)
        torch.manual_seed(settings.train.seed)  # of a new head
        with progress.working("loading"):
            model, tokenizer = load_for(task, path, settings.task)
        model.to(device)
        finetune_steps = finetune_steps_of(settings.finetune_steps, path, task)
        data = encode(task, tokenizer, settings.task)
        _check_batch_size(data, processes)
        processes.wait()  # until all have looked at OUT
        with alone_in(settings.out) if processes.is_first else nullcontext():
            if processes.is_first:
                _note_settings(settings)
            processes.wait()
            trained = _run(model, data, settings, finetune_steps, progress, start)
            if processes.is_first:
                with progress.working("saving"):
                    save_pretrained(model.cpu(), settings.out, tokenizer)
    return training_outcome(trained, settings.model, settings.out, settings.train)


def _check_batch_size(data: EncodedTask, processes: Processes) -> None:
    if data.size.batch_size < processes.size:
        raise ValueError(
            f"batches of {data.size.batch_size} cannot be shared by {processes.size} processes; "
            "give a larger --batch-size, or start fewer"
        )


def _run(
    model: nn.Module,
    data: EncodedTask,
    settings: TrainSettings,
    finetune_steps: int,
    progress: TrainingProgress,
    start: float,
) -> Trained:
    device = next(model.parameters()).device
    held_out = steering_batches(data, device)
    test = data.test_examples()
    _finetune(model, data, settings, finetune_steps, progress)
    with progress.working("evaluating the dense model"):
        dense = data.evaluate(model, test)
    teacher = copy.deepcopy(model) if settings.train.needs_teacher else None
    are_trained = any(router.score_quantiles for router in routers(model))
    if not any(routers(model)):
        with progress.working("transforming"):
            activations = activations_for(model, settings.transform, data.held_out(ACTIVATION_BATCHES, device))
            transform(model, settings.transform, activations=activations)
    elif kept := kept_options(model, settings.transform):
        progress.say(f"{settings.model} has routers already, which stay as they are: {kept}")
    # Trained routers are where training goes on from; fitting would throw away what they learned.
    config = replace(settings.train, fit_router=settings.train.fit_router and not are_trained)
    batches = data.training_batches(config.seed, few_lengths=config.records_steps)
    if config.fit_router and not config.stage1_steps:  # else stage 1 does it
        fit_to(config.fit_target, model, peek_batches(model, batches, FIT_BATCHES), config.target_density)
    train(
        model,
        batches,
        config,
        held_out=held_out,
        teacher=teacher,
        directory=settings.checkpoints / "lte",
        on_step=progress,
        shard=settings.shard,
    )
    set_stage(model, Stage.HARD)
    if config.is_steered:  # stage 2 moves what the frozen routers see, and with it the density
        place_threshold(model, data, config.target_density)
    if (budgets := budgets_of(config)) is not None:
        calibrate(model, held_out, densities=budgets.nodes)
    with progress.working("evaluating the sparse model"):
        sparse = data.evaluate(model, test)
    return Trained(
        model=model,
        task=data,
        test_examples=len(test),
        dense=dense,
        sparse=sparse,
        finetune_steps=finetune_steps,
        seconds=perf_counter() - start,
    )


def kept_options(model: nn.Module, asked: TransformConfig) -> str:
    """How a transformed model's routers differ from those that were asked for, in words."""
    own, now = next(routers(model)).config.to_dict(), asked.to_dict()
    names = ("expert_size", "router", "grouping")
    return ", ".join(f"{name} {own[name]}, not {now[name]}" for name in names if own[name] != now[name])


def _finetune(
    model: nn.Module, data: EncodedTask, settings: TrainSettings, steps: int, progress: TrainingProgress
) -> None:
    """Ordinary training of the dense function. A model that has routers already is put into the dense stage."""
    if any(routers(model)):
        set_stage(model, Stage.DENSE)
    if not steps:
        return
    asked = settings.finetune_learning_rate
    rate = settings.train.learning_rate if asked is None else asked
    config = replace(settings.train, learning_rate=rate, dropout=None)
    batches = data.training_batches(config.seed, few_lengths=config.records_steps)
    phases = [Phase(name="fine-tune", steps=steps)]
    directory = settings.checkpoints / "finetune"
    train(model, batches, config, phases=phases, directory=directory, on_step=progress, shard=settings.shard)


def steering_batches(data: EncodedTask, device: torch.device) -> list[Batch]:
    """The validation batches that a training measures densities on."""
    size = data.size
    enough = HELD_OUT_BATCHES
    if data.kind is not TaskKind.CLASSIFICATION:
        enough = min(max(HELD_OUT_TOKENS // (size.batch_size * size.window), 1), HELD_OUT_BATCHES)
    return data.held_out(enough, device)


def finetune_steps_of(asked: int | None, path: Path, task: Task) -> int:
    """As asked; by default as many as a new head needs, and none for a model that has one."""
    if asked is not None:
        if asked < 0:
            raise ValueError(f"--finetune-steps must not be negative; got {asked}")
        return asked
    is_new = isinstance(task, LabelledTask) and not has_classifier(path, task.labels)
    return FINETUNE_STEPS_OF_A_NEW_HEAD if is_new else 0


def _check_output(settings: TrainSettings, source: Path) -> None:
    """Refuse an OUT that cannot be written, holds another model, or checkpoints of another run."""
    has_checkpoints = any(latest_checkpoint(settings.checkpoints / part) for part in ("finetune", "lte"))
    resumes = settings.resume and has_checkpoints
    check_output(settings.out, source, overwrite=settings.overwrite or resumes)
    if not resumes:
        return
    recorded = read_settings(settings.checkpoints / SETTINGS_FILE)
    asked = json.loads(json.dumps(settings.identity()))
    if was := changed_settings(recorded, asked):
        raise ValueError(f"{settings.checkpoints} is of another run ({was}); give --no-resume to start over")


def _note_settings(settings: TrainSettings) -> None:
    """Leave beside the checkpoints what they were made with; without --resume, start with none."""
    if not settings.resume:
        shutil.rmtree(settings.checkpoints, ignore_errors=True)
    settings.checkpoints.mkdir(parents=True, exist_ok=True)
    record = json.dumps(settings.identity(), indent=1)
    write_atomically(settings.checkpoints / SETTINGS_FILE, record.encode())
