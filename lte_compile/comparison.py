"""Running methods over densities and seeds: one JSON file per point, written when done, skipped when there.

All of one seed start from the same fine-tuned model and see the same batches (lte_compile.baselines.workbench).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias

from torch import nn

from lte_compile.baselines import AtDensity, Method, Workbench, find_method
from lte_compile.evaluation import Evaluation
from lte_compile.results import write_atomically

Judge: TypeAlias = Callable[[nn.Module], tuple[float, Evaluation]]  # quality on the test split, and all it rests on


@dataclass(frozen=True, order=True)
class Point:
    """One run: a method at a density, `target`, with a seed."""

    seed: int
    method: str
    target: float

    @property
    def file_name(self) -> str:
        return f"{self.method}-{self.target:g}-seed{self.seed}.json"


@dataclass(frozen=True, kw_only=True)
class PointResult:
    """What one run measured on the test split.

    Args:
        target: the density asked for; `density` is what was measured, as in `Evaluation`.
        weight_share, weight_bytes_per_token, flops_per_token: see lte_compile.meter.SelectionReport.
        training_tokens: that the model was trained on after the common start.
        selection: the whole SelectionReport; None for a model without FFNs.
    """

    method: str
    target: float
    seed: int
    quality: float
    loss: float
    density: float
    weight_share: float
    weight_bytes_per_token: float
    flops_per_token: float
    training_tokens: int
    seconds: float
    selection: Mapping[str, Any] | None


def points_of(methods: Sequence[str], densities: Sequence[float], seeds: Sequence[int]) -> tuple[Point, ...]:
    """The grid, seed by seed and method by method. A method of one density has one point.

    Raises:
        ValueError: an unknown method, a density out of range, or nothing to run.
    """
    for density in densities:
        if not 0.0 < density < 1.0:
            raise ValueError(f"densities must lie between 0 and 1 (dense is 1, ffn-free 0); got {density:g}")
    found = [find_method(name) for name in dict.fromkeys(methods)]
    points = [Point(seed, m.name, target) for seed in seeds for m in found for target in _targets(m, densities)]
    if not points:
        raise ValueError("nothing to compare: give at least one method, density and seed")
    return tuple(points)


def _targets(method: Method, densities: Sequence[float]) -> Sequence[float]:
    if method.only_density is not None:
        return (method.only_density,)
    return sorted(set(densities), reverse=True)


def run_points(
    points: Sequence[Point],
    directory: Path,
    open_bench: Callable[[int], Workbench],
    judge: Judge,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[PointResult, ...]:
    """Run what has no file in `directory` yet; returns the results of all points.

    Args:
        open_bench: makes a seed's workbench; called for seeds with something to do.
        say: takes a line about each point.

    Raises:
        FloatingPointError: points whose training gave no finite loss; every other point was run before.
    """
    directory.mkdir(parents=True, exist_ok=True)
    missing = [point for point in points if not (directory / point.file_name).exists()]
    if done := len(points) - len(missing):
        say(f"{done} of {len(points)} points are there already")
    failures: list[str] = []
    for seed, of_seed in groupby(missing, key=lambda point: point.seed):
        bench = open_bench(seed)
        for name, of_method in groupby(of_seed, key=lambda point: point.method):
            failures += _run_method(find_method(name), list(of_method), directory, bench, judge, say)
    if failures:
        raise FloatingPointError("; ".join(failures))
    return tuple(read_point(directory / point.file_name) for point in points)


def _run_method(
    method: Method, points: Sequence[Point], directory: Path, bench: Workbench, judge: Judge, say: Callable[[str], None]
) -> Iterator[str]:
    """Yields what went wrong: one method's divergence must not cost the others their runs."""
    start = perf_counter()
    try:
        at = method.fit(bench)
        for point in points:
            result = _run_point(point, at, bench, judge, start)
            write_atomically(directory / point.file_name, json.dumps(asdict(result), indent=1).encode())
            say(f"{method.title} at {point.target:g}, seed {point.seed}: {result.quality:.4g} at {result.density:.3f}")
            start = perf_counter()
    except FloatingPointError as error:
        say(f"{method.title}, seed {points[0].seed}: {error}")
        yield f"{method.name}, seed {points[0].seed}: {error}"


def _run_point(point: Point, at: AtDensity, bench: Workbench, judge: Judge, start: float) -> PointResult:
    with at(point.target) as model:
        quality, measured = judge(model)
        chosen = measured.selection
        return PointResult(
            method=point.method,
            target=point.target,
            seed=point.seed,
            quality=quality,
            loss=measured.loss,
            density=measured.density if chosen else 0.0,
            weight_share=chosen.weight_share if chosen else 0.0,
            weight_bytes_per_token=chosen.weight_bytes_per_token if chosen else 0.0,
            flops_per_token=chosen.flops_per_token if chosen else 0.0,
            training_tokens=bench.tokens_of(model),
            seconds=round(perf_counter() - start, 1),
            selection=asdict(chosen) if chosen else None,
        )


def read_point(path: Path) -> PointResult:
    """A result as it was written. Raises ValueError for a file of something else."""
    record = json.loads(path.read_text(encoding="utf-8"))
    known = {field.name for field in fields(PointResult)}
    if set(record) != known:
        raise ValueError(f"{path} is no result of a comparison: fields {sorted(set(record) ^ known)} differ; delete it")
    return PointResult(**record)
