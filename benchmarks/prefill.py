"""A sparse FFN for 128 to 8192 tokens on a GPU, against dense layers and published ways to run experts.

    python -m benchmarks.prefill [--output benchmarks/results/prefill.json]

CUDA graphs over layers in rotation, new inputs before every replay; all ways of one row take turns
(benchmarks.replays). Tokens are drawn independently, or in runs of neighbours that have a direction in common. `op` is
what the lowering table chooses, given the calibrated density. The peers get their rows sorted by expert before the
clock starts, and keep one draw of inputs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.batch import COMMON, with_density, with_tokens
from benchmarks.decode import (
    DTYPE,
    EXPERT_SIZE,
    WORKLOADS,
    Workload,
    dense,
    device_facts,
    error_against_float64,
    make_layer,
    measured_density,
    row_major_down,
    write,
)
from benchmarks.prefill_peers import grouped_mm, grouped_mm_dense_down, padded_grouped, rows_of
from benchmarks.replays import Captured, Run, Timing, capture, race
from lte_compile.kernels.fused_up import sparse_ffn_fused_up
from lte_compile.kernels.lowering import choose, describe, lower_sparse_ffn
from lte_compile.kernels.masked_dense import sparse_ffn_masked_dense
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall
from lte_compile.kernels.triton_prefill import sparse_ffn_prefill

TOKENS = (128, 512, 2048, 4096, 8192)
DENSITIES = (1.0, 0.5, 0.3, 0.2, 0.1, 0.05)
CORRELATED_DENSITIES = (0.3, 0.2, 0.1)
LAYERS = 3  # their weights exceed any L2 several times over, and so do many tokens' hidden values
RUN = 32  # neighbouring tokens with a direction in common, where masks are correlated
PEER_DENSITY = 0.25  # above it the peers' copies of rows are many times the layer
ERROR_TOKENS = 256


@dataclass
class Row:
    tokens: int
    masks: str
    density: float  # measured
    chosen: str
    times: dict[str, Timing]
    errors: dict[str, float]  # of the chosen kernel and the peers for a few of the tokens, relative to float64

    @property
    def dense_us(self) -> float:
        return min(t.us for name, t in self.times.items() if name in DENSE)


COMPILED = {"torch.compile": "default", "max-autotune": "max-autotune-no-cudagraphs"}
DENSE = ("F.linear", *COMPILED)
FUSED_NEURONS = 4096  # no layer that the table gives to `triton-fused` has more


def draw(layers: list[SparseFfnCall], correlated: bool) -> None:
    """New inputs of every layer."""
    for layer in layers:
        layer.x_D.normal_()
        if correlated:
            tokens, width = layer.x_D.shape
            shared = torch.randn(-(-tokens // RUN), width, device="cuda", dtype=DTYPE)
            layer.x_D.mul_((1 - COMMON) ** 0.5).add_(shared.repeat_interleave(RUN, 0)[:tokens], alpha=COMMON**0.5)


def baselines(layers: list[SparseFfnCall], autotune: bool) -> dict[str, Captured]:
    """The dense layer as it is, compiled, and compiled with max-autotune, which takes 10 to 25 seconds."""
    plain = [row_major_down(layer) for layer in layers]
    graphs = {"F.linear": capture(dense, plain)}
    for name, mode in COMPILED.items() if autotune else [*COMPILED.items()][:1]:
        torch._dynamo.reset()  # or the ninth number of tokens would be one too many to compile for
        graphs[name] = capture(torch.compile(dense, mode=mode, dynamic=False), plain)
    return graphs


def measure(
    layers: list[SparseFfnCall], dense_graphs: dict[str, Captured], density: float, correlated: bool, repeats: int
) -> Row:
    layers = with_density(layers, density)
    redraw: Callable[[], None] = partial(draw, layers, correlated)
    redraw()
    met = measured_density(layers)
    layers = [layer._replace(density=met) for layer in layers]
    chosen = choose(describe(layers[0])).lowering
    ways = {"op": lower_sparse_ffn, "masked dense": sparse_ffn_masked_dense, "sorted": sparse_ffn_prefill}
    ways |= {"fused": sparse_ffn_fused_up} if len(layers[0].weights.up_FD) <= FUSED_NEURONS else {}
    graphs = dense_graphs | {name: capture(run, layers) for name, run in ways.items()}
    times = race(graphs, len(layers), repeats, redraw)
    few = layers[0]._replace(x_D=layers[0].x_D[:ERROR_TOKENS])
    errors = {name: error_against_float64(run, few) for name, run in (("op", chosen.kernel), *peers_of(few).items())}
    row = Row(len(layers[0].x_D), "correlated" if correlated else "independent", met, chosen.name, times, errors)
    if met <= PEER_DENSITY:
        peers = {name: capture(run, layers[:1]) for name, run in peers_of(layers[0]).items()}
        row.times |= race(peers, 1, repeats, lambda: None)
    return row


def peers_of(layer: SparseFfnCall) -> dict[str, Run]:
    """The peers for this layer's present inputs."""
    rows = rows_of(layer)
    gate, up = layer.weights.gate_FD, layer.weights.up_FD
    assert gate is not None
    joined = torch.cat([matrix.view(-1, EXPERT_SIZE, matrix.shape[1]) for matrix in (gate, up)], 1)
    return {
        "torch._grouped_mm": lambda layer: grouped_mm(layer, rows),
        "torch._grouped_mm, dense down": lambda layer: grouped_mm_dense_down(layer, rows),
        "padded grouped product": lambda layer: padded_grouped(layer, rows, joined),
    }


