"""How long one FFN takes, dense and sparse, for one token.

A model walks through its layers, so a layer's weights have left the faster caches by the time they are needed again.
The timed FFNs therefore take turns over several layers of their own weights; timing a single layer again and again
would flatter both sides, and the dense one more. Selected experts are scattered, as a trained router scatters them.
Shape suffixes: D model width, F neurons, E experts, S neurons per expert.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import lte_compile.kernels.ops  # noqa: F401  (registers the ops)
from lte_compile.kernels.activations import find_activation
from lte_compile.kernels.experts import count_experts
from lte_compile.kernels.ffn import FfnWeights
from lte_compile.kernels.layout import neuron_major
from lte_compile.kernels.lowering import Choice, choose, describe
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall

# MiniLM's depth, the shallowest model measured here: 28 MB of weights in float32, far beyond any L2 cache.
LAYERS = 6
# Rounds in which dense and all densities take turns, so that a disturbance of the machine meets all of them.
ROUNDS = 5
PERCENTILES = (20, 50, 80)


@dataclass(frozen=True, kw_only=True)
class FfnShape:
    """What one FFN is like; `width` is D, `hidden` F."""

    width: int
    hidden: int
    gated: bool
    activation: str
    biases: bool
    expert_size: int

    def __post_init__(self) -> None:
        find_activation(self.activation)
        for name in ("width", "hidden", "expert_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.expert_size > self.hidden:
            raise ValueError(f"an expert of {self.expert_size} neurons does not fit an FFN of {self.hidden}")

    @property
    def num_experts(self) -> int:
        return count_experts(self.hidden, self.expert_size)


@dataclass(frozen=True, kw_only=True)
class FfnLatency:
    """Microseconds of one FFN for one token at one density: medians, and the 20th and 80th percentiles.

    `density` is the measured share of active neurons, router time is part of the sparse figures, and `kernel` is what
    served lte::sparse_ffn.
    """

    density: float
    dense_us: float
    dense_p20_us: float
    dense_p80_us: float
    sparse_us: float
    sparse_p20_us: float
    sparse_p80_us: float
    kernel: str

    @property
    def speedup(self) -> float:
        return self.dense_us / self.sparse_us

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "speedup": self.speedup}


class _Layer(NamedTuple):
    """One layer's input, router and weights; `dense_down_DF` is laid out as nn.Linear has it."""

    x_D: Tensor
    router_ED: Tensor
    weights: FfnWeights
    dense_down_DF: Tensor


def bench_ffn(
    width: int,
    hidden: int,
    *,
    gated: bool,
    activation: str,
    biases: bool,
    expert_size: int,
    densities: Sequence[float],
    dtype: torch.dtype = torch.float32,
    threads: int | None = None,
    seconds: float = 0.3,
    layers: int = LAYERS,
    device: str = "cpu",
) -> list[FfnLatency]:
    """Time a dense FFN and lte::sparse_ffn at each density, for one token and random weights.

    Args:
        densities: shares of experts to select, in [0, 1]; rounded to whole experts.
        threads: of torch's CPU operators during the measurement; None leaves them as they are.
        seconds: for the dense FFN and for each density.
        layers: how many layers of weights take turns.
        device: on "cuda", calls run back to back inside a CUDA graph, as decoding does, and launches are not counted.

    Raises:
        ValueError: a density outside [0, 1], an unknown activation, or sizes that do not fit.
    """
    shape = FfnShape(
        width=width, hidden=hidden, gated=gated, activation=activation, biases=biases, expert_size=expert_size
    )
    for density in densities:
        if not 0.0 <= density <= 1.0:
            raise ValueError(f"a density is a share of experts between 0 and 1; got {density!r}")
    stack = [_random_layer(shape, dtype, device, seed) for seed in range(max(layers, 1))]
    calls = [_dense_calls(stack, activation), *(_sparse_calls(stack, shape, density) for density in densities)]
    with torch.inference_mode(), _threads(threads):
        samples = _sample_in_turns(calls, seconds, device)
    dense = _percentiles(samples[0])
    kernel = kernel_choice(shape, dtype, device).lowering.name
    return [
        _latency(shape, density, dense, _percentiles(sparse), kernel)
        for density, sparse in zip(densities, samples[1:], strict=True)
    ]


def kernel_choice(
    shape: FfnShape,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    tokens: int = 1,
    density: float | None = None,
) -> Choice:
    """Which kernel serves lte::sparse_ffn, and why the others do not; `str()` explains it. The device may be absent."""
    with FakeTensorMode():
        layer = _random_layer(shape, dtype, "cpu", seed=0)
    call = SparseFfnCall(
        layer.x_D, layer.router_ED, None, layer.weights, shape.activation, shape.expert_size, 0.5, None
    )
    return choose(describe(call)._replace(device=device, tokens=tokens, density=density))


