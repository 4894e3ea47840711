"""One-token decode of a sparse FFN on a GPU, against dense layers and the memory's limit.

    python -m benchmarks.decode [--output benchmarks/results/decode.json] [--quick]

Every timing replays one CUDA graph over several distinct layers in rotation, so that weights come from memory and not
from L2. Inputs are drawn anew before every replay; each layer's router bias is set on the first draw and the table says
the density really met. The floor is the bytes that must be read over the copy bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lte_compile.kernels.ffn import FfnWeights
from lte_compile.kernels.layout import neuron_major
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall, active_experts, sparse_ffn_reference
from lte_compile.kernels.triton_decode import DecodeConfig, default_config, sparse_ffn_decode

EXPERT_SIZE = 32  # the paper's
DENSITIES = (1.0, 0.5, 0.3, 0.2, 0.1, 0.05)
L2_BYTES = 64 * 2**20  # more than any current GPU's L2: the layers in rotation must exceed it together
MIN_LAYERS = 8
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Workload:
    name: str
    width: int
    neurons: int
    activation: str
    gated: bool
    biases: bool

    @property
    def ffn_bytes(self) -> int:
        return (3 if self.gated else 2) * self.width * self.neurons * DTYPE.itemsize

    @property
    def router_bytes(self) -> int:
        return self.neurons // EXPERT_SIZE * self.width * DTYPE.itemsize

    @property
    def layers(self) -> int:
        return max(MIN_LAYERS, -(-2 * L2_BYTES // self.ffn_bytes))


WORKLOADS = (
    Workload("LLaMA-2-7B", 4096, 11008, "silu", True, False),
    Workload("SmolLM2-135M", 576, 1536, "silu", True, False),
    Workload("GPT-2", 768, 3072, "gelu_tanh", False, True),
)


@dataclass
class Measurement:
    workload: str
    density: float  # measured
    default_us: float
    best_us: float
    best_config: dict[str, int]
    floor_us: float
    share_of_floor: float  # floor over the default's time
    speedup: float  # of the default over the faster dense
    error: float  # relative to float64


def make_layer(work: Workload) -> SparseFfnCall:
    """One layer's weights with an input of its own; the router bias is set later."""

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, device="cuda").div(size[-1] ** 0.5).to(DTYPE)

    bias = (draw(work.neurons), draw(work.width)) if work.biases else (None, None)
    gate = draw(work.neurons, work.width) if work.gated else None
    down = neuron_major(draw(work.width, work.neurons))
    weights = FfnWeights(draw(work.neurons, work.width), gate, down, bias[0], None, bias[1])
    experts = work.neurons // EXPERT_SIZE
    router_bias = torch.zeros(experts, device="cuda")
    x = torch.randn(1, work.width, device="cuda", dtype=DTYPE)
    return SparseFfnCall(x, draw(experts, work.width), router_bias, weights, work.activation, EXPERT_SIZE, 0.5, None)


def set_density(layers: list[SparseFfnCall], density: float) -> None:
    """Shift every router's bias so that a random token meets this share of active experts (all at density 1)."""
    for layer in layers:
        x = torch.randn(64, layer.router_ED.shape[1], device="cuda")
        logits = x @ layer.router_ED.float().t()
        assert layer.router_bias_E is not None
        layer.router_bias_E.fill_(50.0 if density >= 1 else -float(torch.quantile(logits.flatten(), 1 - density)))


def redraw(layers: list[SparseFfnCall]) -> None:
    for layer in layers:
        layer.x_D.normal_()


def measured_density(layers: list[SparseFfnCall]) -> float:
    return float(torch.stack([active_experts(layer).float().mean() for layer in layers]).mean())


def time_graph(
    run: Callable[[SparseFfnCall], Tensor],
    layers: list[SparseFfnCall],
    repeats: int,
    redraw: Callable[[list[SparseFfnCall]], None] = redraw,
) -> float:
    """Median microseconds a layer; `redraw` gives the layers new inputs before every replay."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for layer in layers[:2]:
            run(layer)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            run(layer)
    times = []
    for _ in range(repeats):
        redraw(layers)
        times.append(elapsed_seconds(graph.replay))
    return median(times) * 1e6 / len(layers)


def elapsed_seconds(work: Callable[[], object]) -> float:
    """Time of `work` on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def dense(layer: SparseFfnCall) -> Tensor:
    up, gate, down, up_bias, _, down_bias = layer.weights
    hidden = F.linear(layer.x_D, up, up_bias)
    hidden = F.gelu(hidden, approximate="tanh") if gate is None else F.silu(F.linear(layer.x_D, gate)) * hidden
    return F.linear(hidden, down, down_bias)


def row_major_down(layer: SparseFfnCall) -> SparseFfnCall:
    """The layout a plain nn.Linear has: the dense baselines get theirs."""
    return layer._replace(weights=layer.weights._replace(down_DF=layer.weights.down_DF.contiguous()))


def dense_baselines(layers: list[SparseFfnCall], repeats: int) -> dict[str, float]:
    plain = [row_major_down(layer) for layer in layers]
    compiled = torch.compile(dense, mode="max-autotune-no-cudagraphs", dynamic=False)
    return {"F.linear": time_graph(dense, plain, repeats), "torch.compile": time_graph(compiled, plain, repeats)}


