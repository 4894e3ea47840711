"""Whether the lowering table ever loses to dense: lte::sparse_ffn on a grid of tokens and densities.

    python -m benchmarks.dispatch [--output benchmarks/results/dispatch.json] [--plot benchmarks/results/dispatch.png]

The op runs through the table, told the density that the inputs meet. The dense layer is F.linear or torch.compile, with
or without max-autotune, whichever is fastest for the number of tokens; it and the op take turns (benchmarks.replays).
Their ratio is the median of those within rounds, because the GPU's clock moves by several percent between rounds.
What the output holds of other workloads is kept.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.batch import with_density, with_tokens
from benchmarks.decode import (
    DTYPE,
    EXPERT_SIZE,
    WORKLOADS,
    Workload,
    device_facts,
    make_layer,
    measured_density,
    write,
)
from benchmarks.prefill import add_autotune_option, baselines, draw
from benchmarks.replays import Timing, capture, paired_ratio, race, rounds, timing
from lte_compile.kernels.lowering import choose, describe, lower_sparse_ffn
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall


class Grid(NamedTuple):
    tokens: tuple[int, ...]
    densities: tuple[float, ...]


SMALL_GRID = Grid((1, 8, 32, 128, 512, 2048, 8192), (0.1, 0.3, 1.0))
GRIDS = {
    "LLaMA-2-7B": Grid(tuple(2**power for power in range(14)), (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)),
    "SmolLM2-135M": SMALL_GRID,
    "GPT-2": SMALL_GRID,
    "1024x2816": SMALL_GRID,
}
BETWEEN = Workload("1024x2816", 1024, 2816, "silu", True, False)  # between SmolLM2-135M and a large layer
# Layers in rotation: while reading weights counts they must exceed L2 several times over; later, a layer's hidden
# values do that alone.
FEW_LAYERS, FEW_LAYERS_FROM = 2, 1024
GOAL = 1.02


@dataclass
class Point:
    workload: str
    tokens: int
    density: float  # aimed at
    met: float  # measured
    chosen: str
    baseline: str  # the fastest of the dense layers
    op: Timing
    dense: Timing
    ratio: float  # time of the op over that of the fastest dense layer, median over rounds


def row_of(
    work: Workload, layers: list[SparseFfnCall], densities: Sequence[float], repeats: int, *, autotune: bool
) -> list[Point]:
    """All densities of one number of tokens."""
    dense_graphs = baselines(layers, autotune)
    first = race(dense_graphs, len(layers), repeats, partial(draw, layers, False))
    fastest = min(first, key=lambda name: first[name].us)
    points = []
    for density in densities:
        ready = with_density(layers, density)
        redraw = partial(draw, ready, False)
        redraw()
        met = measured_density(ready)
        ready = [layer._replace(density=met) for layer in ready]
        graphs = {"op": capture(lower_sparse_ffn, ready), "dense": dense_graphs[fastest]}
        times = rounds(graphs, len(layers), repeats, redraw)
        op, dense, ratio = timing(times["op"]), timing(times["dense"]), paired_ratio(times["op"], times["dense"])
        chosen = choose(describe(ready[0])).lowering.name
        points.append(Point(work.name, len(ready[0].x_D), density, met, chosen, fastest, op, dense, ratio))
    return points


def line(row: list[Point], seconds: float) -> str:
    cells = "  ".join(f"{point.density:g}: {point.ratio:.3f}" for point in row)
    name, tokens, baseline, dense_us = row[0].workload, row[0].tokens, row[0].baseline, row[0].dense.us
    return f"{name} {tokens:5} tokens, {baseline} {dense_us:.1f} us | {cells} | {seconds:.0f} s"


def table(name: str, points: list[Point]) -> Table:
    result = Table(title=f"{name}: time of the op over the faster dense layer, and the kernel chosen")
    densities = sorted({point.density for point in points})
    for heading in ("tokens", "dense us", *(f"{density:g}" for density in densities)):
        result.add_column(heading, justify="right")
    for tokens in sorted({point.tokens for point in points}):
        row = {point.density: point for point in points if point.tokens == tokens}
        cells = [f"{row[d].ratio:.2f} {row[d].chosen.removeprefix('triton-')}" for d in densities]
        result.add_row(str(tokens), f"{row[densities[0]].dense.us:.1f}", *cells)
    return result


def plot(points: list[Point], path: Path) -> None:
    """A heat map a workload: speed-up of the op over dense."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(point.workload for point in points))
    figure = Figure(figsize=(6.5 * len(names), 5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        cells = {(point.tokens, point.density): point.ratio for point in points if point.workload == name}
        tokens, densities = sorted({t for t, _ in cells}), sorted({d for _, d in cells})
        values = [[1 / cells[t, d] for d in densities] for t in tokens]
        axes.imshow(values, cmap="RdYlGn", vmin=0.5, vmax=1.5, aspect="auto")
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8)
        axes.set_xticks(range(len(densities)), [f"{d:g}" for d in densities])
        axes.set_yticks(range(len(tokens)), [str(t) for t in tokens])
        axes.set(xlabel="share of active experts", ylabel="tokens", title=f"{name}: times faster than dense")
    figure.savefig(path, dpi=120)


def earlier_report(path: Path | None, names: list[str]) -> dict[str, Any]:
    """What a report holds of other workloads than `names`: their points, and the device that each was measured on."""
    if path is None or not path.exists():
        return {"devices": {}, "points": []}
    report = json.loads(path.read_text())
    points = [point for point in report["points"] if point["workload"] not in names]
    return {"devices": {name: report["devices"][name] for name in {p["workload"] for p in points}}, "points": points}


def point_of(entry: dict[str, Any]) -> Point:
    """A point of a report."""
    timings = {name: Timing(**entry[name]) for name in ("op", "dense")}
    return Point(**(entry | timings))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="also write the figures here, as JSON")
    parser.add_argument("--plot", type=Path, help="also draw the grid here, as PNG")
    parser.add_argument("--repeats", type=int, default=25, help="graph replays a timing")
    add_autotune_option(parser)
    parser.add_argument("--workloads", nargs="+", default=list(GRIDS), choices=list(GRIDS))
    options = parser.parse_args()
    console = Console(width=180)
    if not torch.cuda.is_available():
        console.print("benchmarks.dispatch needs an NVIDIA GPU that torch can see")
        return 1
    torch.manual_seed(0)
    device, autotune_until = device_facts(), time.perf_counter() + options.autotune_seconds
    console.print(device)
    report = {"dtype": str(DTYPE), "expert_size": EXPERT_SIZE, **earlier_report(options.output, options.workloads)}
    points = [point_of(entry) for entry in report["points"]]
    for work in (work for work in (*WORKLOADS, BETWEEN) if work.name in options.workloads):
        base, grid = [make_layer(work) for _ in range(work.layers)], GRIDS[work.name]
        report["devices"][work.name] = device
        for tokens in grid.tokens:
            started = time.perf_counter()
            layers = with_tokens(base[: FEW_LAYERS if tokens >= FEW_LAYERS_FROM else None], tokens)
            row = row_of(
                work, layers, grid.densities, options.repeats, autotune=tokens == 1 or started < autotune_until
            )
            points += row
            console.print(line(row, time.perf_counter() - started))
            report["points"] = [asdict(point) for point in points]
            if options.output is not None:  # each time: a run that is cut off keeps what it measured
                write(options.output, report)
        console.print(table(work.name, [point for point in points if point.workload == work.name]))
    slowest = max(points, key=lambda point: point.ratio)
    console.print(f"slowest of {len(points)} points: {slowest.ratio:.3f} x dense (goal {GOAL}): {slowest}")
    if options.plot is not None:
        plot(points, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
