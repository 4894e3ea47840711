"""The library's kernel of `lte::SparseFFN`, against float64 and against the portable body of the same node."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime as ort
import pytest

from lte_compile.exporters.function import ACTIVATION_BODIES, sparse_ffn_function
from tests.exporters.single_node import Array, Case, exact_in_bfloat16, make_model, open_model, reference, run
from tests.exporters.test_function import REFERENCE, model, node, sample, variant, weights
from tests.exporters.test_function import reference as formula

# Sums in float32 of at most 5,000 values of size about 1, relative to the largest output: a few hundred roundings of
# 6e-8. The others round x, the weights (exact here) and the result once: 2^-11 and 2^-8.
TOLERANCE = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 8e-3}
ALL_BIASES = ("b_router", "b_up", "b_gate", "b_down")


def instruction_sets(library: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Those of this processor, from the message that refuses another."""
    monkeypatch.setenv("LTE_ORT_SIMD", "none")
    with pytest.raises(Exception, match="LTE_ORT_SIMD is 'none'; this processor has ") as refusal:
        ort.SessionOptions().register_custom_ops_library(library)
    return str(refusal.value).rpartition("has ")[2].strip().split(", ")


def error(case: Case, arrays: dict[str, Array], library: str, threads: int = 1) -> float:
    """The largest, relative to the largest output; NaN, which is below no tolerance, if an output is."""
    session = open_model(make_model(case), library, threads)
    y, wanted = run(session, arrays, case.dtype), reference(case, arrays)
    assert y.shape == arrays["x"].shape
    return float(np.abs(y - wanted).max(initial=0.0) / np.abs(wanted).max(initial=1.0))


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("tokens", [(), (1,), (2,), (3, 5), (2, 1, 3), (37,), (261,)])
@pytest.mark.parametrize(
    "sizes", [(6, 14, 4), (1, 1, 1), (7, 13, 5), (33, 64, 64), (576, 96, 32), (31, 67, 1), (97, 101, 1000)], ids=str
)
def test_shapes(sizes: tuple[int, int, int], tokens: tuple[int, ...], dtype: str, ort_library: str) -> None:
    width, neurons, expert_size = sizes
    case = Case(dtype=dtype, width=width, neurons=neurons, expert_size=expert_size)
    assert error(case, case.arrays(*tokens), ort_library, threads=2) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("tokens", [(1,), (70,)])
def test_many_parts_and_blocks_of_columns(tokens: tuple[int, ...], ort_library: str) -> None:
    """Large enough that one token is cut into parts for the threads, and a row into blocks for a cache."""
    case = Case(width=1600, neurons=700, expert_size=24)
    assert error(case, case.arrays(*tokens), ort_library, threads=2) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("tokens", [(24,), (5, 14), (261,)], ids=str)