def _random_layer(shape: FfnShape, dtype: torch.dtype, device: str, seed: int) -> _Layer:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        # Columns of length about 1, so that activations stay clear of denormals and infinities.
        values: Tensor = torch.randn(*size, generator=generator) / size[-1] ** 0.5
        return values.to(device, dtype)

    d, f = shape.width, shape.hidden
    bias_F, bias_D = (draw(f), draw(d)) if shape.biases else (None, None)
    down_DF = draw(d, f)
    gate_FD, gate_bias_F = (draw(f, d), bias_F) if shape.gated else (None, None)
    weights = FfnWeights(draw(f, d), gate_FD, neuron_major(down_DF), bias_F, gate_bias_F, bias_D)
    x_D = torch.randn(1, d, generator=generator).to(device, dtype)
    return _Layer(x_D, draw(shape.num_experts, d), weights, down_DF)


Call = Callable[[], Tensor]


def _dense_calls(stack: Sequence[_Layer], activation: str) -> list[Call]:
    act = find_activation(activation).apply

    def call(layer: _Layer) -> Tensor:
        up, gate, _, up_bias, gate_bias, down_bias = layer.weights
        up_F = F.linear(layer.x_D, up, up_bias)
        hidden_F = act(up_F) if gate is None else act(F.linear(layer.x_D, gate, gate_bias)) * up_F
        y_D: Tensor = F.linear(hidden_F, layer.dense_down_DF, down_bias)
        return y_D

    return [lambda layer=layer: call(layer) for layer in stack]  # type: ignore[misc]  # mypy: lambda's default


def _sparse_calls(stack: Sequence[_Layer], shape: FfnShape, density: float) -> list[Call]:
    count = round(density * shape.num_experts)

    def call(layer: _Layer, tau: float) -> Tensor:
        up, gate, down, up_bias, gate_bias, down_bias = layer.weights
        result: Tensor = torch.ops.lte.sparse_ffn(
            layer.x_D, layer.router_ED, None, up, gate, down, up_bias, gate_bias, down_bias,
            shape.activation, shape.expert_size, tau,
        )  # fmt: skip
        return result

    taus = [_threshold_selecting(layer, count) for layer in stack]
    return [lambda layer=layer, tau=tau: call(layer, tau) for layer, tau in zip(stack, taus, strict=True)]  # type: ignore[misc]


def _threshold_selecting(layer: _Layer, count: int) -> float:
    """A tau that exactly `count` of the layer's scores exceed."""
    scores_E = torch.ops.lte.route(layer.x_D, layer.router_ED, None).flatten().double().sort(descending=True).values
    bounded: list[float] = [1.0, *scores_E.tolist(), 0.0]
    return (bounded[count] + bounded[count + 1]) / 2


def _latency(
    shape: FfnShape, density: float, dense: Sequence[float], sparse: Sequence[float], kernel: str
) -> FfnLatency:
    return FfnLatency(
        density=round(density * shape.num_experts) / shape.num_experts,
        dense_us=dense[1],
        dense_p20_us=dense[0],
        dense_p80_us=dense[2],
        sparse_us=sparse[1],
        sparse_p20_us=sparse[0],
        sparse_p80_us=sparse[2],
        kernel=kernel,
    )


def _sample_in_turns(calls: Sequence[Sequence[Call]], seconds: float, device: str) -> list[list[float]]:
    """Microseconds per call, for each entry of `calls`."""
    sample = _cpu_samples if device == "cpu" else _cuda_samples
    samples: list[list[float]] = [[] for _ in calls]
    for of_layers in calls:
        _run_all(of_layers)
    for _ in range(ROUNDS):
        for of_layers, found in zip(calls, samples, strict=True):
            found += sample(of_layers, seconds / ROUNDS)
    return samples


def _run_all(of_layers: Sequence[Call]) -> None:
    for call in of_layers:
        call()


def _cpu_samples(of_layers: Sequence[Call], seconds: float) -> list[float]:
    _run_all(of_layers)  # what ran before has taken the caches
    samples: list[float] = []
    end = perf_counter() + seconds
    while not samples or perf_counter() < end:
        for call in of_layers:
            start = perf_counter()
            call()
            samples.append((perf_counter() - start) * 1e6)
    return samples


def _cuda_samples(of_layers: Sequence[Call], seconds: float) -> list[float]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _run_all(of_layers)
    graph.replay()
    samples: list[float] = []
    end = perf_counter() + seconds
    while not samples or perf_counter() < end:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        samples.append(start.elapsed_time(stop) * 1e3 / len(of_layers))
    return samples


def _percentiles(samples: Sequence[float]) -> tuple[float, ...]:
    if len(samples) < 2:
        return (samples[0],) * len(PERCENTILES)
    hundredths = statistics.quantiles(samples, n=100, method="inclusive")
    return tuple(hundredths[percentile - 1] for percentile in PERCENTILES)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
