"""The lowering table is total and explains itself; the CPU lowering's runs; the down-projection's layout."""

from __future__ import annotations

import pytest
import torch

from lte_compile.kernels.layout import is_neuron_major, neuron_major
from lte_compile.kernels.lowering import (
    LOWERINGS,
    MAX_BATCH_TOKENS,
    MAX_CPU_TOKENS,
    MAX_LISTED_EXPERTS,
    Request,
    choose,
    describe,
)
from lte_compile.kernels.sparse_ffn_cpu import find_runs, sparse_ffn_cpu
from lte_compile.kernels.sparse_ffn_reference import sparse_ffn_reference
from tests.kernels.problems import SHAPES, Shape, interleaved, make_call, with_tokens

ONE_TOKEN = describe(make_call(SHAPES[0], dtype=torch.float32))
ON_CUDA = ONE_TOKEN._replace(device="cuda")


def test_each_op_ends_with_a_reference_that_never_refuses() -> None:
    last = {row.op: row for row in LOWERINGS}
    for row in last.values():
        assert row.name == "reference"
        assert row.refuse(ONE_TOKEN._replace(device="unheard-of", tokens=10**9)) is None


def test_one_token_on_cuda_is_decoded_by_triton() -> None:
    pytest.importorskip("triton")
    assert choose(ON_CUDA).lowering.name == "triton-decode"


LLAMA = ON_CUDA._replace(dtype=torch.bfloat16, width=4096, neurons=11008, experts=344, expert_size=32, gated=True)


@pytest.mark.parametrize(
    ("tokens", "density", "name"),
    [
        (0, None, "reference"),
        (2, None, "triton-batch"),
        (16, None, "triton-batch"),
        (16, 0.1, "triton-batch"),
        (16, 1.0, "triton-batch"),
        (MAX_BATCH_TOKENS, None, "masked-dense"),
        (MAX_BATCH_TOKENS, 0.5, "masked-dense"),
        (MAX_BATCH_TOKENS, 0.02, "triton-batch"),
        (MAX_BATCH_TOKENS + 1, 0.02, "masked-dense"),
        (2048, None, "masked-dense"),
        (2048, 0.1, "triton-prefill"),
        (8192, 0.3, "triton-prefill"),
        (8192, 0.9, "masked-dense"),
        (100_000, 0.1, "triton-prefill"),
    ],
)
def test_tokens_and_density_choose_on_cuda(tokens: int, density: float | None, name: str) -> None:
    pytest.importorskip("triton")
    assert choose(LLAMA._replace(tokens=tokens, density=density)).lowering.name == name


@pytest.mark.parametrize(
    ("density", "name"),
    [
        (None, "triton-decode"),
        (0.5, "triton-decode"),
        (0.9, "triton-decode"),
        (0.95, "triton-whole"),
        (1.0, "triton-whole"),
    ],
)
def test_one_token_that_selects_nearly_every_expert_skips_nothing(density: float | None, name: str) -> None:
    pytest.importorskip("triton")
    assert choose(LLAMA._replace(density=density)).lowering.name == name


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"density": None}, "the share of active experts is unknown"),
        ({"density": 0.5}, "density 0.5: leaving the other experts unread is faster"),
        ({"tokens": 2}, "serves one token; got 2"),
        ({"width": 2048, "neurons": 5632}, "density 1: leaving the other experts unread is faster"),
        ({"width": 576, "neurons": 1536, "density": 0.05}, "density 0.05: leaving the other experts unread is faster"),
        ({"width": 16384}, "serves widths up to 8192; got 16384"),
        ({"down_is_neuron_major": False}, "the down-projection must be neuron-major"),
    ],
)
def test_skipping_nothing_is_for_large_layers_that_need_all(change: dict[str, object], reason: str) -> None:
    pytest.importorskip("triton")
    assert reason in choose(LLAMA._replace(**{"density": 1.0, **change})).refusals["triton-whole"]  # type: ignore[arg-type]


