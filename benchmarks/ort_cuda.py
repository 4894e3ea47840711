"""lte::SparseFFN in ONNX Runtime on a GPU: FFNs against ONNX Runtime's MatMuls and the torch path, and a whole decoder.

    python -m benchmarks.ort_cuda [--output benchmarks/results/ort_cuda.json]

Needs onnxruntime-gpu and a library with CUDA kernels. FFNs: one CUDA graph over several distinct layers in rotation on
every side, timed by events on the stream that all share; weights are the same memory. benchmarks/ort_decoder.py has the
decoder, and benchmarks/ort_graph_decoder.py the same as one CUDA graph a token.
Shape suffixes: T tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from onnx import TensorProto, helper
from torch import Tensor

from benchmarks.decode import (
    DENSITIES,
    WORKLOADS,
    Workload,
    copy_bandwidth,
    make_layer,
    measured_density,
    set_density,
    write,
)
from benchmarks.ort_decoder import DTYPE, PROVIDER, export_decoders, measure_decoders, open_session
from benchmarks.ort_graph_decoder import measure_graphs
from lte_compile.exporters import schema
from lte_compile.kernels.lowering import lower_sparse_ffn
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall
from lte_compile.reports.environment import describe_environment

ELEMENT = {torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16}
TOKENS = (1, 8, 512)
REPEATS = 15
# A logit this close to its threshold is decided by rounding: kernels sum thousands of terms in orders of their own, and
# tensor cores round every partial sum of about 1 toward zero, which is off by some 1e-5 in the end.
MARGIN = 1e-4
# Cycles that the GPU waits before a timing, so that the host has put everything on the stream when it begins.
HEAD_START = 1_000_000
Layers = list[SparseFfnCall]


@dataclass(frozen=True)
class Row:
    workload: str
    tokens: int
    density: float  # measured
    floor_us: float  # bytes of active experts and router at the copy bandwidth; of one token
    library_us: float
    torch_us: float
    dense_us: float  # MatMuls in ONNX Runtime
    error: float  # of the library, relative to torch's result, of tokens that are clear of their thresholds
    unclear: int  # tokens, of all layers, that are not: rounding decides about one of their experts


def make_layers(work: Workload, tokens: int) -> Layers:
    """Float16, and biases of the routers too: an ONNX node has one type."""
    layers = []
    for layer in (make_layer(work) for _ in range(work.layers)):
        weights = type(layer.weights)._make(None if t is None else t.to(DTYPE) for t in layer.weights)
        x_TD = torch.randn(tokens, work.width, device="cuda", dtype=DTYPE)
        bias_E = torch.zeros(layer.router_ED.shape[0], device="cuda", dtype=DTYPE)
        layers.append(
            layer._replace(x_D=x_TD, router_ED=layer.router_ED.to(DTYPE), router_bias_E=bias_E, weights=weights)
        )
    return layers


def tensors(layer: SparseFfnCall) -> dict[str, Tensor]:
    """By the names of the node's inputs; neuron-major."""
    w = layer.weights
    found = {"x": layer.x_D, "w_router": layer.router_ED, "b_router": layer.router_bias_E, "w_up": w.up_FD}
    found |= {"w_gate": w.gate_FD, "w_down": w.down_DF.t(), "b_up": w.up_bias_F, "b_down": w.down_bias_D}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def sparse_nodes(layer: SparseFfnCall, number: int) -> list[Any]:
    given = tensors(layer)
    inputs = [f"{name}.{number}" if name in given else "" for name in schema.INPUT_NAMES]
    attributes = {
        "activation": layer.activation,
        "expert_size": layer.expert_size,
        "gated": int("w_gate" in given),
        "threshold": layer.tau,
    }
    return [helper.make_node(schema.OP_TYPE, inputs, [f"y.{number}"], domain=schema.DOMAIN, **attributes)]


