"""lte-compile compare: LTE and its baselines on one task, several densities and seeds; goes on where it was stopped."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lte_compile.baselines import METHODS, Needs, Workbench
from lte_compile.baselines.claims import claim
from lte_compile.checkpoints.loading import is_transformed, load_tokenizer
from lte_compile.checkpoints.persistence import save_pretrained
from lte_compile.cli.evaluating import CALIBRATION_BATCHES
from lte_compile.cli.options import TaskOptions
from lte_compile.cli.output import Outcome, finite
from lte_compile.cli.preparing import (
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
from lte_compile.cli.training import finetune_steps_of, steering_batches
from lte_compile.comparison.plot import density_plot, tradeoff_plot
from lte_compile.comparison.run import Point, PointResult, points_of, read_points, run_points
from lte_compile.comparison.table import comparison_rows, markdown, render_comparison
from lte_compile.config import TransformConfig
from lte_compile.data.batches import Example, TextBatches
from lte_compile.data.tasks import Task
from lte_compile.evaluation.quality import Evaluation
from lte_compile.evaluation.tasks import EncodedTask
from lte_compile.reports.environment import describe_environment
from lte_compile.reports.results import write_atomically
from lte_compile.training.config import Phase, Teacher, TrainConfig
from lte_compile.training.loop import train
from lte_compile.training.progress import TrainingProgress

SETTINGS_FILE, POINTS, CHECKPOINTS, MODELS = "settings.json", "points", "checkpoints", "models"
# What comparisons did before there was a choice, and their settings do not say.
_SETTINGS_BEFORE = {"teacher": Teacher.START.value, "dense_distillation": 0.0, "dense_steps": None}


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """One comparison.

    Args:
        finetune_steps: None decides by whether the head is new.
        finetune_learning_rate: None is the dense model's.
        dense_learning_rate, dense_steps: None is everybody's.
        dense_distillation: of the dense model, from the fine-tuned one.
        teacher: whose outputs distillation has as targets.
        first_seed: the first of `seeds` that follow each other.
        keep_models: leave LTE's models in OUT/models.
        wait: for points that other processes are running.
    """

    model: str
    out: Path
    task: TaskOptions
    methods: Sequence[str]
    densities: Sequence[float]
    seeds: int
    transform: TransformConfig
    train: TrainConfig
    finetune_steps: int | None
    dense_learning_rate: float | None
    finetune_learning_rate: float | None = None
    dense_distillation: float = 0.0
    dense_steps: int | None = None
    teacher: Teacher = Teacher.DENSE
    first_seed: int = 0
    keep_models: bool
    device: str
    wait: bool = True

    def identity(self) -> dict[str, Any]:
        """What has to be the same for points to stand in one table."""
        task = {name: str(value) for name, value in vars(self.task).items()} | content_of(self.task)
        varying = ("checkpoint_every", "compile", "step_graphs", "target_density", "seed")
        config = {name: value for name, value in self.train.to_dict().items() if name not in varying}
        transform = {name: value for name, value in self.transform.to_dict().items() if name != "seed"}
        names = ("finetune_steps", "finetune_learning_rate", "dense_learning_rate", "dense_distillation", "dense_steps")
        dense = {name: getattr(self, name) for name in names}
        return {"model": self.model, **task, **transform, **config, **dense, "teacher": self.teacher.value}


@dataclass(frozen=True)
class Opened:
    """What all seeds share."""

    settings: CompareSettings
    path: Path
    task: Task
    data: EncodedTask
    device: torch.device
    progress: TrainingProgress


def compare_methods(settings: CompareSettings) -> Outcome:
    """Run every point that has no result yet, then draw and write what all of OUT's say.

    Processes started with the same OUT share the points; each ends when all are there.

    Raises:
        ValueError: bad input; an OUT that holds a comparison with other settings.
        FloatingPointError: methods whose loss was not finite, after the others have run.
    """
    points, device = _points(settings), pick_device(settings.device)
    with TrainingProgress() as progress:
        opened = prepare(settings, device, progress)
        data, test = opened.data, opened.data.test_examples()

        def judge_on(examples: Sequence[Example]) -> Callable[[nn.Module], tuple[float, Evaluation]]:
            def judge(model: nn.Module) -> tuple[float, Evaluation]:
                measured = data.evaluate(model, examples)
                return data.quality(measured), measured

            return judge

        failure: FloatingPointError | None = None
        try:
            run_points(
                points,
                settings.out / POINTS,
                lambda seed: open_workbench(opened, seed),
                judge_on(test),
                progress.say,
                validate=judge_on(data.valid_examples()),
                wait=settings.wait,
            )
        except FloatingPointError as error:
            failure = error
    results = read_points(settings.out / POINTS)
    if failure and not results:
        raise failure
    outcome = _report(settings, data, len(test), results)
    if failure:
        raise FloatingPointError(f"{failure}; what the others gave is in {settings.out / 'comparison.md'}") from failure
    return outcome


def _points(settings: CompareSettings) -> tuple[Point, ...]:
    if settings.seeds < 1:
        raise ValueError(f"--seeds must be at least 1; got {settings.seeds}")
    if settings.dense_steps is not None and settings.dense_steps < 1:
        raise ValueError(f"--dense-steps must be at least 1; got {settings.dense_steps}")
    if settings.train.checkpoint_every < 1:
        raise ValueError("--checkpoint-every must be at least 1: methods find the models they share as checkpoints")
    if settings.first_seed < 0:
        raise ValueError(f"--first-seed must be 0 or more; got {settings.first_seed}")
    all_names = ("lte", *sorted(METHODS, key=lambda name: METHODS[name].needs is not Needs.TRAINING))
    names = all_names if tuple(settings.methods) == ("all",) else settings.methods
    seeds = range(settings.first_seed, settings.first_seed + settings.seeds)
    return points_of(names, settings.densities, seeds)


def prepare(settings: CompareSettings, device: torch.device, progress: TrainingProgress) -> Opened:
    """Find model and task, and refuse what cannot work before any work."""
    path = find_model(settings.model, progress)
    if is_transformed(path):
        raise ValueError(f"{settings.model} has routers; methods are compared from a dense model")
    check_output(settings.out, path, overwrite=True)
    _check_settings(settings)
    task = find_task(settings.task, path, progress)
    return Opened(settings, path, task, encode(task, load_tokenizer(path), settings.task), device, progress)


def open_workbench(opened: Opened, seed: int) -> Workbench:
    """Load the model, fine-tune it if need be, and lay out the data, all by this seed."""
    settings, data, device, progress = opened.settings, opened.data, opened.device, opened.progress
    config = replace(settings.train, seed=seed)
    rate = settings.finetune_learning_rate or settings.dense_learning_rate or config.learning_rate
    directory = settings.out / CHECKPOINTS / f"seed{seed}"
    torch.manual_seed(seed)  # of a new head
    with progress.working("loading"):
        model, _ = load_for(opened.task, opened.path, settings.task)
    model.to(device)
    encoded = data.training_batches(seed, few_lengths=config.records_steps)  # tokenized once; copies are handed out

    def new_batches() -> TextBatches:
        return copy.copy(encoded)

    phase = Phase(name="fine-tune", steps=finetune_steps_of(settings.finetune_steps, opened.path, opened.task))
    with claim(directory / "finetune.lock"):  # one process trains, others find its checkpoint
        if phase.steps:
            rated = replace(config, learning_rate=rate, dropout=None)
            train(model, new_batches(), rated, phases=[phase], directory=directory / "finetune", on_step=progress)
    return Workbench(
        start=model.eval(),
        new_batches=new_batches,
        steering=steering_batches(data, device),
        calibration=data.held_out(CALIBRATION_BATCHES, device),
        config=config,
        transform=replace(settings.transform, seed=seed),
        directory=directory,
        on_step=progress,
        dense_learning_rate=settings.dense_learning_rate,
        dense_distillation=settings.dense_distillation,
        dense_steps=settings.dense_steps,
        teacher=settings.teacher,
        keep=_keeper(opened, seed),
    )


def _keeper(opened: Opened, seed: int) -> Callable[[nn.Module, str], None]:
    def keep(model: nn.Module, name: str) -> None:
        if opened.settings.keep_models:
            save_pretrained(model, opened.settings.out / MODELS / f"{name}-seed{seed}", opened.data.tokenizer)

    return keep


def _check_settings(settings: CompareSettings) -> None:
    """Refuse points of another comparison; leave beside new ones what they were made with."""
    path = settings.out / SETTINGS_FILE
    asked = json.loads(json.dumps(settings.identity()))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asked, indent=1).encode())
        return
    recorded = read_settings(path)
    if was := changed_settings(_SETTINGS_BEFORE | recorded, asked):
        raise ValueError(f"{settings.out} holds another comparison ({was}); choose another --out")


def _report(settings: CompareSettings, data: EncodedTask, examples: int, results: Sequence[PointResult]) -> Outcome:
    rows = comparison_rows(results, data.metric)
    title = f"{settings.model} on {data.task.name}"
    document = {
        "model": settings.model,
        "task": data.task.name,
        "kind": data.kind.value,
        "metric": data.metric.value,
        "test_examples": examples,
        "settings": settings.identity(),
        "environment": asdict(describe_environment()),
        "rows": [row.to_dict() for row in rows],
        "points": [{k: v for k, v in asdict(result).items() if k != "selection"} for result in results],
    }
    files = {
        "comparison.json": json.dumps(finite(document), indent=1).encode(),
        "comparison.md": markdown(rows, data.metric, title).encode(),
        "weight_share.png": tradeoff_plot(rows, data.metric),
        "density.png": density_plot(rows, data.metric),
    }
    for name, content in files.items():
        write_atomically(settings.out / name, content)
    written = f"written to {settings.out}: {', '.join(files)}"
    return Outcome(document, [render_comparison(rows, data.metric, title), written])