SMOL = LLAMA._replace(width=576, neurons=1536, experts=48)
GPT2 = LLAMA._replace(width=768, neurons=3072, experts=96, gated=False)


@pytest.mark.parametrize(
    ("request_", "name"),
    [
        (SMOL._replace(tokens=8), "triton-fused"),
        (SMOL._replace(tokens=8192), "triton-fused"),
        (SMOL._replace(tokens=8192, density=0.1), "triton-prefill"),
        (SMOL._replace(tokens=8, mixed=True), "masked-dense"),
        (SMOL._replace(tokens=8, dtype=torch.float32), "masked-dense"),
        (SMOL._replace(tokens=8, own_router_input=True), "masked-dense"),
        (SMOL._replace(tokens=1), "triton-decode"),
        (SMOL._replace(tokens=1, density=0.3), "triton-whole"),
        (GPT2._replace(tokens=1, density=0.2), "triton-decode"),
        (GPT2._replace(tokens=1, density=0.3), "triton-whole"),
        (SMOL._replace(width=1024, neurons=2816, tokens=512), "triton-fused"),
        (SMOL._replace(width=1024, neurons=2816, tokens=2048), "masked-dense"),
        (GPT2._replace(tokens=8), "masked-dense"),
        (GPT2._replace(tokens=32), "triton-fused"),
        (GPT2._replace(tokens=512), "triton-fused"),
        (GPT2._replace(tokens=513), "masked-dense"),
    ],
)
def test_small_layers_take_few_launches(request_: Request, name: str) -> None:
    pytest.importorskip("triton")
    assert choose(request_).lowering.name == name


@pytest.mark.parametrize(
    ("change", "row", "reason"),
    [
        ({"tokens": 512}, "triton-fused", "serves layers up to 20 MB; this one has 271 MB"),
        ({"tokens": 513, "width": 1024, "neurons": 2816, "gated": False}, "triton-fused", "serves up to 512 tokens"),
        ({"tokens": 64}, "triton-batch", "64 tokens of unknown density may need every expert"),
        ({"tokens": 64, "density": 0.3}, "triton-batch", "64 tokens at density 0.3 need 100% of the experts"),
        ({"tokens": 8, "width": 576, "neurons": 1536}, "triton-batch", "saves at most 5 MB of reading"),
        ({"tokens": 2048}, "triton-prefill", "the share of active experts is unknown"),
        ({"tokens": 2048, "density": 0.9}, "triton-prefill", "2048 tokens at density 0.9 would take"),
        ({"tokens": 2048, "density": 0.3, "dtype": torch.float32}, "triton-prefill", "2048 tokens at density 0.3"),
        ({"tokens": 2, "density": 0.1, "down_is_neuron_major": False}, "triton-prefill", "serves more than 64 tokens"),
        ({"tokens": 2048, "density": 0.1, "unequal_experts": True}, "masked-dense", "expert_offsets"),
    ],
)
def test_refusals_say_what_is_expected_of_the_call(change: dict[str, object], row: str, reason: str) -> None:
    pytest.importorskip("triton")
    refusals = choose(LLAMA._replace(**change)).refusals  # type: ignore[arg-type]
    assert reason in refusals[row]


def test_the_estimated_gain_of_skipping_falls_with_density() -> None:
    pytest.importorskip("triton")
    chosen = [choose(LLAMA._replace(tokens=4096, density=d / 20)).lowering.name for d in range(21)]
    last = max(i for i, name in enumerate(chosen) if name == "triton-prefill")
    assert set(chosen[: last + 1]) == {"triton-prefill"}
    assert set(chosen[last + 1 :]) == {"masked-dense"}


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"tokens": 2}, "serves one token; got 2"),
        ({"tokens": 0}, "serves one token; got 0"),
        ({"dtype": torch.float64}, "float64"),
        ({"unequal_experts": True}, "expert_offsets"),
        ({"contiguous": False}, "contiguous"),
        ({"constants_elsewhere": True}, "constant of the hidden region is on another device"),
        ({"down_is_neuron_major": False}, "neuron-major"),
        ({"experts": MAX_LISTED_EXPERTS + 1}, "lists up to"),
        ({"device": "cpu"}, "needs a CUDA device"),
    ],
)
def test_triton_refuses_with_a_reason(change: dict[str, object], reason: str) -> None:
    pytest.importorskip("triton")
    choice = choose(ON_CUDA._replace(**change))  # type: ignore[arg-type]
    assert choice.lowering.name != "triton-decode"
    assert reason in choice.refusals["triton-decode"]
    assert reason in str(choice)


