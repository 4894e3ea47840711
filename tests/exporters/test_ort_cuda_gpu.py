"""The library on ONNX Runtime's CUDA provider: one node against float64, whole models against torch.

Needs onnxruntime-gpu and a library with CUDA kernels (`lte-compile build-ort`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from lte_compile.exporters.function import ACTIVATION_BODIES
from lte_compile.exporters.runtime import OrtGenerator, greedy_generate, max_abs_difference, run
from lte_compile.routing.router import Router
from lte_compile.serving.onnx_file import export_onnx
from lte_compile.serving.ort_library import build_ort_library, ort_library_path
from tests import zoo
from tests.exporters.hard import prompts, shallow
from tests.exporters.single_node import NODE, Array, Case, make_model, reference
from tests.exporters.single_node import run as run_node

CUDA = "CUDAExecutionProvider"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(CUDA not in ort.get_available_providers(), reason="needs onnxruntime-gpu"),
]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
# Of a node, relative to the largest output: float32 sums; x, weights (exact here), hidden values and the result rounded
# to 2^-11 and 2^-8.
NODE_TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1.6e-2}
MODEL_TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}
ALL_BIASES = ("b_router", "b_up", "b_gate", "b_down")


@pytest.fixture(scope="module")
def library() -> str:
    try:
        return str(ort_library_path())
    except RuntimeError:
        return str(build_ort_library(cuda=True).path)


Open = Callable[..., ort.InferenceSession]


@pytest.fixture(scope="module")
def open_on_gpu(library: str) -> Open:
    def open_session(
        model: Any, profile: Path | None = None, *, is_plain: bool = False, **provider: str
    ) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = 4  # errors reach the test as exceptions
        if not is_plain:
            options.register_custom_ops_library(library)
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        # ONNX Runtime's own products use tf32 unless they are told not to.
        session = ort.InferenceSession(model, options, providers=[(CUDA, {"use_tf32": "0", **provider})])
        assert CUDA in session.get_providers()
        return session

    return open_session


def error(case: Case, arrays: dict[str, Array], session: ort.InferenceSession) -> float:
    y, wanted = run_node(session, arrays, case.dtype), reference(case, arrays)
    assert y.shape == arrays["x"].shape
    return float(np.abs(y - wanted).max(initial=0.0) / np.abs(wanted).max(initial=1.0))


@pytest.mark.parametrize("dtype", NODE_TOLERANCE)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(
    "sizes",
    [(6, 14, 4), (1, 1, 1), (7, 13, 5), (64, 96, 16), (576, 1536, 32), (31, 67, 1), (96, 112, 1000), (32, 4096, 1)],
    ids=str,
)
def test_shapes(sizes: tuple[int, int, int], gated: bool, dtype: str, open_on_gpu: Open) -> None:
    width, neurons, expert_size = sizes
    case = Case(dtype=dtype, width=width, neurons=neurons, expert_size=expert_size, gated=gated)
    session = open_on_gpu(make_model(case))
    for tokens in ((), (1,), (2,), (3, 5), (16,), (17,), (64,), (65,), (2, 1, 130), (0,), (2, 0)):
        assert error(case, case.arrays(*tokens), session) <= NODE_TOLERANCE[dtype], tokens


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("sizes", [(1600, 6400, 32), (4096, 2064, 16), (4096, 4112, 1024), (5120, 2048, 7)], ids=str)
def test_large_layers(sizes: tuple[int, int, int], gated: bool, dtype: str, open_on_gpu: Open) -> None:
    """One token of layers of 16 MB and more takes kernels of its own."""
    width, neurons, expert_size = sizes
    case = Case(dtype=dtype, width=width, neurons=neurons, expert_size=expert_size, gated=gated, activation="gelu")
    session = open_on_gpu(make_model(case))
    for tokens, seed in ((1, 0), (1, 1), (2, 2)):
        assert error(case, case.arrays(tokens, seed=seed), session) <= NODE_TOLERANCE[dtype]


@pytest.mark.parametrize("biases", [(), ("b_router",), ("b_up",), ("b_gate", "b_down"), ALL_BIASES], ids=str)
@pytest.mark.parametrize("activation", sorted(ACTIVATION_BODIES))
def test_activations_and_optional_inputs(activation: str, biases: tuple[str, ...], open_on_gpu: Open) -> None:
    for gated in (False, True):
        case = Case(activation=activation, gated=gated, biases=biases, width=32, neurons=64, expert_size=16)
        session = open_on_gpu(make_model(case))
        for tokens in (1, 5, 70):
            assert error(case, case.arrays(tokens), session) <= NODE_TOLERANCE["fp32"], (gated, tokens)


def test_no_experts_and_no_width(open_on_gpu: Open) -> None:
    session = open_on_gpu(make_model(Case()))
    for tokens in (1, 4):
        empty = Case(neurons=0).arrays(tokens)
        np.testing.assert_array_equal(run_node(session, empty), np.broadcast_to(empty["b_down"], (tokens, 6)))
        assert run_node(session, Case(width=0).arrays(tokens)).shape == (tokens, 0)


@pytest.mark.parametrize("tokens", [1, 4, 80])
def test_none_all_and_nan(tokens: int, open_on_gpu: Open) -> None:
    case = Case(width=32, neurons=64, expert_size=16)
    session, arrays = open_on_gpu(make_model(case)), case.arrays(tokens)
    for bias in (-100.0, 100.0):
        arrays["b_router"] = np.full(case.experts, bias, np.float32)
        assert error(case, arrays, session) <= NODE_TOLERANCE["fp32"]
    arrays["x"][0, 2] = np.nan
    np.testing.assert_array_equal(run_node(session, arrays)[0], arrays["b_down"])


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"x": np.ones(())}, "x is a scalar"),
        ({"w_router": np.ones((3, 6)), "b_router": np.ones(3)}, "w_router has 3 experts; 14 neurons"),
        ({"w_down": np.ones((6, 14))}, r"w_down is \[6, 14\]; it must be \[F, D\]"),
    ],
)
def test_bad_input_names_the_node(changed: dict[str, Array], message: str, open_on_gpu: Open) -> None:
    case = Case()
    session = open_on_gpu(make_model(case))
    with pytest.raises(Exception, match=f"SparseFFN node '{NODE}': {message}"):
        run_node(session, case.arrays(3) | changed)
    assert error(case, case.arrays(3), session) <= NODE_TOLERANCE["fp32"]  # the session goes on


@pytest.mark.parametrize("tokens", [1, 5, 100])
def test_cuda_graphs_capture_the_node(tokens: int, open_on_gpu: Open) -> None:
    """One graph serves every input and mask."""
    case = Case(dtype="fp16", width=64, neurons=96, expert_size=16)
    session = open_on_gpu(make_model(case), enable_cuda_graph="1")
    arrays = {name: np.asarray(array, np.float16) for name, array in case.arrays(tokens).items()}
    on_gpu = {name: ort.OrtValue.ortvalue_from_numpy(array, "cuda", 0) for name, array in arrays.items()}
    y = ort.OrtValue.ortvalue_from_numpy(np.zeros_like(arrays["x"]), "cuda", 0)
    binding = session.io_binding()
    for name, value in on_gpu.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_ortvalue_output("y", y)
    for seed in range(5):
        x = np.asarray(case.arrays(tokens, seed=seed)["x"], np.float16)
        on_gpu["x"].update_inplace(x)
        session.run_with_iobinding(binding)
        wanted = reference(case, {**case.arrays(tokens), "x": x})
        assert np.abs(y.numpy() - wanted).max() / np.abs(wanted).max() <= NODE_TOLERANCE["fp16"]


def test_sessions_and_threads_share_the_library(open_on_gpu: Open) -> None:
    case = Case(dtype="fp16", width=576, neurons=1536, expert_size=32)
    sessions = [open_on_gpu(make_model(case)) for _ in range(2)]
    inputs = [case.arrays(tokens, seed=tokens) for tokens in (1, 2, 9, 64, 100, 33)]
    wanted = [reference(case, arrays) for arrays in inputs]
    jobs = [(sessions[turn % 2], index) for turn in range(10) for index in range(len(inputs))]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: run_node(job[0], inputs[job[1]], "fp16"), jobs))
    for (_, index), y in zip(jobs, found, strict=True):
        assert np.abs(y - wanted[index]).max() / np.abs(wanted[index]).max() <= NODE_TOLERANCE["fp16"]


def test_results_are_equal_from_run_to_run(open_on_gpu: Open) -> None:
    case = Case(dtype="fp16", width=576, neurons=1536, expert_size=32)
    session = open_on_gpu(make_model(case))
    for tokens in (1, 7, 64, 200):
        arrays = case.arrays(tokens)
        first, *others = (run_node(session, arrays, "fp16") for _ in range(4))
        for other in others:
            np.testing.assert_array_equal(first, other)


def placements(profile: str) -> set[tuple[str, str]]:
    """Operator and provider of every node that ran."""
    events = [event.get("args", {}) for event in json.loads(Path(profile).read_text())]
    return {(args["op_name"], args["provider"]) for args in events if "op_name" in args and "provider" in args}


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("family", ["bert", "t5", "vit"])
def test_models(family: str, precision: str, tmp_path: Path, open_on_gpu: Open) -> None:
    model, inputs = shallow(family)
    report = export_onnx(model, tmp_path / "model.onnx", dtype=DTYPES[precision])
    assert report.sparse
    with torch.no_grad():
        wanted = model(**inputs).to_tuple()[0]
    for is_plain in (True, False):
        session = open_on_gpu(str(report.path), profile=tmp_path / "profile", is_plain=is_plain)
        found = run(session, inputs)[report.outputs[0]]
        assert max_abs_difference(found, wanted) <= MODEL_TOLERANCE[precision]
    assert {where for name, where in placements(session.end_profiling()) if name == "SparseFFN"} == {CUDA}


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_decoders_with_a_cache(family: str, precision: str, tmp_path: Path, open_on_gpu: Open) -> None:
    model, _ = shallow(family)
    report = export_onnx(model, tmp_path / "model.onnx", kv_cache=True, dtype=DTYPES[precision])
    assert len(report.sparse) == sum(isinstance(module, Router) for module in model.modules())
    plain, session = (
        open_on_gpu(str(report.path), profile=tmp_path / "profile", is_plain=is_plain) for is_plain in (True, False)
    )
    other: Any = deepcopy(model).to("cuda", DTYPES[precision])
    for batch in (1, 3):
        ids, mask = prompts(batch, 7)
        options = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": 0, "eos_token_id": zoo.VOCAB}
        wanted = other.generate(input_ids=ids.cuda(), attention_mask=mask.cuda(), **options).cpu().numpy()
        for each in (plain, session):
            got = greedy_generate(each, ids.numpy(), mask.numpy(), max_new_tokens=32)
            np.testing.assert_array_equal(got, wanted)
    assert {where for name, where in placements(session.end_profiling()) if name == "SparseFFN"} == {CUDA}


@pytest.mark.parametrize("precision", DTYPES)
def test_long_prompts(precision: str, tmp_path: Path, open_on_gpu: Open) -> None:
    """More tokens than the kernels for a few take: cuBLAS multiplies."""
    model, _ = shallow("llama")
    report = export_onnx(model, tmp_path / "model.onnx", kv_cache=True, dtype=DTYPES[precision])
    generator = OrtGenerator(open_on_gpu(str(report.path)))
    ids, mask = prompts(2, 90)
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=torch.ones_like(mask)).logits
    logits, _ = generator.step(ids.numpy(), np.ones_like(mask.numpy()), generator.empty_cache(2))
    assert max_abs_difference(logits, wanted) <= MODEL_TOLERANCE[precision]