def rows_of_tokens(base: list[SparseFfnCall], tokens: int, repeats: int, *, autotune: bool) -> list[Row]:
    """All densities and masks of one number of tokens."""
    layers = with_tokens(base, tokens)
    dense_graphs = baselines(layers, autotune)
    kinds = [(False, density) for density in DENSITIES] + [(True, density) for density in CORRELATED_DENSITIES]
    return [measure(layers, dense_graphs, density, correlated, repeats) for correlated, density in kinds]


def table(work: Workload, rows: list[Row]) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row.times))
    result = Table(title=f"{work.name} {work.width}x{work.neurons}, microseconds a layer")
    for heading in ("tokens", "masks", "density", "op is", *names, "speed-up", "error"):
        result.add_column(heading, justify="right")
    for row in rows:
        cells = [f"{row.times[name].us:.0f}" if name in row.times else "" for name in names]
        ratio = f"{row.dense_us / row.times['op'].us:.2f}x"
        result.add_row(
            str(row.tokens), row.masks, f"{row.density:.3f}", row.chosen, *cells, ratio, f"{row.errors['op']:.1e}"
        )
    return result


def add_autotune_option(parser: argparse.ArgumentParser) -> None:
    about = "after so long, further numbers of tokens go without the max-autotune baseline"
    parser.add_argument("--autotune-seconds", type=float, default=float("inf"), help=about)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="also write the figures here, as JSON")
    parser.add_argument("--repeats", type=int, default=9, help="graph replays a timing")
    add_autotune_option(parser)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument(
        "--workloads", nargs="+", default=["LLaMA-2-7B"], choices=[w.name for w in WORKLOADS if w.gated]
    )
    options = parser.parse_args()
    console = Console(width=200)
    if not torch.cuda.is_available():
        console.print("benchmarks.prefill needs an NVIDIA GPU that torch can see")
        return 1
    torch.manual_seed(0)
    device, autotune_until = device_facts(), time.perf_counter() + options.autotune_seconds
    console.print(device)
    report: dict[str, Any] = {"device": device, "dtype": str(DTYPE), "expert_size": EXPERT_SIZE, "workloads": []}
    for work in (work for work in WORKLOADS if work.name in options.workloads):
        base, rows = [make_layer(work) for _ in range(LAYERS)], []
        report["workloads"].append(entry := {**asdict(work)})
        for tokens in options.tokens:
            rows += rows_of_tokens(base, tokens, options.repeats, autotune=time.perf_counter() < autotune_until)
            entry["rows"] = [asdict(row) for row in rows]
            if options.output is not None:  # each time: a run that is cut off keeps what it measured
                write(options.output, report)
            console.print(f"{work.name}: {tokens} tokens done")
        console.print(table(work, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
