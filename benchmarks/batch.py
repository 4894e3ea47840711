"""A sparse FFN for 2 to 64 tokens on a GPU, against dense layers and what reading the union of experts must cost.

    python -m benchmarks.batch [--output benchmarks/results/batch.json]

Timed as benchmarks.decode does: CUDA graphs over layers in rotation, fresh inputs before every replay. Tokens are drawn
independently, or around a common direction as tokens of one text are; the union is the measured share of experts that
any of them selects. `goal` is dense x (union + .08) / .88: the same share of weights read, and 8 % for everything else.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.decode import (
    DTYPE,
    EXPERT_SIZE,
    WORKLOADS,
    Workload,
    copy_bandwidth,
    dense_baselines,
    error_against_float64,
    make_layer,
    time_graph,
    write,
)
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall, active_experts
from lte_compile.kernels.triton_batch import sparse_ffn_batch

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
    sparse_us: float
    dense_us: float
    goal_us: float
    error: float  # relative to float64


class Draws:
    """New inputs for all layers, and the masks they met."""

    def __init__(self, correlated: bool) -> None:
        self._common = COMMON if correlated else 0.0
        self._active: list[Tensor] = []

    def __call__(self, layers: list[SparseFfnCall]) -> None:
        for layer in layers:
            shared_1D = torch.randn_like(layer.x_D[:1], dtype=torch.float32)
            own_TD = torch.randn_like(layer.x_D, dtype=torch.float32)
            layer.x_D.copy_((1 - self._common) ** 0.5 * own_TD + self._common**0.5 * shared_1D)
        self._active.append(torch.stack([active_experts(layer) for layer in layers]).float())

    @property
    def density(self) -> float:
        return float(torch.stack(self._active).mean())

    @property
    def union(self) -> float:
        return float(torch.stack(self._active).amax(2).mean())


def measure(
    work: Workload, base: list[SparseFfnCall], density: float, correlated: bool, dense_us: float, repeats: int
) -> Measurement:
    draws, layers = Draws(correlated), with_density(base, density)
    sparse_us = time_graph(sparse_ffn_batch, layers, repeats, draws)
    return Measurement(
        tokens=layers[0].x_D.shape[0],
        masks="correlated" if correlated else "independent",
        density=draws.density,
        union=draws.union,
        sparse_us=sparse_us,
        dense_us=dense_us,
        goal_us=dense_us * (draws.union + 0.08) / 0.88,
        error=error_against_float64(sparse_ffn_batch, layers[0]),
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


def rows_of(work: Workload, repeats: int) -> list[Measurement]:
    base, rows = [make_layer(work) for _ in range(work.layers)], []
    for tokens in TOKENS:
        layers = with_tokens(base, tokens)
        dense_us = min(dense_baselines(layers, repeats).values())
        for correlated, density in product((False, True), DENSITIES):
            rows.append(measure(work, layers, density, correlated, dense_us, repeats))
    return rows


def table(work: Workload, rows: list[Measurement]) -> Table:
    result = Table(title=f"{work.name} {work.width}x{work.neurons}, microseconds a layer")
    for heading in ("tokens", "masks", "density", "union", "sparse", "dense", "goal", "error"):
        result.add_column(heading, justify="right")
    for row in rows:
        times = (row.sparse_us, row.dense_us, row.goal_us)
        shares = (f"{row.density:.3f}", f"{row.union:.3f}")
        result.add_row(str(row.tokens), row.masks, *shares, *(f"{us:.1f}" for us in times), f"{row.error:.1e}")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="also write the figures here, as JSON")
    parser.add_argument("--repeats", type=int, default=15, help="graph replays a timing")
    parser.add_argument("--workloads", nargs="+", default=["LLaMA-2-7B"], choices=[work.name for work in WORKLOADS])
    options = parser.parse_args()
    console = Console(width=120)
    if not torch.cuda.is_available():
        console.print("benchmarks.batch needs an NVIDIA GPU that torch can see")
        return 1
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    device = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_GB_per_s": bandwidth / 1e9}
    console.print(device)
    report: dict[str, Any] = {"device": device, "dtype": str(DTYPE), "expert_size": EXPERT_SIZE, "workloads": []}
    for work in (work for work in WORKLOADS if work.name in options.workloads):
        rows = rows_of(work, options.repeats)
        console.print(table(work, rows))
        report["workloads"].append({**asdict(work), "rows": [asdict(row) for row in rows]})
        if options.output is not None:
            write(options.output, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