def dense_nodes(layer: SparseFfnCall, number: int) -> list[Any]:
    """As a dense export has them: up and gate [D, F], down [F, D]."""

    def node(kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> Any:
        names = [f"{name}.{number}" for name in inputs]
        return helper.make_node(kind, names, [f"{output}.{number}"], **attributes)

    if layer.weights.gate_FD is not None:
        hidden = [node("MatMul", ["x", "w_gate"], "g"), node("Sigmoid", ["g"], "s"), node("Mul", ["g", "s"], "a")]
        hidden += [node("MatMul", ["x", "w_up"], "u"), node("Mul", ["a", "u"], "h")]
        return [*hidden, node("MatMul", ["h", "w_down"], "y")]
    hidden = [node("MatMul", ["x", "w_up"], "u"), node("Add", ["u", "b_up"], "v")]
    hidden.append(node("Gelu", ["v"], "h", approximate="tanh"))
    return [*hidden, node("MatMul", ["h", "w_down"], "m"), node("Add", ["m", "b_down"], "y")]


def dense_tensors(layer: SparseFfnCall) -> dict[str, Tensor]:
    given = {name: tensor for name, tensor in tensors(layer).items() if "router" not in name}
    return given | {name: given[name].t().contiguous() for name in ("w_up", "w_gate") if name in given}


@dataclass
class Bound:
    """A session whose tensors are all bound to memory of torch."""

    session: ort.InferenceSession
    binding: Any
    results: list[Tensor]
    kept: list[Tensor]

    def run(self) -> None:
        options = ort.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self.session.run_with_iobinding(self.binding, options)


def bind(layers: Layers, stream: torch.cuda.Stream, *, is_sparse: bool) -> Bound:
    """One graph of all layers. Weights are inputs: a file could not hold them."""
    element = ELEMENT[layers[0].x_D.dtype]
    given = [tensors(layer) if is_sparse else dense_tensors(layer) for layer in layers]
    make_nodes = sparse_nodes if is_sparse else dense_nodes
    nodes = [node for number, layer in enumerate(layers) for node in make_nodes(layer, number)]
    bound = {f"{name}.{number}": tensor for number, group in enumerate(given) for name, tensor in group.items()}
    results = [torch.empty_like(layer.x_D) for layer in layers]
    outputs = {f"y.{number}": result for number, result in enumerate(results)}

    def infos(values: dict[str, Tensor]) -> list[Any]:
        return [helper.make_tensor_value_info(name, element, list(value.shape)) for name, value in values.items()]

    graph = helper.make_graph(nodes, "ffns", infos(bound), infos(outputs))
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(schema.DOMAIN, schema.VERSION)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = open_session(model, user_compute_stream=str(stream.cuda_stream), enable_cuda_graph="1")
    binding = session.io_binding()
    for name, value in bound.items():
        binding.bind_input(name, "cuda", 0, np.float16, list(value.shape), value.data_ptr())
    for name, value in outputs.items():
        binding.bind_output(name, "cuda", 0, np.float16, list(value.shape), value.data_ptr())
    return Bound(session, binding, results, list(bound.values()))


def captured(layers: Layers, stream: torch.cuda.Stream) -> tuple[Callable[[], None], list[Tensor]]:
    """The torch path's CUDA graph over the layers, and what it writes."""
    with torch.cuda.stream(stream):
        for layer in layers[:2]:
            lower_sparse_ffn(layer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = [lower_sparse_ffn(layer) for layer in layers]
    return graph.replay, results


def time_us(run: Callable[[], None], layers: Layers, stream: torch.cuda.Stream) -> float:
    """Median microseconds a layer; every replay has new inputs."""
    times = []
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
        for _ in range(REPEATS):
            for layer in layers:
                layer.x_D.normal_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            torch.cuda._sleep(HEAD_START)  # type: ignore[no-untyped-call]
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(float(start.elapsed_time(end)) * 1e3 / len(layers))
    return median(times)


def measure(work: Workload, tokens: int, bandwidth: float) -> Iterator[Row]:
    layers, stream = make_layers(work, tokens), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    sparse, dense = (bind(layers, stream, is_sparse=is_sparse) for is_sparse in (True, False))
    replay, wanted = captured(layers, stream)
    dense_us = time_us(dense.run, layers, stream)
    for density in DENSITIES:
        set_density(layers, density)
        share = measured_density(layers)
        library_us, torch_us = (time_us(run, layers, stream) for run in (sparse.run, replay))
        with torch.cuda.stream(stream):
            sparse.run()
            replay()
        torch.cuda.synchronize()
        clear = [clear_tokens(layer) for layer in layers]
        yield Row(
            workload=work.name,
            tokens=tokens,
            density=share,
            floor_us=(share * work.ffn_bytes + work.router_bytes) / bandwidth * 1e6,
            library_us=library_us,
            torch_us=torch_us,
            dense_us=dense_us,
            error=max(
                relative_error(y_TD[clear_T], w_TD[clear_T])
                for y_TD, w_TD, clear_T in zip(sparse.results, wanted, clear, strict=True)
            ),
            unclear=sum(int((~clear_T).sum()) for clear_T in clear),
        )


def clear_tokens(layer: SparseFfnCall) -> Tensor:
    """Tokens [T] of which no score is so close to the threshold that rounding decides: the exact ones, in float64."""
    assert layer.router_bias_E is not None
    logits_TE = layer.x_D.double() @ layer.router_ED.double().t() + layer.router_bias_E.double()
    threshold = math.log(layer.tau / (1 - layer.tau))
    return ((logits_TE - threshold).abs() > MARGIN).all(1)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))


def measurements(
    names: Sequence[str], tokens: Sequence[int], bandwidth: float, folder: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where in the report each line belongs, and the line."""
    for work in (work for work in WORKLOADS if work.name in names):
        for count in tokens:
            yield from (("ffns", asdict(row)) for row in measure(work, count, bandwidth))
    if "decoder" in names:
        lines = chain(measure_decoders(folder), measure_graphs(folder))
        yield from (("decoder", line) for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="also write the figures here, as JSON")
    names = [*(work.name for work in WORKLOADS), "decoder"]
    parser.add_argument("--only", nargs="*", choices=names, default=names, help="what to measure; nothing: export only")
    parser.add_argument("--tokens", nargs="*", type=int, default=TOKENS, help="at once, of FFNs (default: 1 8 512)")
    parser.add_argument("--folder", type=Path, help="where the decoders' files stay, and are found again")
    arguments = parser.parse_args()
    if PROVIDER not in ort.get_available_providers():
        sys.stderr.write("benchmarks.ort_cuda needs onnxruntime-gpu\n")
        return 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if not arguments.only:
            export_decoders(folder)
        else:
            report_on(arguments.only, arguments.tokens, folder, arguments.output)
    return 0


def report_on(names: Sequence[str], tokens: Sequence[int], folder: Path, output: Path | None) -> None:
    bandwidth = copy_bandwidth()
    report: dict[str, Any] = {"environment": asdict(describe_environment()), "onnxruntime": ort.__version__}
    report |= {"gpu": torch.cuda.get_device_name(), "copy_GB_per_s": bandwidth / 1e9, "ffns": [], "decoder": []}
    for place, line in measurements(names, tokens, bandwidth, folder):
        report[place].append(line)
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
        if output is not None:  # each time: a run that is cut off keeps what it measured
            write(output, report)


if __name__ == "__main__":
    sys.exit(main())
