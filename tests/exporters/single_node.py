"""Models of one `SparseFFN` node whose tensors are all inputs of the graph, so that one session takes any shapes.

Shape suffixes: T tokens (any leading axes), D model width, F neurons, E experts, C columns that the router reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper

from lte_compile.exporters import schema
from lte_compile.exporters.function import Variant, sparse_ffn_function
from tests.exporters.test_function import REFERENCE, sigmoid

Array = NDArray[Any]
NODE = "layers.0.mlp"
DTYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A node's attributes and sizes, and which optional inputs it has."""

    dtype: str = "fp32"
    activation: str = "silu"
    width: int = 6
    neurons: int = 14
    expert_size: int = 4
    gated: bool = True
    biases: tuple[str, ...] = ("b_router", "b_up", "b_gate", "b_down")
    threshold: float = 0.5
    router_width: int | None = None  # of an input of the router's own; None where it reads x
    attributes: Mapping[str, Any] = field(default_factory=dict, hash=False)  # instead of what the fields above say

    @property
    def experts(self) -> int:
        return -(-self.neurons // self.expert_size)

    @property
    def given(self) -> tuple[str, ...]:
        """The inputs that the node has, in their order."""
        biases = {name for name in self.biases if self.gated or name != "b_gate"}
        optional = biases | ({"w_gate"} if self.gated else set()) | ({"x_router"} if self.router_width else set())
        return tuple(name for name, _, required in schema.INPUTS if required or name in optional)

    def arrays(self, *tokens: int, seed: int = 0) -> dict[str, Array]:
        """Random inputs; values that bfloat16 has exactly, so that a reference in float64 starts from the same."""
        rng = np.random.default_rng(seed)
        sizes = {"D": self.width, "E": self.experts, "F": self.neurons}
        shapes = {
            name: tuple(sizes[axis] for axis in shape.strip("[]").split(", "))
            for name, shape, _ in schema.INPUTS
            if name in self.given and name not in ("x", "x_router")
        }
        if self.router_width:
            shapes |= {"w_router": (self.experts, self.router_width), "x_router": (*tokens, self.router_width)}
        scale = 0.5 * (6 / max(self.width, 6)) ** 0.5
        drawn = {name: rng.standard_normal(shape) * scale for name, shape in shapes.items()}
        drawn["x"] = rng.standard_normal((*tokens, self.width))
        return {name: exact_in_bfloat16(array) for name, array in drawn.items()}


def exact_in_bfloat16(array: Array) -> Array:
    """float32 with the lower half of every value cut off."""
    return (array.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32).reshape(array.shape)


def make_model(case: Case, *, with_function: bool = False) -> bytes:
    """float32 inputs and output for bfloat16 too, which numpy does not have: cast inside the graph."""
    is_cast = case.dtype == "bf16"
    outer, inner = DTYPES["fp32" if is_cast else case.dtype], DTYPES[case.dtype]
    names = {name: f"{name}_cast" if is_cast else name for name in case.given}
    attributes = {
        "activation": case.activation,
        "expert_size": case.expert_size,
        "gated": int(case.gated),
        "threshold": case.threshold,
        **case.attributes,
    }
    kept = {name: value for name, value in attributes.items() if value is not None}
    node = helper.make_node(
        schema.OP_TYPE,
        [names.get(name, "") for name in schema.INPUT_NAMES],
        ["y_cast" if is_cast else "y"],
        name=NODE,
        domain=schema.DOMAIN,
        **kept,
    )
    nodes = [node]
    if is_cast:
        nodes = [helper.make_node("Cast", [name], [names[name]], to=inner) for name in names] + nodes
        nodes.append(helper.make_node("Cast", ["y_cast"], ["y"], to=outer))
    inputs = [helper.make_tensor_value_info(name, outer, None) for name in case.given]
    graph = helper.make_graph(nodes, "one_node", inputs, [helper.make_tensor_value_info("y", outer, None)])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(schema.DOMAIN, schema.VERSION)]
    functions = [_function(case)] if with_function else []
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)
    return bytes(proto.SerializeToString())


def _function(case: Case) -> onnx.FunctionProto:
    biases = tuple(name for name in case.given if name.startswith("b_"))
    is_ragged = case.neurons % case.expert_size != 0
    kind = Variant(
        activation=case.activation,
        gated=case.gated,
        biases=biases,
        ragged=is_ragged,
        router_input=case.router_width is not None,
    )
    return sparse_ffn_function(kind, opset=20)


def open_model(model: bytes, library: str | None = None, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors reach the test as exceptions
    if library is not None:
        options.register_custom_ops_library(library)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(session: ort.InferenceSession, arrays: Mapping[str, Array], dtype: str = "fp32") -> Array:
    kind = np.float16 if dtype == "fp16" else np.float32
    feed = {name: np.asarray(array, kind) for name, array in arrays.items()}
    return np.asarray(session.run(None, feed)[0])


def reference(case: Case, arrays: Mapping[str, Array]) -> Array:
    """The formula in schema.py, in float64; neurons that are not selected count nothing, whatever their value."""
    w = {name: array.astype(np.float64) for name, array in arrays.items()}
    scores = sigmoid(w.get("x_router", w["x"]) @ w["w_router"].T + w.get("b_router", 0.0))
    owner_F = np.arange(case.neurons) // case.expert_size
    neuron_selected = (scores > case.threshold)[..., owner_F]
    hidden = w["x"] @ w["w_up"].T + w.get("b_up", 0.0)
    if case.gated:
        hidden = REFERENCE[case.activation](w["x"] @ w["w_gate"].T + w.get("b_gate", 0.0)) * hidden
    else:
        hidden = REFERENCE[case.activation](hidden)
    return np.asarray(np.where(neuron_selected, hidden, 0.0) @ w["w_down"] + w.get("b_down", 0.0))