@pytest.mark.parametrize("sizes", [(7, 13, 5), (33, 100, 7), (1024, 300, 20), (260, 97, 1000)], ids=str)
def test_prompts_that_select_most_experts(
    sizes: tuple[int, int, int], tokens: tuple[int, ...], gated: bool, dtype: str, ort_library: str
) -> None:
    """Dense products with a mask: all selected, most of them, and all but an expert that no token selects."""
    width, neurons, expert_size = sizes
    case = Case(dtype=dtype, width=width, neurons=neurons, expert_size=expert_size, gated=gated)
    arrays = case.arrays(*tokens)
    for bias in (100.0, 2.0):
        arrays["b_router"] = np.full(case.experts, bias, np.float32)
        arrays["b_router"][case.experts // 2 + 1 : case.experts // 2 + 2] = -100
        assert error(case, arrays, ort_library, threads=2) <= TOLERANCE[dtype], bias


@pytest.mark.parametrize("tokens", [(1,), (9,)])
@pytest.mark.parametrize("biases", [(), ("b_router",), ("b_up",), ("b_gate", "b_down"), ALL_BIASES], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", sorted(ACTIVATION_BODIES))
def test_activations_and_optional_inputs(
    activation: str, gated: bool, biases: tuple[str, ...], tokens: tuple[int, ...], ort_library: str
) -> None:
    case = Case(activation=activation, gated=gated, biases=biases)
    assert error(case, case.arrays(*tokens), ort_library) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("activation", sorted(ACTIVATION_BODIES))
def test_activations_over_the_whole_range(activation: str, ort_library: str) -> None:
    """Large values, subnormal ones, infinities and NaN too."""
    case = Case(activation=activation, gated=False, biases=("b_router",), width=1, neurons=1, expert_size=1)
    session, one = open_model(make_model(case), ort_library), np.ones((1, 1))
    inputs = {"x": one, "w_router": one, "b_router": one[0], "w_down": one}
    specials = [0.0, -0.0, 1e-40, -1e-40, 1e30, -1e30, np.inf, -np.inf, np.nan]
    for value in [*np.linspace(-110, 110, 401, dtype=np.float32), *specials]:
        y = run(session, {**inputs, "w_up": value * one})
        with np.errstate(all="ignore"):
            wanted = np.float32(REFERENCE[activation](np.asarray(np.float32(value), np.float64)))
        # a few roundings of 6e-8; gelu's error function is off by 1.5e-7 absolute
        np.testing.assert_allclose(y.item(), wanted, rtol=1e-6, atol=1e-6, err_msg=str(value))


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("neurons", [16, 14], ids=["even", "ragged"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_agrees_with_the_portable_body(gated: bool, neurons: int, dtype: str, ort_library: str) -> None:
    case = Case(dtype=dtype, gated=gated, neurons=neurons)
    arrays = case.arrays(4, 9)
    ours, theirs = open_model(make_model(case), ort_library), open_model(make_model(case, with_function=True))
    np.testing.assert_allclose(run(ours, arrays, dtype), run(theirs, arrays, dtype), atol=2 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("tokens", [(), (2, 3), (300,), (0, 4)], ids=str)
@pytest.mark.parametrize("router_width", [1, 5, 41])
def test_a_router_that_reads_another_tensor(
    router_width: int, tokens: tuple[int, ...], dtype: str, ort_library: str
) -> None:
    case = Case(dtype=dtype, router_width=router_width)
    arrays = case.arrays(*tokens)
    assert error(case, arrays, ort_library, threads=2) <= TOLERANCE[case.dtype]
    if dtype == "fp32":
        portable = run(open_model(make_model(case, with_function=True)), arrays)
        np.testing.assert_allclose(portable, reference(case, arrays), atol=TOLERANCE[dtype])


def test_the_kernel_runs_instead_of_the_body(ort_library: str) -> None:
    case = Case()
    session = open_model(make_model(case, with_function=True), ort_library)
    with pytest.raises(Exception, match=f"SparseFFN node '{re.escape('layers.0.mlp')}': x is a scalar"):
        run(session, {**case.arrays(3), "x": np.ones(())})


@pytest.mark.parametrize("tokens", [(1,), (5,)])
@pytest.mark.parametrize("router_bias", [-100.0, 100.0], ids=["none", "all"])
def test_none_or_all_experts(router_bias: float, tokens: tuple[int, ...], ort_library: str) -> None:
    case = Case()
    arrays = case.arrays(*tokens) | {"b_router": np.full(case.experts, router_bias, np.float32)}
    assert error(case, arrays, ort_library) <= TOLERANCE[case.dtype]
    if router_bias < 0:
        y = run(open_model(make_model(case), ort_library), arrays)
        np.testing.assert_array_equal(y, np.broadcast_to(arrays["b_down"], y.shape))


@pytest.mark.parametrize(
    "threshold, share", [(0.5, 0.0), (0.49999997, 1.0), (0.0, 1.0), (-1.0, 1.0), (1.0, 0.0), (7.0, 0.0)]
)
def test_threshold_is_strict_and_may_be_any_number(threshold: float, share: float, ort_library: str) -> None:
    case = Case(threshold=threshold, biases=("b_router", "b_down"))
    arrays = case.arrays(3)
    arrays |= {"w_router": arrays["w_router"] * 0, "b_router": arrays["b_router"] * 0}  # scores of exactly a half
    y = run(open_model(make_model(case), ort_library), arrays)
    assert np.array_equal(y, np.broadcast_to(arrays["b_down"], y.shape)) == (share == 0.0)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 7)])
def test_no_tokens(shape: tuple[int, ...], ort_library: str) -> None:
    case = Case()
    y = run(open_model(make_model(case), ort_library), case.arrays(*shape))
    assert y.shape == (*shape, case.width)


@pytest.mark.parametrize("tokens", [(1,), (4,)])
def test_no_experts_and_no_width(tokens: tuple[int, ...], ort_library: str) -> None:
    session = open_model(make_model(Case()), ort_library)
    empty = Case(neurons=0).arrays(*tokens)
    np.testing.assert_array_equal(run(session, empty), np.broadcast_to(empty["b_down"], (*tokens, 6)))
    assert run(session, Case(width=0).arrays(*tokens)).shape == (*tokens, 0)


@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_what_is_not_selected_counts_nothing(tokens: int, ort_library: str) -> None:
    """NaN and infinities in weights of idle experts, and a token whose scores are NaN."""
    case = Case()
    arrays = case.arrays(tokens)
    bias = np.array([100, -100, 100, -100], np.float32)
    arrays["b_router"] = bias
    wanted = reference(case, arrays)
    for name, poison in (("w_up", np.nan), ("w_gate", np.inf), ("w_down", np.nan)):
        arrays[name][4:8] = arrays[name][12:] = poison
    session = open_model(make_model(case), ort_library)
    np.testing.assert_allclose(run(session, arrays), wanted, atol=1e-5)
    arrays["x"][0, 2] = np.nan
    y = run(session, arrays)
    np.testing.assert_array_equal(y[0], arrays["b_down"])
    np.testing.assert_allclose(y[1:], wanted[1:], atol=1e-5)


def test_values_beyond_float16_become_infinite_only_in_the_result(ort_library: str) -> None:
    case = Case(
        dtype="fp16", activation="identity", gated=False, biases=("b_router",), width=1, neurons=1, expert_size=1
    )
    session = open_model(make_model(case), ort_library)
    ones = np.ones((1, 1))
    inputs = {"x": ones * 1000, "w_router": ones, "b_router": np.ones(1), "w_up": ones * 1000}
    assert run(session, {**inputs, "w_down": ones * 2**-10}, "fp16").item() == np.float16(1e6 * 2**-10)
    assert np.isposinf(run(session, {**inputs, "w_down": ones}, "fp16").item())


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_rounding_of_every_kind_of_number(dtype: str, ort_library: str) -> None:
    """float32 -> element type: subnormal, halfway between two, overflowing, NaN; through y = 0 + b_down and y = h."""
    case = Case(dtype=dtype, activation="identity", gated=False, biases=(), width=8, neurons=8, expert_size=8)
    row = np.array([1.0, 1 + 2**-9, 3 * 2**-25, 2**-24, 65504, 2**-14, -(2**-15), 0.1])
    x = exact_in_bfloat16(row) if dtype == "bf16" else row.astype(np.float16).astype(np.float32)
    arrays = {"x": x[None], "w_router": np.zeros((1, 8)), "w_up": np.eye(8), "w_down": np.eye(8)}
    selected = open_model(make_model(Case(**{**vars(case), "threshold": 0.4})), ort_library)
    np.testing.assert_array_equal(run(selected, arrays, dtype)[0].astype(np.float32), x)


def test_every_instruction_set_computes_the_same(ort_library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = instruction_sets(ort_library, monkeypatch)
    assert "portable" in sets
    for name in sets:
        monkeypatch.setenv("LTE_ORT_SIMD", name)
        for dtype in TOLERANCE:
            for activation in ACTIVATION_BODIES:
                case = Case(dtype=dtype, activation=activation, width=71, neurons=53, expert_size=9)
                assert error(case, case.arrays(1), ort_library) <= TOLERANCE[case.dtype]
                assert error(case, case.arrays(19), ort_library) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("bias", [0.0, 100.0], ids=["some", "all"])
@pytest.mark.parametrize("tokens", [1, 50, 300])
def test_threads_do_not_change_a_bit(tokens: int, bias: float, ort_library: str) -> None:
    case = Case(width=320, neurons=700, expert_size=16)
    arrays = case.arrays(tokens) | {"b_router": np.full(case.experts, bias, np.float32)}
    one, *more = (run(open_model(make_model(case), ort_library, threads), arrays) for threads in (1, 2, 5))
    for other in more:
        np.testing.assert_array_equal(one, other)


def test_sessions_and_threads_share_the_library(ort_library: str) -> None:
    """Several sessions of one process, each called from several threads at once."""
    cases = [Case(width=64, neurons=96, expert_size=8), Case(gated=False, activation="gelu"), Case(dtype="fp16")]
    sessions = [open_model(make_model(case), ort_library, threads=2) for case in cases for _ in range(2)]
    jobs = [(sessions[2 * number + copy], case) for number, case in enumerate(cases) for copy in (0, 1)] * 8
    arrays = {case: case.arrays(1 + case.width % 5) for case in cases}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: run(job[0], arrays[job[1]], job[1].dtype), jobs))
    for (_, case), y in zip(jobs, found, strict=True):
        np.testing.assert_allclose(y, reference(case, arrays[case]), atol=2e-2 if case.dtype == "fp16" else 1e-4)


def test_options_take_the_library_once_and_several_sessions_may_use_them(ort_library: str) -> None:
    options = ort.SessionOptions()
    options.register_custom_ops_library(ort_library)
    case = Case()
    sessions = [ort.InferenceSession(make_model(case), options) for _ in range(2)]
    first, second = (run(session, case.arrays(2)) for session in sessions)
    np.testing.assert_array_equal(first, second)
    options.log_severity_level = 4
    options.register_custom_ops_library(ort_library)
    with pytest.raises(Exception, match=r"(?i)domain.*(already|registered)|already.*registered"):
        ort.InferenceSession(make_model(case), options)


def test_several_kinds_of_ffn_in_one_model(ort_library: str) -> None:
    """Nodes whose bodies are told apart by ONNX's overload are one operator to the library."""
    gated, plain = weights(gated=True, biased=True, neurons=14), weights(gated=False, biased=False, neurons=16)
    first = node("silu", gated, "x", "u", variant("silu", gated).overload)
    second = node("relu", plain, "u", "y", variant("relu", plain).overload)
    second.input[1:] = [f"plain_{name}" if name else "" for name in second.input[1:]]
    kinds = (variant("silu", gated), variant("relu", plain))
    functions = [sparse_ffn_function(kind, opset=20, overload=kind.overload) for kind in kinds]
    proto = model([first, second], functions, {**gated, **{f"plain_{n}": a for n, a in plain.items()}}, 3)
    proto.opset_import[0].version = 20
    x = sample(2, 3)
    y = open_model(proto.SerializeToString(), ort_library).run(None, {"x": x})[0]
    np.testing.assert_allclose(y, formula("relu", plain, formula("silu", gated, x)), rtol=1e-5, atol=1e-5)