def copy_bandwidth() -> float:
    """Bytes per second, read and write counted."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = [elapsed_seconds(lambda: target.copy_(source)) for _ in range(20)]
    return 2 * source.nbytes / median(times[5:])


def candidates(work: Workload, quick: bool) -> Iterator[DecodeConfig]:
    """The default, then variations of each launch with the other left as it is."""
    base = default_config(work.width, EXPERT_SIZE)
    yield base
    if quick:
        return
    whole = min(4096, 1 << (work.width - 1).bit_length())
    for rows, block, warps, stages in (
        (2, base.up_block, 4, 1),
        (8, base.up_block, 8, 1),
        (4, min(512, whole), 4, 1),
        (4, base.up_block, 4, 3),
        (2, min(2048, whole), 4, 1),
        (1, whole, 4, 1),
        (8, min(512, whole), 4, 2),
    ):
        yield replace(base, up_rows=rows, up_block=block, up_warps=warps, up_stages=stages)
    for rows, block, splits, warps, stages in (
        (16, 256, 32, 2, 1),
        (8, 256, 64, 2, 1),
        (8, 512, 64, 4, 1),
        (16, 128, 32, 2, 2),
        (32, 128, 16, 4, 1),
        (8, 256, 32, 1, 3),
        (4, 512, 128, 2, 1),
    ):
        block = min(block, whole)
        yield replace(base, down_rows=rows, down_block=block, down_splits=splits, down_warps=warps, down_stages=stages)


def combine(base: DecodeConfig, timings: list[tuple[float, DecodeConfig]]) -> DecodeConfig:
    """The best first launch with the best second one: they do not interact."""
    ups = [item for item in timings if replace(item[1], **_part(base, "down")) == item[1]]
    downs = [item for item in timings if replace(item[1], **_part(base, "up")) == item[1]]
    best_up, best_down = (min(side, key=lambda item: item[0])[1] for side in (ups, downs))
    return replace(best_up, **_part(best_down, "down"))


def _part(config: DecodeConfig, prefix: str) -> dict[str, int]:
    return {name: value for name, value in asdict(config).items() if name.startswith(prefix)}


def error_against_float64(run: Callable[[SparseFfnCall], Tensor], layer: SparseFfnCall) -> float:
    wide = FfnWeights._make(None if t is None else t.double() for t in layer.weights)
    bias = None if layer.router_bias_E is None else layer.router_bias_E.double()
    exact = layer._replace(x_D=layer.x_D.double(), router_ED=layer.router_ED.double(), router_bias_E=bias, weights=wide)
    expected = sparse_ffn_reference(exact)
    difference = run(layer).double() - expected
    return float(difference.norm() / expected.norm().clamp_min(1e-30))


def measure(
    work: Workload,
    layers: list[SparseFfnCall],
    density: float,
    bandwidth: float,
    dense_us: float,
    repeats: int,
    quick: bool,
) -> Measurement:
    set_density(layers, density)
    redraw(layers)
    share = measured_density(layers)

    def timed(config: DecodeConfig) -> tuple[float, DecodeConfig]:
        return time_graph(lambda layer: sparse_ffn_decode(layer, config), layers, repeats), config

    timings = [timed(config) for config in candidates(work, quick)]
    default_us, base = timings[0]
    if not quick:
        timings.append(timed(combine(base, timings)))
    best_us, best = min(timings, key=lambda item: item[0])
    floor_us = (share * work.ffn_bytes + work.router_bytes) / bandwidth * 1e6
    return Measurement(
        workload=work.name,
        density=share,
        default_us=default_us,
        best_us=best_us,
        best_config=asdict(best),
        floor_us=floor_us,
        share_of_floor=floor_us / default_us,
        speedup=dense_us / default_us,
        error=error_against_float64(sparse_ffn_decode, layers[0]),
    )


def run(output: Path | None, quick: bool, repeats: int, console: Console) -> None:
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    device = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_GB_per_s": bandwidth / 1e9}
    console.print(device)
    report: dict[str, Any] = {"device": device, "dtype": str(DTYPE), "expert_size": EXPERT_SIZE, "workloads": []}
    for work in WORKLOADS:
        layers = [make_layer(work) for _ in range(work.layers)]
        baselines = dense_baselines(layers, repeats)
        rows = [
            measure(work, layers, density, bandwidth, min(baselines.values()), repeats, quick) for density in DENSITIES
        ]
        console.print(table(work, baselines, rows))
        report["workloads"].append({**asdict(work), "dense_us": baselines, "sparse": [asdict(row) for row in rows]})
        if output is not None:  # after each workload: a run that is cut off keeps what it measured
            write(output, report)


def table(work: Workload, baselines: dict[str, float], rows: list[Measurement]) -> Table:
    dense_text = ", ".join(f"{name} {us:.1f} us" for name, us in baselines.items())
    result = Table(title=f"{work.name} {work.width}x{work.neurons}, {work.layers} layers; dense: {dense_text}")
    for heading in ("density", "default us", "best us", "floor us", "floor share", "speed-up", "error", "best tiles"):
        result.add_column(heading, justify="right", no_wrap=heading != "best tiles")
    for row in rows:
        values = (row.default_us, row.best_us, row.floor_us)
        tiles = "/".join(str(value) for value in row.best_config.values())
        numbers = [f"{row.density:.3f}", *(f"{value:.1f}" for value in values)]
        result.add_row(*numbers, f"{row.share_of_floor:.0%}", f"{row.speedup:.2f}x", f"{row.error:.1e}", tiles)
    return result


def write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(partial, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="also write the figures here, as JSON")
    parser.add_argument("--quick", action="store_true", help="default tiles only")
    parser.add_argument("--repeats", type=int, default=15, help="graph replays a timing")
    options = parser.parse_args()
    console = Console(width=160)
    if not torch.cuda.is_available():
        console.print("benchmarks.decode needs an NVIDIA GPU that torch can see")
        return 1
    run(options.output, options.quick, options.repeats, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
