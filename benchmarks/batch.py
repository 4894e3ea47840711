"""A sparse FFN for 2 to 64 tokens on a GPU, against dense layers and what reading the union of experts must cost.

    python -m benchmarks.batch [--output benchmarks/results/batch.json]

Timed as benchmarks.decode does: CUDA graphs over layers in rotation, fresh inputs before every replay, all ways of one
row in turns. Tokens are drawn independently, or around a common direction as tokens of one text are; the union is the
measured share of experts that any of them selects. `goal` is dense x (union + .08) / .88: the same share of weights
read, and 8 % for everything else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.decode import (
    DENSE,
    DTYPE,
    EXPERT_SIZE,
    SPARSE,
    WORKLOADS,
    Workload,
    dense_baselines,
    device_facts,
    error_against_float64,
    make_layer,
    write,
)
from benchmarks.replays import Captured, Timing, capture, race
from lte_compile.kernels.lowering import lower_sparse_ffn
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall, active_experts

TOKENS = (2, 4, 8, 16, 32, 64)
DENSITIES = (1.0, 0.5, 0.3, 0.1)  # of each token
# Share of a token's variance that all tokens of a correlated batch have in common.
COMMON = 0.7


@dataclass
class Measurement:
    tokens: int
    masks: str
    density: float  # of a token, measured
    union: float  # measured
    times: dict[str, Timing]
    error: float  # relative to float64

    @property
    def dense_us(self) -> float:
        return min(self.times[name].us for name in DENSE)

    @property
    def goal_us(self) -> float:
        return self.dense_us * (self.union + 0.08) / 0.88


class Draws:
    """New inputs for all layers, and the masks they met."""

    def __init__(self, layers: list[SparseFfnCall], correlated: bool) -> None:
        self._layers, self._common = layers, COMMON if correlated else 0.0
        self._active: list[Tensor] = []

    def __call__(self) -> None:
        for layer in self._layers:
            shared_1D = torch.randn_like(layer.x_D[:1], dtype=torch.float32)
            own_TD = torch.randn_like(layer.x_D, dtype=torch.float32)
            layer.x_D.copy_((1 - self._common) ** 0.5 * own_TD + self._common**0.5 * shared_1D)
        self._active.append(torch.stack([active_experts(layer) for layer in self._layers]).float())

    @property
    def density(self) -> float:
        return float(torch.stack(self._active).mean())

    @property
    def union(self) -> float:
        return float(torch.stack(self._active).amax(2).mean())


def measure(
    layers: list[SparseFfnCall],
    baselines: dict[str, Captured],
    density: float,
    correlated: bool,
    repeats: int,
) -> Measurement:
    layers = [layer._replace(density=density) for layer in with_density(layers, density)]
    draws = Draws(layers, correlated)
    times = race(baselines | {SPARSE: capture(lower_sparse_ffn, layers)}, len(layers), repeats, draws)
    return Measurement(
        tokens=layers[0].x_D.shape[0],
        masks="correlated" if correlated else "independent",
        density=draws.density,
        union=draws.union,
        times=times,
        error=error_against_float64(lower_sparse_ffn, layers[0]),
    )


def with_tokens(layers: list[SparseFfnCall], tokens: int) -> list[SparseFfnCall]:
    return [layer._replace(x_D=layer.x_D.new_zeros(tokens, layer.router_ED.shape[1]).normal_()) for layer in layers]


def with_density(layers: list[SparseFfnCall], density: float) -> list[SparseFfnCall]:
    """Router biases at which a random token selects this share of experts (all at density 1)."""
    changed = []
    for layer in layers:
        logits = torch.randn(256, layer.router_ED.shape[1], device="cuda") @ layer.router_ED.float().t()
        shift = 50.0 if density >= 1 else -float(torch.quantile(logits.flatten(), 1 - density))
        changed.append(layer._replace(router_bias_E=torch.full((layer.router_ED.shape[0],), shift, device="cuda")))
    return changed


def rows_of(work: Workload, repeats: int) -> Iterator[list[Measurement]]:
    """The rows of one number of tokens after the other."""
    base = [make_layer(work) for _ in range(work.layers)]
    for tokens in TOKENS:
        layers = with_tokens(base, tokens)
        baselines = dense_baselines(layers)
        yield [
            measure(layers, baselines, d, correlated, repeats) for correlated, d in product((False, True), DENSITIES)
        ]


def table(work: Workload, rows: list[Measurement]) -> Table:
    result = Table(title=f"{work.name} {work.width}x{work.neurons}, microseconds a layer")
    for heading in ("tokens", "masks", "density", "union", *rows[0].times, "goal", "error"):
        result.add_column(heading, justify="right")
    for row in rows:
        times = (*(timing.us for timing in row.times.values()), row.goal_us)
        shares = (f"{row.density:.3f}", f"{row.union:.3f}")
        result.add_row(str(row.tokens), row.masks, *shares, *(f"{us:.1f}" for us in times), f"{row.error:.1e}")
    return result


def plot(rows: list[Measurement], path: Path) -> None:
    """Time over dense against the measured union, with the goal."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for tokens in TOKENS:
        own = sorted((row.union, row.times[SPARSE].us / row.dense_us) for row in rows if row.tokens == tokens)
        if own:
            axes.plot(*zip(*own, strict=True), marker=".", label=f"{tokens} tokens")
    axes.plot([0.1, 1], [0.18 / 0.88, 1.08 / 0.88], "k:", label="goal")
    axes.set(xlabel="union: share of experts that any token selects", ylabel="time over dense", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="also write the figures here, as JSON, and a plot beside it")
    parser.add_argument("--repeats", type=int, default=15, help="graph replays a timing")
    parser.add_argument("--workloads", nargs="+", default=["LLaMA-2-7B"], choices=[work.name for work in WORKLOADS])
    options = parser.parse_args()
    console = Console(width=120)
    if not torch.cuda.is_available():
        console.print("benchmarks.batch needs an NVIDIA GPU that torch can see")
        return 1
    torch.manual_seed(0)
    device = device_facts()
    console.print(device)
    report: dict[str, Any] = {"device": device, "dtype": str(DTYPE), "expert_size": EXPERT_SIZE, "workloads": []}
    for work in (work for work in WORKLOADS if work.name in options.workloads):
        rows: list[Measurement] = []
        figures: list[dict[str, Any]] = []
        report["workloads"].append({**asdict(work), "rows": figures})
        for added in rows_of(work, options.repeats):
            rows += added
            figures += [{**asdict(row), "goal_us": row.goal_us} for row in added]
            if options.output is not None:  # a run that is cut off keeps what it measured
                write(options.output, report)
                plot(rows, options.output.with_suffix(".png"))
        console.print(table(work, rows))
        met = sum(row.times[SPARSE].us <= row.goal_us for row in rows)
        console.print(f"{met} of {len(rows)} meet the goal")
    return 0


if __name__ == "__main__":
    sys.exit(main())
