"""Training steps of a stack of Llama-shaped FFNs with routers, against the same stack dense.

    python -m benchmarks.training [--output benchmarks/results/training.json] [--plot benchmarks/results/training.png]

A step is forward and backward of RMSNorm, FFN and residual, layer after layer, in bf16, without an optimizer: that does
the same in both. Dense is the fastest of eager, torch.compile, and torch.compile with max-autotune. Stage 1 trains
everything with soft gates and both router losses; stage 2 trains the FFNs with hard gates, at densities that the
routers' biases set; the routers know of them as after lte_compile.calibrate, as far as it matters to the choice of
kernels (densities with the same ones share a compiled graph). Steps take turns, so that a clock that drifts with
heat drifts for all; each turn has new inputs, and several steps, so that the host is ahead of the device.

`saved` is what autograd keeps from forward to backward, `peak` the most that a step allocates. Errors are those of one
layer's result and gradients against float64, the largest of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.decode import device_facts, elapsed_seconds, write
from benchmarks.training_errors import error_of
from benchmarks.training_steps import (
    DTYPE,
    EXPERT_SIZE,
    NEURONS,
    STEPS,
    WIDTH,
    Call,
    Runner,
    hint_for,
    make_routed,
    make_stack,
    set_density,
)
from lte_compile.routing.router import set_stage
from lte_compile.running.tracing import trace_routers

DENSITIES = (0.05, 0.1, 0.2, 0.25, 0.3, 0.5)
WARM_UP = 3
DENSE = "dense"


@dataclass
class Measurement:
    name: str
    tokens: int
    ms: float  # a step of the whole stack
    p20: float
    p80: float
    over_dense: float  # of medians in the same race
    saved_mb: float
    peak_mb: float
    density: float | None = None  # measured


@dataclass
class Report:
    device: dict[str, Any]
    layers: int
    shape: tuple[int, int, int] = (WIDTH, NEURONS, EXPERT_SIZE)
    rows: list[Measurement] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)


def race(runners: Mapping[str, Runner], repeats: int) -> dict[str, list[float]]:
    """Milliseconds a step, a value a round: each runner once a round."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    for round_ in range(WARM_UP + repeats):
        for name, runner in runners.items():
            runner.x_TD.normal_()
            runner.grad_TD.normal_()
            seconds = elapsed_seconds(runner.steps)
            if round_ >= WARM_UP:
                times[name].append(seconds * 1e3 / STEPS)
    return times


def measured(runners: Mapping[str, Runner], repeats: int, density: float | None = None) -> list[Measurement]:
    """A row a runner, against the fastest of those whose names say that they are dense."""
    times = race(runners, repeats)
    fastest = min(median(values) for name, values in times.items() if name.startswith(DENSE))
    rows = []
    for name, runner in runners.items():
        p20, *_, p80 = quantiles(times[name], n=5, method="inclusive")
        middle = median(times[name])
        rows.append(
            Measurement(
                *(name, len(runner.x_TD), middle, p20, p80, middle / fastest),
                *runner.memory(),
                None if name.startswith(DENSE) else density,
            )
        )
    return rows


def dense_runners(model: nn.Sequential, tokens: int, max_autotune: bool) -> dict[str, Runner]:
    x_TD = torch.empty(tokens, WIDTH, device="cuda", dtype=DTYPE)
    grad_TD = torch.empty_like(x_TD)
    calls: dict[str, Call] = {
        "eager": model,
        "torch.compile": torch.compile(model),
    }
    if max_autotune:
        calls["max-autotune"] = torch.compile(model, mode="max-autotune-no-cudagraphs")
    return {f"{DENSE} {name}": Runner(model, call, x_TD, grad_TD) for name, call in calls.items()}


def stage_1(dense: Mapping[str, Runner], routed: nn.Sequential, repeats: int) -> list[Measurement]:
    set_stage(routed, "soft")
    like = next(iter(dense.values()))
    runners = dict(dense)
    calls: dict[str, Call] = {"eager": routed, "compiled": torch.compile(routed, backend="lte")}
    for name, call in calls.items():
        runners[f"stage 1 {name}"] = Runner(routed, call, like.x_TD, like.grad_TD, losses=True)
    return measured(runners, repeats)


