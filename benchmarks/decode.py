"""One-token decode of a sparse FFN on a GPU, against dense layers, published peers and the memory's limit.

    python -m benchmarks.decode [--output benchmarks/results/decode.json] [--workloads LLaMA-2-7B]

CUDA graphs over distinct layers in rotation, so that weights come from memory and not from L2; new inputs before every
replay; all ways of one row take turns (benchmarks.replays). `sparse` is what the lowering table chooses. Each layer's
router bias is set for the density, and the table says the one really met. The floor is the bytes that must be read
(active experts and router) over the copy bandwidth measured in the same run. A plot is drawn beside the output. What
the output holds of other workloads is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import torch.nn.functional as F
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import decode_peers
from benchmarks.replays import Captured, Run, Timing, capture, race
from lte_compile.kernels.ffn import FfnWeights
from lte_compile.kernels.layout import neuron_major
from lte_compile.kernels.lowering import choose, describe, lower_sparse_ffn
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall, active_experts, sparse_ffn_reference
from lte_compile.kernels.triton_decode import is_large, sparse_ffn_decode, sparse_ffn_two_launches

EXPERT_SIZE = 32  # the paper's
DENSITIES = (1.0, 0.5, 0.3, 0.2, 0.1, 0.05)
# Time over floor that the large layers are to reach.
GOALS = {0.5: 1.10, 0.3: 1.17, 0.2: 1.30, 0.1: 1.55}
L2_BYTES = 64 * 2**20  # more than any current GPU's L2: the layers in rotation must exceed it together
MIN_LAYERS = 24  # as a decoder has; a graph of few layers would count much of its own start
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
    Workload("Llama-3-8B", 4096, 14336, "silu", True, False),
    Workload("SmolLM2-135M", 576, 1536, "silu", True, False),
    Workload("GPT-2", 768, 3072, "gelu_tanh", False, True),
)


@dataclass
class Row:
    workload: str
    target: float  # density aimed at
    density: float  # measured
    chosen: str  # kernel
    floor_us: float
    times: dict[str, Timing]
    errors: dict[str, float] = field(default_factory=dict)  # relative to float64

    @property
    def over_floor(self) -> float:
        return self.times[SPARSE].us / self.floor_us

    @property
    def speedup(self) -> float:
        return min(self.times[name].us for name in DENSE) / self.times[SPARSE].us


DENSE = ("F.linear", "torch.compile")
SPARSE = "sparse"


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


def elapsed_seconds(work: Any) -> float:
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


def dense_baselines(layers: list[SparseFfnCall]) -> dict[str, Captured]:
    plain = [row_major_down(layer) for layer in layers]
    compiled = torch.compile(dense, mode="max-autotune-no-cudagraphs", dynamic=False)
    return {"F.linear": capture(dense, plain), "torch.compile": capture(compiled, plain)}


def copy_bandwidth() -> float:
    """Bytes per second, read and write counted."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = [elapsed_seconds(lambda: target.copy_(source)) for _ in range(20)]
    return 2 * source.nbytes / median(times[5:])


def clocks() -> str:
    """What nvidia-smi says of the device's clocks and power right now, or why it says nothing."""
    if shutil.which("nvidia-smi") is None:
        return "nvidia-smi is not installed"
    fields = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu,driver_version"
    index = str(torch.cuda.get_device_properties(0).uuid)
    command = ["nvidia-smi", f"--id=GPU-{index}", f"--query-gpu={fields}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{fields}: {done.stdout.strip() or done.stderr.strip()}"


def device_facts() -> dict[str, Any]:
    bandwidth = copy_bandwidth()
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "clocks": clocks(),  # right after a copy
        "copy_GB_per_s": bandwidth / 1e9,
    }


def error_against_float64(run: Run, layer: SparseFfnCall, exact: Run | None = None) -> float:
    expected = sparse_ffn_reference(in_float64(layer)) if exact is None else exact(layer)
    difference = run(layer).double() - expected
    return float(difference.norm() / expected.norm().clamp_min(1e-30))


def in_float64(layer: SparseFfnCall) -> SparseFfnCall:
    wide = FfnWeights._make(None if t is None else t.double() for t in layer.weights)
    bias = None if layer.router_bias_E is None else layer.router_bias_E.double()
    return layer._replace(x_D=layer.x_D.double(), router_ED=layer.router_ED.double(), router_bias_E=bias, weights=wide)


@dataclass
class Contest:
    """The graphs of one workload; `peers` name a way to run a layer, its layers and what it computes in float64."""

    work: Workload
    layers: list[SparseFfnCall]
    peers: dict[str, tuple[Run, list[SparseFfnCall], Run | None]]
    graphs: dict[str, Captured]


def prepare(work: Workload) -> Contest:
    layers = [make_layer(work) for _ in range(work.layers)]
    peers = peers_of(layers) if work.gated else {}
    graphs = dense_baselines(layers)
    if is_large(layers[0]):
        graphs["three launches"] = capture(sparse_ffn_decode, layers)
        graphs["two launches"] = capture(sparse_ffn_two_launches, layers)
    graphs |= {name: capture(run, own) for name, (run, own, _) in peers.items()}
    return Contest(work, layers, peers, graphs)


