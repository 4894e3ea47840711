"""lte-compile bench: latency of one FFN for one token, dense against lte::sparse_ffn."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from rich.table import Table

from lte_compile.bench import LAYERS, FfnLatency, FfnShape, bench_ffn, kernel_choice
from lte_compile.checkpoints.loading import load_model
from lte_compile.cli.converting import pick_dtype
from lte_compile.cli.output import Outcome
from lte_compile.cli.preparing import find_model, pick_device
from lte_compile.inspection.sites import inspect, require_sites
from lte_compile.training.progress import TrainingProgress

# Copies of a large model's layers would not fit into memory, and beyond this no cache holds any of them anyway.
MAX_BENCH_BYTES = 1 << 30
_SHAPE = re.compile(r"(\d+)x(\d+)")


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """`subject` is a model or a shape such as 576x1536; `gated`, `activation` and `biases` are for shapes."""

    subject: str
    densities: Sequence[float]
    gated: bool
    activation: str
    biases: bool
    expert_size: int
    dtype: str
    threads: int | None
    seconds: float
    device: str


def bench(settings: BenchSettings) -> Outcome:
    """Measure, and say which kernel ran and why."""
    if settings.seconds <= 0:
        raise ValueError(f"--seconds must be positive; got {settings.seconds:g}")
    if settings.threads is not None and settings.threads < 1:
        raise ValueError(f"--threads must be at least 1; got {settings.threads}")
    dtype = pick_dtype(settings.dtype) or torch.float32
    device = pick_device(settings.device).type
    with TrainingProgress() as progress:
        shape, layers = _shape_of(settings, progress)
        layers = min(layers, _most_layers(shape, dtype))
        with progress.working(f"timing {shape.width}x{shape.hidden}, {layers} layers in turns"):
            rows = bench_ffn(
                **asdict(shape),
                densities=settings.densities,
                dtype=dtype,
                threads=settings.threads,
                seconds=settings.seconds,
                layers=layers,
                device=device,
            )
        choice = str(kernel_choice(shape, dtype, device))
    threads = settings.threads or torch.get_num_threads()
    document = {
        "subject": settings.subject,
        "shape": asdict(shape),
        "layers": layers,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "threads": threads,
        "kernel": choice,
        "rows": [row.to_dict() for row in rows],
    }
    return Outcome(document, [_table(shape, rows, f"{device}, {threads} threads, {layers} layers in turns"), choice])


def given_shape(settings: BenchSettings) -> FfnShape | None:
    """The FFN that a subject such as 576x1536 describes; None for a model."""
    match = _SHAPE.fullmatch(settings.subject)
    if match is None:
        return None
    width, hidden = map(int, match.groups())
    return FfnShape(
        width=width,
        hidden=hidden,
        gated=settings.gated,
        activation=settings.activation,
        biases=settings.biases,
        expert_size=settings.expert_size,
    )


def _shape_of(settings: BenchSettings, progress: TrainingProgress) -> tuple[FfnShape, int]:
    """The FFN to time, and how many layers of it there are."""
    if (given := given_shape(settings)) is not None:
        return given, LAYERS
    path = find_model(settings.subject, progress)
    with progress.working("tracing"):
        sites = require_sites(inspect(load_model(path)))
    shapes = Counter(
        FfnShape(
            width=site.width,
            hidden=site.hidden,
            gated=site.gated,
            activation=site.activation,
            biases=site.down_bias is not None,
            expert_size=settings.expert_size,
        )
        for site in sites
    )
    shape, count = shapes.most_common(1)[0]
    if len(shapes) > 1:
        progress.say(f"{len(shapes)} different FFNs; timing the most frequent ({count} of {len(sites)})")
    return shape, max(count, LAYERS)


def _most_layers(shape: FfnShape, dtype: torch.dtype) -> int:
    matrices = 4 if shape.gated else 3  # the down-projection is there twice: as nn.Linear has it, and neuron-major
    return max(MAX_BENCH_BYTES // (matrices * shape.width * shape.hidden * dtype.itemsize), 1)


def _table(shape: FfnShape, rows: Sequence[FfnLatency], setting: str) -> Table:
    kind = "gated" if shape.gated else "plain"
    title = f"FFN {shape.width}x{shape.hidden}, {kind} {shape.activation}, experts of {shape.expert_size}, one token"
    table = Table(
        "Density", "Dense, us", "p20 - p80", "Sparse, us", "p20 - p80", "Speed-up", title=title, caption=setting
    )
    for row in rows:
        table.add_row(
            f"{100 * row.density:.1f} %",
            f"{row.dense_us:.1f}",
            f"{row.dense_p20_us:.1f} - {row.dense_p80_us:.1f}",
            f"{row.sparse_us:.1f}",
            f"{row.sparse_p20_us:.1f} - {row.sparse_p80_us:.1f}",
            f"{row.speedup:.2f}x",
        )
    return table
