"""lte-compile evaluate: quality and measured density of a model, at the densities one asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table
from torch import nn

from lte_compile.calibration.density import place_thresholds
from lte_compile.checkpoints.loading import has_classifier, is_transformed
from lte_compile.cli.options import TaskOptions
from lte_compile.cli.output import Outcome
from lte_compile.cli.preparing import encode, find_model, find_task, load_for, pick_device
from lte_compile.config import Stage
from lte_compile.data.batches import Example
from lte_compile.data.tasks import LabelledTask, Task
from lte_compile.evaluation.quality import Evaluation
from lte_compile.evaluation.tasks import EncodedTask
from lte_compile.reports.table import percent, quality_text
from lte_compile.routing.router import routers, set_stage
from lte_compile.training.progress import TrainingProgress

# Validation batches that thresholds are placed on: 512 short texts, or 32,000 tokens of windows.
CALIBRATION_BATCHES = 16


@dataclass(frozen=True)
class Point:
    """One evaluation: in the dense stage, or in the hard stage at a threshold (`target` if one was asked for)."""

    stage: Stage
    target: float | None
    threshold: float | None
    evaluation: Evaluation


def evaluate_model(name: str, options: TaskOptions, densities: Sequence[float], device: str) -> Outcome:
    """All experts, then the saved thresholds, or instead of those each density.

    Raises:
        ValueError: bad input; densities for a model without routers.
    """
    for density in densities:
        if not 0.0 < density <= 1.0:
            raise ValueError(f"--density must lie in (0, 1]; got {density:g}")
    with TrainingProgress() as progress:
        path = find_model(name, progress)
        if densities and not is_transformed(path):
            raise ValueError(f"{name} has no routers, so its density is 1; train it first (lte-compile train)")
        task = find_task(options, path, progress)
        _check_head(path, task)
        with progress.working("loading"):
            model, tokenizer = load_for(task, path, options)
        model.to(pick_device(device))
        data = encode(task, tokenizer, options)
        test = data.test_examples()
        points = []
        for point in _points(model, data, test, densities):
            points.append(point)
            progress.say(_summary(data, point))
    return _outcome(name, data, len(test), points)


def _check_head(path: Path, task: Task) -> None:
    if isinstance(task, LabelledTask) and not has_classifier(path, task.labels):
        raise ValueError(
            f"{path} is no classifier of {task.name}'s labels ({', '.join(task.labels)}); "
            "lte-compile train makes one of it"
        )


def _points(
    model: nn.Module, data: EncodedTask, test: Sequence[Example], densities: Sequence[float]
) -> Iterator[Point]:
    if not any(routers(model)):
        yield Point(Stage.DENSE, None, None, data.evaluate(model, test))
        return
    saved = next(routers(model)).threshold
    set_stage(model, Stage.DENSE)
    yield Point(Stage.DENSE, None, None, data.evaluate(model, test))
    set_stage(model, Stage.HARD)
    if not densities:
        yield Point(Stage.HARD, None, saved, data.evaluate(model, test))
    for density in densities:
        threshold = place_threshold(model, data, density)
        yield Point(Stage.HARD, density, threshold, data.evaluate(model, test))


def place_threshold(model: nn.Module, data: EncodedTask, density: float) -> float:
    """Calibrate on validation batches so that the hard stage runs at about `density`; returns the threshold."""
    held_out = data.held_out(CALIBRATION_BATCHES, next(model.parameters()).device)
    return place_thresholds(model, held_out, density)


def _summary(data: EncodedTask, point: Point) -> str:
    quality = quality_text(data.metric, data.quality(point.evaluation))
    return f"{point.stage}, density {percent(point.evaluation.density)}: {data.metric} {quality}"


def _outcome(name: str, data: EncodedTask, examples: int, points: Sequence[Point]) -> Outcome:
    rows = [
        {
            "stage": point.stage.value,
            "target": point.target,
            "threshold": point.threshold,
            "quality": data.quality(point.evaluation),
            **asdict(point.evaluation),
        }
        for point in points
    ]
    document = {
        "model": name,
        "task": data.task.name,
        "kind": data.kind.value,
        "metric": data.metric.value,
        "test_examples": examples,
        "rows": rows,
    }
    title = f"{name} on {data.task.name}: {examples} test examples"
    table = Table("Stage", "Target", "Density", f"Test {data.metric}", "Loss", "Threshold", title=title)
    for point in points:
        table.add_row(*_cells(data, point))
    return Outcome(document, [table])


def _cells(data: EncodedTask, point: Point) -> tuple[str, ...]:
    evaluation = point.evaluation
    return (
        point.stage.value,
        "" if point.target is None else percent(point.target),
        percent(evaluation.density),
        quality_text(data.metric, data.quality(evaluation)),
        f"{evaluation.loss:.4f}",
        "" if point.threshold is None else f"{point.threshold:.3g}",
    )