def peers_of(layers: list[SparseFfnCall]) -> dict[str, tuple[Run, list[SparseFfnCall], Run | None]]:
    columns = [decode_peers.column_major(layer) for layer in layers]
    rows = [decode_peers.with_thresholds(layer) for layer in layers]
    return {
        "TEAL": (decode_peers.teal, columns, decode_peers.teal_exact),
        "CATS": (decode_peers.cats, rows, decode_peers.cats_exact),
        "Deja Vu": (decode_peers.deja_vu, rows, None),
    }


def measure(contest: Contest, density: float, bandwidth: float, repeats: int) -> Row:
    work, layers = contest.work, contest.layers
    set_density(layers, density)
    for name in ("TEAL", "CATS"):
        if name in contest.peers:
            decode_peers.set_thresholds(contest.peers[name][1], density)
    met: list[float] = []

    def draw() -> None:
        redraw(layers)
        met.append(measured_density(layers))

    told = [layer._replace(density=density) for layer in layers]
    graphs = {SPARSE: capture(lower_sparse_ffn, told), **contest.graphs}
    times = race(graphs, len(layers), repeats, draw)
    share = fmean(met)
    runs = {SPARSE: (lower_sparse_ffn, told, None), **contest.peers}
    return Row(
        workload=work.name,
        target=density,
        density=share,
        chosen=choose(describe(told[0])).lowering.name,
        floor_us=(share * work.ffn_bytes + work.router_bytes) / bandwidth * 1e6,
        times=times,
        errors={name: error_against_float64(run, own[0], exact) for name, (run, own, exact) in runs.items()},
    )


def table(work: Workload, rows: list[Row]) -> Table:
    result = Table(title=f"{work.name} {work.width}x{work.neurons}, {work.layers} layers, microseconds a layer")
    names = list(rows[0].times)
    for heading in ("density", "kernel", "floor", *names, "p20-p80", "over floor", "goal", "speed-up", "error"):
        result.add_column(heading, justify="right")
    for row in rows:
        sparse = row.times[SPARSE]
        goal = GOALS.get(row.target) if work.width >= 4096 else None
        cells = [
            f"{row.density:.3f}",
            row.chosen.removeprefix("triton-"),
            f"{row.floor_us:.1f}",
            *(f"{row.times[name].us:.1f}" for name in names),
        ]
        cells += [f"{sparse.p20:.1f}-{sparse.p80:.1f}", f"{row.over_floor:.2f}", "" if goal is None else f"{goal:.2f}"]
        result.add_row(*cells, f"{row.speedup:.2f}x", f"{row.errors[SPARSE]:.1e}")
    return result


def plot(entries: list[dict[str, Any]], path: Path) -> None:
    """Microseconds a layer over density: one panel a workload."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(entries), 3.6), layout="constrained")
    for axes, entry in zip(figure.subplots(1, len(entries), squeeze=False)[0], entries, strict=True):
        rows = entry["rows"]
        density = [row["density"] for row in rows]
        for name in rows[0]["times"]:
            times = [row["times"][name]["us"] for row in rows]
            axes.plot(density, times, marker=".", lw=2 if name == SPARSE else 1, label=name)
        axes.plot(density, [row["floor_us"] for row in rows], "k:", label="bytes at copy bandwidth")
        axes.set(title=entry["name"], xlabel="share of active experts", ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("microseconds a layer")
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def earlier_entries(path: Path | None, names: list[str]) -> list[dict[str, Any]]:
    """What a report holds of other workloads than `names`, each with the device that it was measured on."""
    if path is None or not path.exists():
        return []
    report = json.loads(path.read_text())
    return [{"device": report["device"], **entry} for entry in report["workloads"] if entry["name"] not in names]


def write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(path.name + ".part")
    partial_path.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(partial_path, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="also write the figures here, as JSON, and a plot beside it")
    parser.add_argument("--repeats", type=int, default=25, help="graph replays a timing")
    names = [work.name for work in WORKLOADS]
    parser.add_argument("--workloads", nargs="+", default=names, choices=names)
    options = parser.parse_args()
    console = Console(width=180)
    if not torch.cuda.is_available():
        console.print("benchmarks.decode needs an NVIDIA GPU that torch can see")
        return 1
    torch.manual_seed(0)
    device = device_facts()
    console.print(device)
    entries = earlier_entries(options.output, options.workloads)
    report = {"device": device, "dtype": str(DTYPE), "expert_size": EXPERT_SIZE, "workloads": entries}
    for work in (work for work in WORKLOADS if work.name in options.workloads):
        contest = prepare(work)
        rows = [measure(contest, density, device["copy_GB_per_s"] * 1e9, options.repeats) for density in DENSITIES]
        del contest
        torch.cuda.empty_cache()
        console.print(table(work, rows))
        figures = [{**asdict(row), "over_floor": row.over_floor, "speedup": row.speedup} for row in rows]
        entries.append({"device": device, **asdict(work), "rows": figures})
        if options.output is not None:  # after each workload: a run that is cut off keeps what it measured
            write(options.output, report)
            plot(entries, options.output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
