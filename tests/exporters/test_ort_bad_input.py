"""What a `SparseFFN` node must not be: an error with the node's name, what was given and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from lte_compile.exporters import schema
from tests.exporters.single_node import NODE, Array, Case, make_model, open_model, run

Change = Callable[[dict[str, Array]], dict[str, Array]]
WHERE = f"SparseFFN node '{re.escape(NODE)}': "


def resized(name: str, *shape: int) -> dict[str, Array]:
    return {name: np.ones(shape, np.float32)}


# D = 6, F = 14, S = 4, E = 4
BAD_SHAPES = {
    "x is a scalar": (resized("x"), r"x is a scalar; it must be \[\.\.\., D\]"),
    "x of another width": (resized("x", 2, 5), r"w_router is \[4, 6\]; it must be \[E, D\] = \[4, 5\]"),
    "x without width": (resized("x", 2, 0), r"w_router is \[4, 6\]; it must be \[E, D\] = \[4, 0\]"),
    "router of one axis": (resized("w_router", 24), r"w_router is \[24\]; it must be \[E, D\]"),
    "router of three axes": (resized("w_router", 1, 4, 6), r"w_router is \[1, 4, 6\]; it must be \[E, D\]"),
    "too few experts": (
        resized("w_router", 3, 6) | resized("b_router", 3),
        "w_router has 3 experts; 14 neurons in experts of 4 make 4",
    ),
    "too many experts": (resized("w_router", 5, 6) | resized("b_router", 5), "w_router has 5 experts; .* make 4"),
    "no experts": (resized("w_router", 0, 6) | resized("b_router", 0), "w_router has 0 experts; .* make 4"),
    "up of one axis": (resized("w_up", 84), r"w_up is \[84\]; it must be \[F, D\]"),
    "up transposed": (resized("w_up", 6, 14), r"w_up is \[6, 14\]; it must be \[F, D\] = \[6, 6\]"),
    "up without neurons": (resized("w_up", 0, 6), r"w_gate is \[14, 6\]; it must be \[F, D\] = \[0, 6\]"),
    "gate too small": (resized("w_gate", 13, 6), r"w_gate is \[13, 6\]; it must be \[F, D\] = \[14, 6\]"),
    "down transposed": (resized("w_down", 6, 14), r"w_down is \[6, 14\]; it must be \[F, D\] = \[14, 6\]"),
    "down a scalar": (resized("w_down"), r"w_down is \[\]; it must be \[F, D\] = \[14, 6\]"),
    "router bias": (resized("b_router", 1), r"b_router is \[1\]; it must be \[E\] = \[4\]"),
    "up bias": (resized("b_up", 15), r"b_up is \[15\]; it must be \[F\] = \[14\]"),
    "gate bias of two axes": (resized("b_gate", 14, 1), r"b_gate is \[14, 1\]; it must be \[F\] = \[14\]"),
    "down bias": (resized("b_down", 0), r"b_down is \[0\]; it must be \[D\] = \[6\]"),
}


@pytest.mark.parametrize("changed, message", BAD_SHAPES.values(), ids=BAD_SHAPES)
def test_shapes(changed: dict[str, Array], message: str, ort_library: str) -> None:
    case = Case()
    session = open_model(make_model(case), ort_library)
    with pytest.raises(Exception, match=WHERE + message):
        run(session, case.arrays(3) | changed)
    assert run(session, case.arrays(3)).shape == (3, 6)  # the session goes on


BAD_ROUTER_INPUTS = {
    "of another width": (resized("x_router", 3, 6), r"w_router is \[4, 5\]; it must be \[E, C\] = \[4, 6\]"),
    "of other tokens": (resized("x_router", 2, 5), r"x_router is \[2, 5\]; it must be .* = \[3, 5\]"),
    "of fewer axes": (resized("x_router", 5), r"x_router is \[5\]; it must be .* = \[3, 5\]"),
    "a scalar": (resized("x_router"), r"x_router is \[\]; it must have columns"),
    "without columns": (resized("x_router", 3, 0), r"x_router is \[3, 0\]; it must have columns"),
}


@pytest.mark.parametrize("changed, message", BAD_ROUTER_INPUTS.values(), ids=BAD_ROUTER_INPUTS)
def test_router_inputs(changed: dict[str, Array], message: str, ort_library: str) -> None:
    case = Case(router_width=5)
    session = open_model(make_model(case), ort_library)
    with pytest.raises(Exception, match=WHERE + message):
        run(session, case.arrays(3) | changed)


def test_axes_far_beyond_memory_around_one_of_length_zero(ort_library: str) -> None:
    session = open_model(make_model(Case(biases=())), ort_library)
    weights = {name: np.empty((1, 0)) for name in ("w_router", "w_up", "w_gate", "w_down")}
    y = run(session, {"x": np.empty((2**30, 2**30, 0), np.float32), **weights})
    assert y.shape == (2**30, 2**30, 0)


BAD_ATTRIBUTES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown activation": ({"activation": "xielu"}, "activation is 'xielu'; known are relu, gelu, gelu_tanh, .*mish"),
    "empty activation": ({"activation": ""}, "activation is ''; known are relu"),
    "activation missing": ({"activation": None}, "attribute 'activation' is missing or not a string"),
    "activation a number": ({"activation": 3}, "attribute 'activation' is missing or not a string"),
    "no expert size": ({"expert_size": 0}, "expert_size is 0; it must be at least 1"),
    "negative expert size": ({"expert_size": -(2**63)}, "expert_size is -9223372036854775808; it must be at least 1"),
    "expert size missing": ({"expert_size": None}, "attribute 'expert_size' is missing or not an integer"),
    "expert size a fraction": ({"expert_size": 4.0}, "attribute 'expert_size' is missing or not an integer"),
    "gated twice": ({"gated": 2}, "gated is 2; it must be 0 or 1"),
    "gated missing": ({"gated": None}, "attribute 'gated' is missing or not an integer"),
    "threshold NaN": ({"threshold": float("nan")}, "threshold is NaN; it must be a number"),
    "threshold an integer": ({"threshold": 1}, "attribute 'threshold' is missing or not a float"),
    "threshold missing": ({"threshold": None}, "attribute 'threshold' is missing or not a float"),
}


@pytest.mark.parametrize("attributes, message", BAD_ATTRIBUTES.values(), ids=BAD_ATTRIBUTES)
def test_attributes_are_checked_when_the_session_is_made(
    attributes: dict[str, Any], message: str, ort_library: str
) -> None:
    with pytest.raises(Exception, match=WHERE + message):
        open_model(make_model(Case(attributes=attributes)), ort_library)


def test_largest_expert_size(ort_library: str) -> None:
    case = Case(expert_size=2**63 - 1)
    assert run(open_model(make_model(case), ort_library), case.arrays(3)).shape == (3, 6)


@pytest.mark.parametrize(
    "given, gated, message",
    [
        (True, 0, "gated is 0, but w_gate is given"),
        (False, 1, "gated is 1, but w_gate is not given"),
    ],
)
def test_gated_must_agree_with_the_inputs(given: bool, gated: int, message: str, ort_library: str) -> None:
    case = Case(gated=given, attributes={"gated": gated})
    with pytest.raises(Exception, match=WHERE + message):
        run(open_model(make_model(case), ort_library), case.arrays(3))


def one_node(inputs: list[str], types: dict[str, int], output: int = TensorProto.FLOAT) -> bytes:
    attributes = {"activation": "relu", "expert_size": 4, "gated": 0, "threshold": 0.5}
    node = helper.make_node(schema.OP_TYPE, inputs, ["y"], name=NODE, domain=schema.DOMAIN, **attributes)
    values = [helper.make_tensor_value_info(name, types.get(name, TensorProto.FLOAT), None) for name in inputs if name]
    graph = helper.make_graph([node], "g", values, [helper.make_tensor_value_info("y", output, None)])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(schema.DOMAIN, schema.VERSION)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


REQUIRED = ["x", "w_router", "", "w_up", "", "w_down"]


def test_trailing_inputs_may_be_absent_altogether(ort_library: str) -> None:
    case = Case(activation="relu", gated=False, biases=())
    y = run(open_model(one_node(REQUIRED, {}), ort_library), case.arrays(3))
    np.testing.assert_array_equal(y, run(open_model(make_model(case), ort_library), case.arrays(3)))


@pytest.mark.parametrize(
    "inputs", [REQUIRED[:3], ["x", "", "", "w_up", "", "w_down"], [*REQUIRED, "", "", "", "", "z"]]
)
def test_a_wrong_number_of_inputs_is_refused_by_the_runtime(inputs: list[str], ort_library: str) -> None:
    with pytest.raises(Exception, match=NODE):
        open_model(one_node(inputs, {}), ort_library)


def test_bias_of_a_gate_that_is_not_there(ort_library: str) -> None:
    inputs = [*REQUIRED, "", "b_gate"]
    arrays = Case(activation="relu", gated=False, biases=()).arrays(3) | resized("b_gate", 14)
    with pytest.raises(Exception, match=WHERE + "b_gate is given, but gated is 0"):
        run(open_model(one_node(inputs, {}), ort_library), arrays)


@pytest.mark.parametrize(
    "types, output",
    [
        (dict.fromkeys(REQUIRED, TensorProto.DOUBLE), TensorProto.DOUBLE),
        (dict.fromkeys(REQUIRED, TensorProto.INT64), TensorProto.INT64),
        ({"w_router": TensorProto.FLOAT16}, TensorProto.FLOAT),
        ({"x": TensorProto.FLOAT16}, TensorProto.FLOAT16),
    ],
    ids=["float64", "int64", "mixed weights", "mixed x"],
)
def test_types_without_a_kernel_are_refused_when_the_session_is_made(
    types: dict[str, int], output: int, ort_library: str
) -> None:
    with pytest.raises(Exception, match=NODE):
        open_model(one_node(REQUIRED, types, output), ort_library)


def test_an_unknown_instruction_set(ort_library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LTE_ORT_SIMD", "mmx")
    with pytest.raises(Exception, match=r"LTE_ORT_SIMD is 'mmx'; this processor has .*portable"):
        ort.SessionOptions().register_custom_ops_library(ort_library)
