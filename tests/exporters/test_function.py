"""The portable body of lte::SparseFFN, run by plain ONNX Runtime, against numpy in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx.checker
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import helper

from lte_compile.exporters import schema
from lte_compile.exporters.function import ACTIVATION_BODIES, Variant, sparse_ffn_function
from lte_compile.kernels.activations import ACTIVATIONS

WIDTH, EXPERT_SIZE, THRESHOLD = 6, 4, 0.5
Array = NDArray[Any]
Arrays = Mapping[str, Array]
erf = np.vectorize(math.erf, otypes=[np.float64])


def sigmoid(x: Array) -> Any:
    return 1.0 / (1.0 + np.exp(-x))


def gelu_tanh(x: Array) -> Any:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


REFERENCE: dict[str, Callable[[Array], Any]] = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2))),
    "gelu_tanh": gelu_tanh,
    "silu": lambda x: x * sigmoid(x),
    "quick_gelu": lambda x: x * sigmoid(1.702 * x),
    "relu_squared": lambda x: np.maximum(x, 0) ** 2,
    "sigmoid": sigmoid,
    "tanh": np.tanh,
    "identity": lambda x: x,
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "elu": lambda x: np.where(x > 0, x, np.expm1(x)),
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
}


def weights(*, gated: bool, biased: bool, neurons: int, dtype: type = np.float32, router_bias: float = 0.0) -> Arrays:
    rng = np.random.default_rng(0)
    experts = -(-neurons // EXPERT_SIZE)
    shapes: dict[str, tuple[int, ...]] = {"w_router": (experts, WIDTH)}
    for name in ("w_up", "w_down", "w_gate") if gated else ("w_up", "w_down"):
        shapes[name] = (neurons, WIDTH)
    if biased:
        shapes |= {"b_up": (neurons,), "b_down": (WIDTH,)} | ({"b_gate": (neurons,)} if gated else {})
    arrays: dict[str, Array] = {
        name: (rng.standard_normal(shape) * 0.5).astype(dtype) for name, shape in shapes.items()
    }
    if biased or router_bias:
        arrays["b_router"] = np.full(experts, router_bias, dtype)
    return arrays


def reference(activation: str, w: Arrays, x: Array) -> Any:
    """The formula in schema.py, in float64."""
    x, w = x.astype(np.float64), {name: array.astype(np.float64) for name, array in w.items()}
    selected = sigmoid(x @ w["w_router"].T + w.get("b_router", 0.0)) > THRESHOLD
    neuron_selected = np.repeat(selected, EXPERT_SIZE, axis=-1)[..., : len(w["w_up"])]
    up = x @ w["w_up"].T + w.get("b_up", 0.0)
    if "w_gate" in w:
        hidden = REFERENCE[activation](x @ w["w_gate"].T + w.get("b_gate", 0.0)) * up
    else:
        hidden = REFERENCE[activation](up)
    return (hidden * neuron_selected) @ w["w_down"] + w.get("b_down", 0.0)


def node(activation: str, w: Arrays, source: str, result: str, overload: str = "") -> onnx.NodeProto:
    inputs = [source, *(name if name in w else "" for name in schema.INPUT_NAMES[1:])]
    return helper.make_node(
        schema.OP_TYPE, inputs, [result], domain=schema.DOMAIN, overload=overload, activation=activation,
        expert_size=EXPERT_SIZE, gated=int("w_gate" in w), threshold=THRESHOLD,
    )  # fmt: skip


def variant(activation: str, w: Arrays) -> Variant:
    biases = tuple(name for name in ("b_router", "b_up", "b_gate", "b_down") if name in w)
    return Variant(activation=activation, gated="w_gate" in w, biases=biases, ragged=len(w["w_up"]) % EXPERT_SIZE != 0)


def model(nodes: list[onnx.NodeProto], functions: list[onnx.FunctionProto], w: Arrays, rank: int) -> onnx.ModelProto:
    kind = helper.np_dtype_to_tensor_dtype(w["w_up"].dtype)
    axes = [f"axis{i}" for i in range(rank - 1)] + [WIDTH]
    x, y = (helper.make_tensor_value_info(name, kind, axes) for name in ("x", "y"))
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in w.items()]
    graph = helper.make_graph(nodes, "ffn", [x], [y], initializers)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(schema.DOMAIN, schema.VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)


def run(proto: onnx.ModelProto, x: Array) -> Array:
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def run_one(activation: str, w: Arrays, x: Array) -> Array:
    function = sparse_ffn_function(variant(activation, w), opset=23)
    return run(model([node(activation, w, "x", "y")], [function], w, x.ndim), x)


def sample(*shape: int, dtype: type = np.float32) -> Array:
    return np.random.default_rng(1).standard_normal((*shape, WIDTH)).astype(dtype)


def test_every_activation_of_the_kernels_has_a_body() -> None:
    assert set(ACTIVATION_BODIES) == set(ACTIVATIONS)


@pytest.mark.parametrize("neurons", [16, 14], ids=["even", "ragged"])
@pytest.mark.parametrize("biased", [False, True], ids=["bare", "biased"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", sorted(ACTIVATION_BODIES))
def test_body_computes_the_formula(activation: str, gated: bool, biased: bool, neurons: int) -> None:
    w, x = weights(gated=gated, biased=biased, neurons=neurons), sample(2, 5)
    # float32 sums of at most 16 terms of size about 1: a few ulp of 1e-7 each.
    np.testing.assert_allclose(run_one(activation, w, x), reference(activation, w, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", sorted(ACTIVATION_BODIES))
def test_float16(activation: str, gated: bool) -> None:
    w, x = weights(gated=gated, biased=True, neurons=14, dtype=np.float16), sample(7, dtype=np.float16)
    y = run_one(activation, w, x)
    assert y.dtype == np.float16
    # float16 keeps 11 bits: 5e-4 relative per rounding, a handful of roundings on values of size about 4.
    np.testing.assert_allclose(y, reference(activation, w, x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("router_bias, share", [(-100.0, 0.0), (100.0, 1.0)], ids=["none active", "all active"])
@pytest.mark.parametrize("neurons", [16, 14], ids=["even", "ragged"])
def test_all_or_no_experts(router_bias: float, share: float, neurons: int) -> None:
    w, x = weights(gated=True, biased=True, neurons=neurons, router_bias=router_bias), sample(3, 4)
    y = run_one("silu", w, x)
    np.testing.assert_allclose(y, reference("silu", w, x), rtol=1e-5, atol=1e-5)
    is_only_bias = np.array_equal(y, np.broadcast_to(w["b_down"], y.shape))
    assert is_only_bias == (share == 0.0)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1), (2, 3, 4), (0,), (2, 0)])
@pytest.mark.parametrize("neurons", [16, 14], ids=["even", "ragged"])
def test_any_rank_and_no_tokens(shape: tuple[int, ...], neurons: int) -> None:
    w, x = weights(gated=True, biased=True, neurons=neurons), sample(*shape)
    y = run_one("gelu", w, x)
    assert y.shape == x.shape
    np.testing.assert_allclose(y, reference("gelu", w, x), rtol=1e-5, atol=1e-5)


def test_overflow_in_an_unselected_expert_gives_zero() -> None:
    w = dict(weights(gated=False, biased=False, neurons=16, dtype=np.float16, router_bias=-100.0))
    w["w_up"] = w["w_up"] + np.float16(3e4)
    y = run_one("relu", w, np.abs(sample(5, dtype=np.float16)) + np.float16(4))
    assert not y.any()


def test_two_kinds_in_one_model_are_told_apart_by_overload() -> None:
    gated, plain = weights(gated=True, biased=True, neurons=14), weights(gated=False, biased=False, neurons=16)
    renamed = {f"plain_{name}": array for name, array in plain.items()}
    kinds = [variant("silu", gated), variant("relu", plain)]
    first, second = node("silu", gated, "x", "u", kinds[0].overload), node("relu", plain, "u", "y", kinds[1].overload)
    second.input[1:] = [f"plain_{name}" if name else "" for name in second.input[1:]]
    functions = [sparse_ffn_function(kind, opset=23, overload=kind.overload) for kind in kinds]
    x = sample(2, 3)
    y = run(model([first, second], functions, {**gated, **renamed}, 3), x)
    np.testing.assert_allclose(y, reference("relu", plain, reference("silu", gated, x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("opset", [20, 21, 22, 23])
def test_opsets(opset: int) -> None:
    w, x = weights(gated=False, biased=True, neurons=14), sample(4)
    proto = model([node("gelu", w, "x", "y")], [sparse_ffn_function(variant("gelu", w), opset=opset)], w, 2)
    proto.opset_import[0].version = opset
    np.testing.assert_allclose(run(proto, x), reference("gelu", w, x), rtol=1e-5, atol=1e-5)


def test_opset_without_gelu_is_refused() -> None:
    with pytest.raises(ValueError, match="opset 20 or later; got 18"):
        sparse_ffn_function(Variant(activation="gelu", gated=False), opset=18)


def test_unknown_activation_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'xielu' has no ONNX body; there is one for elu, gelu"):
        Variant(activation="xielu", gated=False)


def test_overloads_are_unique() -> None:
    names = [
        Variant(activation=activation, gated=gated, biases=biases, ragged=ragged).overload
        for activation, gated, ragged, biases in itertools.product(
            ACTIVATION_BODIES, (False, True), (False, True), ((), ("b_up",), ("b_up", "b_down"))
        )
    ]
    assert len(set(names)) == len(names)


def test_schema_registers_once_and_checks_nodes() -> None:
    schema.register()
    schema.register()
    w = weights(gated=False, biased=False, neurons=16)
    proto = model([node("relu", w, "x", "y")], [], w, 2)
    onnx.checker.check_model(proto)
    assert onnx.defs.get_schema(schema.OP_TYPE, domain=schema.DOMAIN).since_version == schema.VERSION
