"""How long one FFN takes in ONNX Runtime on a CPU: as plain MatMul operators, and as lte::SparseFFN with our library.

    python -m benchmarks.ort_cpu

Both are sessions of one process with the same weights and threads, and take turns. A graph holds as many layers as make
its weights leave the caches between two uses, as in a decoder; times are per layer. Experts of 32 neurons, gated, SiLU;
router biases are inputs of the graph, which is how one session is measured at every density.
Shape suffixes: T tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from lte_compile.exporters import schema
from lte_compile.reports.environment import describe_environment
from lte_compile.serving.ort_library import ort_library_path

RESULTS = Path(__file__).parent / "results" / "ort_cpu.json"
EXPERT_SIZE = 32
DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
PERCENTILES = (20, 50, 80)
# Rounds in which dense and every density take turns, so that a disturbance of the machine meets all of them.
ROUNDS = 7
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Shape:
    name: str
    width: int
    neurons: int
    layers: int

    @property
    def experts(self) -> int:
        return self.neurons // EXPERT_SIZE


SMOLLM2 = Shape("SmolLM2-135M", 576, 1536, 30)
LLAMA = Shape("LLaMA-2-7B", 4096, 11008, 1)


@dataclass(frozen=True)
class Case:
    shape: Shape
    dtype: str
    tokens: int
    threads: int


# One token is decoding; 128 a prompt.
CASES = tuple(
    Case(shape, dtype, tokens, threads)
    for shape in (SMOLLM2, LLAMA)
    for dtype, tokens in (("float32", 1), ("float16", 1), ("float32", 128))
    for threads in (1, 2)
)


def make_weights(shape: Shape, dtype: str) -> Arrays:
    """Neuron-major weights and a router for every layer, rows of length about 1."""
    rng = np.random.default_rng(0)
    sizes = {"w_router": shape.experts, "w_up": shape.neurons, "w_gate": shape.neurons, "w_down": shape.neurons}
    return {
        f"{name}.{layer}": (rng.standard_normal((rows, shape.width), np.float32) / shape.width**0.5).astype(dtype)
        for layer in range(shape.layers)
        for name, rows in sizes.items()
    }


def dense_layer(layer: int) -> list[onnx.NodeProto]:
    def node(kind: str, inputs: Sequence[str], result: str) -> onnx.NodeProto:
        return helper.make_node(kind, [f"{name}.{layer}" if name != "x" else name for name in inputs], [result])

    return [
        node("MatMul", ["x", "w_gate"], f"gate.{layer}"),
        node("Sigmoid", ["gate"], f"gate_sigmoid.{layer}"),
        node("Mul", ["gate", "gate_sigmoid"], f"act.{layer}"),
        node("MatMul", ["x", "w_up"], f"up.{layer}"),
        node("Mul", ["act", "up"], f"hidden.{layer}"),
        node("MatMul", ["hidden", "w_down"], f"y.{layer}"),
    ]


def sparse_layer(layer: int) -> list[onnx.NodeProto]:
    given = ("w_router", "b_router", "w_up", "w_gate", "w_down")
    inputs = ["x", *(f"{name}.{layer}" if name in given else "" for name in schema.INPUT_NAMES[1:])]
    attributes = {"activation": "silu", "expert_size": EXPERT_SIZE, "gated": 1, "threshold": 0.5}
    return [helper.make_node(schema.OP_TYPE, inputs, [f"y.{layer}"], domain=schema.DOMAIN, **attributes)]


def make_model(case: Case, weights: Arrays, *, is_sparse: bool) -> bytes:
    """Every layer reads x; the graph's output is their sum."""
    shape, kind = case.shape, helper.np_dtype_to_tensor_dtype(np.dtype(case.dtype))
    layers = range(shape.layers)
    nodes = [node for layer in layers for node in (sparse_layer(layer) if is_sparse else dense_layer(layer))]
    nodes.append(helper.make_node("Sum", [f"y.{layer}" for layer in layers], ["y"]))
    inputs = [helper.make_tensor_value_info("x", kind, [case.tokens, shape.width])]
    if is_sparse:
        inputs += [helper.make_tensor_value_info(f"b_router.{layer}", kind, [shape.experts]) for layer in layers]
        stored = weights
    else:  # as a dense model has them: [D, F] up and gate, [F, D] down
        stored = {
            name: array if name.startswith("w_down") else np.ascontiguousarray(array.T)
            for name, array in weights.items()
            if not name.startswith("w_router")
        }
    outputs = [helper.make_tensor_value_info("y", kind, [case.tokens, shape.width])]
    initializers = [numpy_helper.from_array(array, name) for name, array in stored.items()]
    graph = helper.make_graph(nodes, "ffns", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(schema.DOMAIN, schema.VERSION)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return bytes(proto.SerializeToString())


def open_session(case: Case, weights: Arrays, *, is_sparse: bool) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = case.threads
    if is_sparse:
        options.register_custom_ops_library(str(ort_library_path()))
    model = make_model(case, weights, is_sparse=is_sparse)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def router_biases(case: Case, weights: Arrays, x_TD: NDArray[Any], density: float) -> Arrays:
    """One bias for all experts of a layer, at which this share of (token, expert) pairs is selected."""
    biases: Arrays = {}
    for layer in range(case.shape.layers):
        logits = np.sort((x_TD.astype(np.float32) @ weights[f"w_router.{layer}"].astype(np.float32).T).ravel())[::-1]
        selected = round(density * logits.size)
        bounded = np.array([logits[0] + 1, *logits, logits[-1] - 1])
        bias = -(bounded[selected] + bounded[selected + 1]) / 2
        biases[f"b_router.{layer}"] = np.full(case.shape.experts, bias, case.dtype)
    return biases


def measure(case: Case, densities: Sequence[float], seconds: float) -> dict[str, Any]:
    """Milliseconds per layer of the dense graph, and of the sparse one at each density."""
    weights = make_weights(case.shape, case.dtype)
    x_TD = np.random.default_rng(1).standard_normal((case.tokens, case.shape.width)).astype(case.dtype)
    dense, sparse = (open_session(case, weights, is_sparse=is_sparse) for is_sparse in (False, True))
    feeds = [{"x": x_TD}, *({"x": x_TD, **router_biases(case, weights, x_TD, density)} for density in densities)]
    runs = [(dense if index == 0 else sparse, feed) for index, feed in enumerate(feeds)]
    error = relative_error(sparse, dense, feeds) if densities[-1] == 1 else None
    of_dense, *of_sparse = (percentiles(times, case.shape.layers) for times in take_turns(runs, seconds))
    rows = [
        {"density": density, "ms": ms, "speedup": of_dense["p50"] / ms["p50"]}
        for density, ms in zip(densities, of_sparse, strict=True)
    ]
    return {**asdict(case), "dense_ms": of_dense, "sparse": rows, "relative_error_at_density_1": error}


def relative_error(sparse: Any, dense: Any, feeds: Sequence[Arrays]) -> float:
    """Of the sparse graph with every expert selected."""
    (got,), (wanted,) = sparse.run(None, feeds[-1]), dense.run(None, feeds[0])
    difference = got.astype(np.float64) - wanted.astype(np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(wanted.astype(np.float64)))


def take_turns(runs: Sequence[tuple[Any, Arrays]], seconds: float) -> list[list[float]]:
    """Milliseconds of every call of every run; the first call of a turn only warms up."""
    samples: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        for (session, feed), found in zip(runs, samples, strict=True):
            session.run(None, feed)
            end = perf_counter() + seconds / ROUNDS
            while not found or perf_counter() < end:
                start = perf_counter()
                session.run(None, feed)
                found.append((perf_counter() - start) * 1e3)
    return samples


def percentiles(times: Sequence[float], layers: int) -> dict[str, float]:
    hundredths = statistics.quantiles(times, n=100, method="inclusive") if len(times) > 1 else [times[0]] * 99
    return {f"p{p}": hundredths[p - 1] / layers for p in PERCENTILES}


def crossover(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The density from which on dense is faster, interpolated between the measured ones; None if it never is."""
    for below, above in itertools.pairwise(rows):
        if below["speedup"] >= 1 > above["speedup"]:
            share = (below["speedup"] - 1) / (below["speedup"] - above["speedup"])
            return float(below["density"] + share * (above["density"] - below["density"]))
    return None if rows[-1]["speedup"] >= 1 else float(rows[0]["density"])


def table(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Speed-ups over dense as Markdown, one row per case."""
    densities = [row["density"] for row in results[0]["sparse"]]
    headings = ("FFN", "type", "tokens", "threads", "dense ms", *(f"{density:g}" for density in densities), "equal at")
    yield f"| {' | '.join(headings)} |"
    yield "|" + "---|" * len(headings)
    for result in results:
        size = f"{result['shape']['width']} x {result['shape']['neurons']}"
        speedups = [f"{row['speedup']:.2f}" for row in result["sparse"]]
        equal = crossover(result["sparse"])
        cells = (size, result["dtype"], result["tokens"], result["threads"], f"{result['dense_ms']['p50']:.2f}")
        yield f"| {' | '.join(map(str, (*cells, *speedups)))} | {'never' if equal is None else f'{equal:.2f}'} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="measuring time of each graph at each density")
    parser.add_argument("--quick", action="store_true", help="three densities, a short time, no result file")
    parser.add_argument("--only", default="", help="only cases whose description contains this, as in 'tokens=1,'")
    arguments = parser.parse_args()
    cases = [case for case in CASES if arguments.only in str(case)]
    if not cases:
        parser.error(f"--only matches none of {', '.join(map(str, CASES))}")
    densities, seconds = ((0.1, 0.3, 1.0), 0.7) if arguments.quick else (DENSITIES, arguments.seconds)
    results = []
    for case in cases:
        results.append(measure(case, densities, seconds))
        sys.stderr.write(f"{case}: {[round(row['speedup'], 2) for row in results[-1]['sparse']]}\n")
    sys.stdout.write("\n".join(table(results)) + "\n")
    if not arguments.quick and not arguments.only:
        write({"environment": asdict(describe_environment()), "expert_size": EXPERT_SIZE, "results": results})


def write(record: Mapping[str, Any]) -> None:
    partial = RESULTS.with_suffix(".tmp")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(RESULTS)


if __name__ == "__main__":
    main()
