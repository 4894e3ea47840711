"""Timings of CUDA graphs that take turns, so that a clock that drifts with heat drifts for all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import torch
from torch import Tensor

from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall

Run = Callable[[SparseFfnCall], Tensor]
WARM_UP_ROUNDS = 2


@dataclass(frozen=True)
class Timing:
    """Microseconds a layer."""

    us: float  # median
    p20: float
    p80: float


@dataclass(frozen=True)
class Captured:
    """A graph that runs every layer once. It reads the layers' memory, so it keeps them."""

    graph: torch.cuda.CUDAGraph
    layers: tuple[SparseFfnCall, ...]


def capture(run: Run, layers: Sequence[SparseFfnCall]) -> Captured:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, which capturing does not allow
        run(layers[0])
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            run(layer)
    return Captured(graph, tuple(layers))


def race(graphs: Mapping[str, Captured], layers: int, repeats: int, redraw: Callable[[], None]) -> dict[str, Timing]:
    """Each graph once a round, after new inputs; graphs that read the same inputs may share them."""
    return {name: timing(values) for name, values in rounds(graphs, layers, repeats, redraw).items()}


def rounds(
    graphs: Mapping[str, Captured], layers: int, repeats: int, redraw: Callable[[], None]
) -> dict[str, list[float]]:
    """Microseconds a layer, of each graph in every round but the first ones."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for round_ in range(WARM_UP_ROUNDS + repeats):
        for name, captured in graphs.items():
            redraw()
            events[0].record()
            captured.graph.replay()
            events[1].record()
            events[1].synchronize()
            if round_ >= WARM_UP_ROUNDS:
                times[name].append(events[0].elapsed_time(events[1]) * 1e3 / layers)
    return times


def paired_ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Median over rounds of one graph's time over another's: what drifts from round to round is in both."""
    return median(one / other for one, other in zip(times, others, strict=True))


def timing(values: Sequence[float]) -> Timing:
    fifths = quantiles(values, n=5, method="inclusive") if len(values) > 1 else [values[0]] * 4
    return Timing(median(values), fifths[0], fifths[3])