def stage_2(
    dense: Mapping[str, Runner], routed: nn.Sequential, density: float, hint: float, repeats: int
) -> Measurement:
    """One density against the dense steps in the same race."""
    set_stage(routed, "hard")
    like = next(iter(dense.values()))
    sample_TD = torch.randn_like(like.x_TD)
    set_density(routed, sample_TD, density, hint)
    with torch.no_grad(), trace_routers(routed) as trace:
        routed(sample_TD)
    runner = Runner(routed, torch.compile(routed, backend="lte"), like.x_TD, like.grad_TD)
    return measured({**dense, "stage 2": runner}, repeats, trace.density())[-1]


def table(rows: list[Measurement], layers: int) -> Table:
    result = Table(title=f"a step of {layers} layers {WIDTH}x{NEURONS}, {DTYPE}")
    for heading in ("tokens", "step", "density", "ms", "p20", "p80", "over dense", "saved MB", "peak MB"):
        result.add_column(heading, justify="right")
    for row in rows:
        density = "" if row.density is None else f"{row.density:.3f}"
        times = (f"{ms:.2f}" for ms in (row.ms, row.p20, row.p80))
        memory = (f"{mb:.0f}" for mb in (row.saved_mb, row.peak_mb))
        result.add_row(str(row.tokens), row.name, density, *times, f"{row.over_dense:.3f}", *memory)
    return result


def plot(rows: list[Measurement], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for tokens in sorted({row.tokens for row in rows}):
        points = sorted((r.density, r.over_dense) for r in rows if r.tokens == tokens and r.density is not None)
        axes.plot(*zip(*points, strict=True), marker="o", label=f"stage 2, {tokens} tokens")
        soft = next(row.over_dense for row in rows if row.tokens == tokens and row.name == "stage 1 compiled")
        axes.plot(1.0, soft, marker="s", linestyle="none", label=f"stage 1, {tokens} tokens")
    axes.axhline(1.0, color="gray", linewidth=0.8)
    axes.set(xlabel="share of active experts", ylabel="time of a step over dense", ylim=(0, None), xlim=(0, 1.05))
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def all_errors() -> dict[str, float]:
    """By dtype and stage; of the last listed kind products run over each expert's tokens."""
    kinds = {"stage 1": None, "stage 2": 0.5, "stage 2, few active": 0.1}
    return {
        f"{name}, {str(dtype).removeprefix('torch.')}": error_of(dtype, density)
        for name, density in kinds.items()
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    }


def run(options: argparse.Namespace, console: Console) -> Report:
    report = Report(device_facts(), options.layers)
    console.print(report.device)
    report.errors = all_errors()
    console.print({name: f"{error:.1e}" for name, error in report.errors.items()})
    dense, routed = make_stack(options.layers), make_routed(options.layers)
    for tokens in options.tokens:
        runners = dense_runners(dense, tokens, options.max_autotune)
        report.rows += stage_1(runners, routed, options.repeats)
        save(report, options)
        fastest = min((row for row in report.rows if row.tokens == tokens and row.name in runners), key=lambda r: r.ms)
        baseline = {fastest.name: runners[fastest.name]}
        for density in options.densities:
            hint = hint_for(density, options.densities)
            report.rows.append(stage_2(baseline, routed, density, hint, options.repeats))
            save(report, options)
            console.print(report.rows[-1])
        console.print(table([row for row in report.rows if row.tokens == tokens], options.layers))
    return report


def save(report: Report, options: argparse.Namespace) -> None:
    """After each row: a run that is cut off keeps what it measured."""
    if options.output is not None:
        write(options.output, {**asdict(report), "dtype": str(DTYPE)})
    if options.plot is not None:
        plot(report.rows, options.plot)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="also write the figures here, as JSON")
    parser.add_argument("--plot", type=Path, help="also draw them here, as PNG")
    parser.add_argument("--repeats", type=int, default=9, help="turns of each kind of step")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096])
    parser.add_argument("--densities", type=float, nargs="+", default=list(DENSITIES))
    parser.add_argument(
        "--max-autotune",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="of dense steps, which takes minutes",
    )
    options = parser.parse_args()
    console = Console(width=140)
    if not torch.cuda.is_available():
        console.print("benchmarks.training needs an NVIDIA GPU that torch can see")
        return 1
    torch._dynamo.config.recompile_limit = 64  # every density is a graph of its own
    run(options, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
