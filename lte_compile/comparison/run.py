"""Running methods over densities and seeds: one JSON file per point, written when done, skipped when there.

All of one seed start from the same fine-tuned model and see the same batches (lte_compile.baselines.workbench).
Processes that run the same points over the same directory share them out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from lte_compile.baselines import METHODS, AtDensity, Method, Workbench, find_method
from lte_compile.baselines.claims import claim
from lte_compile.evaluation.quality import Evaluation
from lte_compile.reports.results import write_atomically
from lte_compile.running.memory import release_unused_memory

Judge: TypeAlias = Callable[[nn.Module], tuple[float, Evaluation]]  # quality on the test split, and all it rests on

CLAIMS = "claims"
# Seconds between looks at what other processes are doing; the shortest training takes as long.
PAUSE = 1.0


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
        weight_share, weight_bytes_per_token, flops_per_token: see lte_compile.evaluation.meter.SelectionReport.
        training_tokens: that the model was trained on after the common start.
        selection: the whole SelectionReport; None for a model without FFNs.
        valid_quality, valid_density: on the validation split, to choose recipes by; None where it was not measured.
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
    valid_quality: float | None = None
    valid_density: float | None = None


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
    *,
    validate: Judge | None = None,
    wait: bool = True,
) -> tuple[PointResult, ...]:
    """Run what has no file in `directory` yet, in the order given; returns the results of all points that have one.

    Args:
        open_bench: makes a seed's workbench; called for seeds with something to do.
        say: takes a line about each point.
        validate: measures on the validation split what `judge` measures on the test split.
        wait: for points that other processes are running.

    Raises:
        FloatingPointError: points whose training gave no finite loss; every other point was run before.
    """
    run = _Run(directory / CLAIMS, directory, open_bench, judge, say, validate)
    missing = [point for point in points if not run.path(point).exists()]
    read_points(directory)  # a damaged one is to be known of before the work
    if done := len(points) - len(missing):
        say(f"{done} of {len(points)} points are there already")
    pieces = _pieces(points)
    while waiting := [piece for piece in pieces if not run.is_done(piece)]:
        if any(run.take(piece) for piece in sorted(waiting, key=run.distance)):
            continue
        if not wait:
            break
        time.sleep(PAUSE)
    if failures := [text for piece in pieces if (text := run.failure(piece)) is not None]:
        raise FloatingPointError("; ".join(failures))
    return tuple(read_point(run.path(point)) for point in points if run.path(point).exists())


@dataclass(frozen=True)
class _Piece:
    """What one process does in one go: a point, or all of a method that fits something for all densities."""

    name: str
    method: Method
    points: tuple[Point, ...]

    @property
    def seed(self) -> int:
        return self.points[0].seed


def _pieces(points: Sequence[Point]) -> list[_Piece]:
    named: dict[str, list[Point]] = {}
    for point in points:
        each = find_method(point.method).fits_each_density
        named.setdefault(Path(point.file_name).stem if each else f"{point.method}-seed{point.seed}", []).append(point)
    return [_Piece(name, find_method(of_one[0].method), tuple(of_one)) for name, of_one in named.items()]


@dataclass
class _Run:
    """One process's part in a comparison. A failure is noted beside the claim, so that others leave it alone."""

    claims: Path
    directory: Path
    open_bench: Callable[[int], Workbench]
    judge: Judge
    say: Callable[[str], None]
    validate: Judge | None = None
    benches: dict[int, Workbench] = field(default_factory=dict)
    started: float = field(default_factory=time.time)

    def path(self, point: Point) -> Path:
        return self.directory / point.file_name

    def is_done(self, piece: _Piece) -> bool:
        return self.failure(piece) is not None or all(self.path(point).exists() for point in piece.points)

    def failure(self, piece: _Piece) -> str | None:
        """What went wrong since this process began; what failed in earlier runs is tried again."""
        note = self._note(piece)
        return note.read_text() if note.exists() and note.stat().st_mtime >= self.started else None

    def distance(self, piece: _Piece) -> tuple[bool, bool, int]:
        """Of a seed whose models are here before others; dense models first, for others to find them trained."""
        return piece.seed not in self.benches, piece.method.only_density != 1.0, piece.seed

    def take(self, piece: _Piece) -> bool:
        """Run the piece, unless another process is at it or has been; returns whether it was this one."""
        with claim(self.claims / f"{piece.name}.lock", wait=False) as is_mine:
            if not is_mine or self.is_done(piece):
                return False
            try:
                self._run(piece)
            except FloatingPointError as error:
                self.say(f"{piece.method.title}, seed {piece.seed}: {error}")
                self._note(piece).write_text(f"{piece.method.name}, seed {piece.seed}: {error}")
        return True

    def _run(self, piece: _Piece) -> None:
        start, bench = time.perf_counter(), self._bench(piece.seed)
        at = piece.method.fit(bench)
        for point in piece.points:
            if self.path(point).exists():
                continue
            result = _run_point(point, at, bench, self.judge, self.validate, start)
            write_atomically(self.path(point), json.dumps(asdict(result), indent=1).encode())
            what = f"{piece.method.title} at {point.target:g}, seed {point.seed}"
            self.say(f"{what}: {result.quality:.4g} at {result.density:.3f}")
            release_unused_memory()
            start = time.perf_counter()

    def _bench(self, seed: int) -> Workbench:
        """Of one seed at a time: each holds models."""
        if seed not in self.benches:
            self.benches.clear()
            self.benches[seed] = self.open_bench(seed)
        return self.benches[seed]

    def _note(self, piece: _Piece) -> Path:
        return self.claims / f"{piece.name}.failed"


def _run_point(
    point: Point, at: AtDensity, bench: Workbench, judge: Judge, validate: Judge | None, start: float
) -> PointResult:
    with at(point.target) as model:
        quality, measured = judge(model)
        chosen = measured.selection
        valid_quality, valid = validate(model) if validate else (None, None)
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
            seconds=round(time.perf_counter() - start, 1),
            selection=asdict(chosen) if chosen else None,
            valid_quality=valid_quality,
            valid_density=None if valid is None else valid.density if valid.selection else 0.0,
        )


def read_points(directory: Path) -> tuple[PointResult, ...]:
    """All results of a directory, by seed, method (LTE first, then as registered) and density."""
    order = ["lte", *METHODS]
    results = [read_point(path) for path in directory.glob("*.json")]
    for result in results:
        find_method(result.method)  # or its reason
    return tuple(sorted(results, key=lambda r: (r.seed, order.index(r.method), -r.target)))


def read_point(path: Path) -> PointResult:
    """A result as it was written. Raises ValueError for a file of something else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to run that point again") from None
    known = {field.name for field in fields(PointResult)}
    newer = {field.name for field in fields(PointResult) if field.default is None}  # results from before lack them
    if differing := (set(record) ^ known) - (newer - set(record)):
        raise ValueError(f"{path} is no result of a comparison: fields {sorted(differing)} differ; delete it")
    return PointResult(**record)
