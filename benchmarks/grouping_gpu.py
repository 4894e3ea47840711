"""Balanced k-means on a GPU: every layer of LLaMA-2-7B's shape (11008 x 4096, 344 experts of 32).

    python -m benchmarks.grouping_gpu [--layers 32] [--output benchmarks/results/grouping_gpu.json]

Two kinds of rows: without structure (normal numbers, where no sweep finds much and none stops early by chance), and
with planted clusters of 32 (a centre, plus noise of twice its length), of which the share found again is printed.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.decode import device_facts, write
from lte_compile.config import Grouping
from lte_compile.grouping import GroupingRequest, group_neurons

NEURONS, WIDTH, EXPERT_SIZE = 11008, 4096, 32
NOISE = 2.0


@dataclass(frozen=True)
class Timing:
    rows: str
    layers: int
    seconds: float
    seconds_a_layer: float
    found: float | None  # share of planted pairs that are together again


def normal_rows(generator: torch.Generator) -> Tensor:
    return torch.randn(NEURONS, WIDTH, generator=generator, device="cuda", dtype=torch.float32)


def planted_rows(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows, and the cluster that each belongs to."""
    centres = torch.randn(NEURONS // EXPERT_SIZE, WIDTH, generator=generator, device="cuda")
    of_row_F = torch.randperm(NEURONS, generator=generator, device="cuda") // EXPERT_SIZE
    return centres[of_row_F] + NOISE * normal_rows(generator), of_row_F


def group(weights_FD: Tensor) -> Tensor:
    request = GroupingRequest(method=Grouping.BALANCED_KMEANS, weights_FD=weights_FD, expert_size=EXPERT_SIZE)
    return group_neurons(request)


def pairs_found(order_F: Tensor, of_row_F: Tensor) -> float:
    """Share of pairs of one planted cluster that ended in one expert."""
    clusters_ES = of_row_F[order_F].view(-1, EXPERT_SIZE)
    same = (clusters_ES[:, :, None] == clusters_ES[:, None, :]).sum() - NEURONS
    return float(same) / (NEURONS * (EXPERT_SIZE - 1))


def measure(rows: str, layers: int) -> Timing:
    generator = torch.Generator("cuda").manual_seed(0)
    seconds, found = 0.0, []
    for _ in range(layers):
        weights_FD, of_row_F = planted_rows(generator) if rows == "planted" else (normal_rows(generator), None)
        torch.cuda.synchronize()
        started = perf_counter()
        order_F = group(weights_FD)
        torch.cuda.synchronize()
        seconds += perf_counter() - started
        if of_row_F is not None:
            found.append(pairs_found(order_F, of_row_F))
    return Timing(rows, layers, seconds, seconds / layers, sum(found) / len(found) if found else None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--output", type=Path, help="also write the figures here, as JSON")
    options = parser.parse_args()
    console = Console(width=120)
    if not torch.cuda.is_available():
        console.print("benchmarks.grouping_gpu needs an NVIDIA GPU that torch can see")
        return 1
    group(normal_rows(torch.Generator("cuda").manual_seed(1)))  # libraries load
    device = device_facts()
    timings: list[Timing] = []
    for rows, layers in (("planted", min(options.layers, 4)), ("normal", options.layers)):
        timings.append(measure(rows, layers))
        console.print(asdict(timings[-1]))
        if options.output is not None:
            report = {"device": device, "neurons": NEURONS, "width": WIDTH, "timings": list(map(asdict, timings))}
            write(options.output, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