def test_projections_of_interleaved_halves_are_decoded_in_place() -> None:
    call = interleaved(make_call(SHAPES[0], dtype=torch.float32))
    request = describe(call)._replace(device="cuda")
    assert request.contiguous
    pytest.importorskip("triton")
    assert choose(request).lowering.name == "triton-decode"
    assert "every other row" in choose(request._replace(tokens=3)).refusals["triton-batch"]


def test_biases_apart_from_one_another_are_not_read_as_if_side_by_side() -> None:
    pytest.importorskip("triton")
    call = make_call(with_tokens(SHAPES[0], 3), dtype=torch.float32)
    apart = interleaved(call).weights
    weights = call.weights._replace(up_bias_F=apart.up_bias_F, gate_bias_F=apart.gate_bias_F)
    same = call.weights._replace(up_bias_F=torch.ones(1).expand(32), gate_bias_F=torch.ones(1).expand(32))
    for given, is_served in ((call.weights, True), (weights, False), (same, False)):
        request = describe(call._replace(weights=given))._replace(device="cuda", width=4096, neurons=11008)
        assert (choose(request).lowering.name == "triton-batch") == is_served


def test_few_tokens_on_a_cpu_read_runs_of_experts() -> None:
    assert choose(ONE_TOKEN).lowering.name == "cpu-runs"
    assert choose(ONE_TOKEN._replace(tokens=MAX_CPU_TOKENS + 1)).lowering.name == "reference"


def test_an_unknown_op_is_an_error() -> None:
    with pytest.raises(ValueError, match="no lowering for 'lte::nothing'"):
        choose(ONE_TOKEN._replace(op="lte::nothing"))


@pytest.mark.parametrize(
    "active, gap, runs",
    [
        ("", 0, []),
        ("...", 0, []),
        ("###", 0, [(0, 3)]),
        ("#.##..#", 0, [(0, 1), (2, 4), (6, 7)]),
        ("#.##..#", 1, [(0, 4), (6, 7)]),
        ("#.##..#", 2, [(0, 7)]),
        (".#.", 5, [(1, 2)]),
    ],
)
def test_runs_cover_the_active_experts(active: str, gap: int, runs: list[tuple[int, int]]) -> None:
    assert find_runs([c == "#" for c in active], gap) == runs


@pytest.mark.parametrize("run_cost", [0, 10**9], ids=["no gap joined", "all gaps joined"])
@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[-1]], ids=str)
def test_joining_runs_changes_no_result(
    monkeypatch: pytest.MonkeyPatch, shape: Shape, tokens: int, run_cost: int
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("lte_compile.kernels.sparse_ffn_cpu.RUN_COST_BYTES", run_cost)
    call = make_call(with_tokens(shape, tokens))
    torch.testing.assert_close(sparse_ffn_cpu(call), sparse_ffn_reference(call), rtol=1e-12, atol=1e-12)


def test_neuron_major_keeps_shape_and_values() -> None:
    weight = torch.randn(3, 5)
    turned = neuron_major(weight)
    assert torch.equal(turned, weight)
    assert turned.t().is_contiguous()
    assert is_neuron_major(turned)
    assert not is_neuron_major(weight)
    assert neuron_major(turned) is turned


def test_layout_refuses_what_is_no_matrix() -> None:
    with pytest.raises(ValueError, match=r"matrix.*\[3\]"):
        neuron_major(torch.randn(3))
