"""lte_compile.bench and lte-compile bench."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lte_compile.bench import FfnShape, bench_ffn, kernel_choice
from tests.cli.conftest import Run

RunJson = Callable[..., Any]


@pytest.mark.parametrize("gated, activation, biases", [(True, "silu", False), (False, "gelu", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_density_is_measured(gated: bool, activation: str, biases: bool, dtype: torch.dtype) -> None:
    rows = bench_ffn(
        32,
        72,  # 4.5 experts: the last one is smaller
        gated=gated,
        activation=activation,
        biases=biases,
        expert_size=16,
        densities=(0.0, 0.4, 1.0),
        dtype=dtype,
        seconds=0.01,
        layers=2,
    )
    assert [row.density for row in rows] == [0.0, 0.4, 1.0]
    for row in rows:
        assert 0 < row.dense_p20_us <= row.dense_us <= row.dense_p80_us
        assert 0 < row.sparse_p20_us <= row.sparse_us <= row.sparse_p80_us
        assert row.speedup == pytest.approx(row.dense_us / row.sparse_us)
        assert row.kernel == "cpu-runs"


def test_no_expert_is_quicker_than_all_of_a_large_ffn() -> None:
    """5 MB of weights against none but the router's: no noise of a shared machine hides that."""
    none, every = bench_ffn(
        512, 2048, gated=False, activation="relu", biases=False, expert_size=32, densities=(0.0, 1.0), seconds=0.1
    )
    assert none.sparse_us < every.sparse_us


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    bench_ffn(
        16, 32, gated=False, activation="relu", biases=False, expert_size=8, densities=(0.5,), threads=2, seconds=0.01
    )
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "change", [{"expert_size": 0}, {"expert_size": 64}, {"activation": "gellu"}, {"width": 0}, {"densities": (1.5,)}]
)
def test_bad_requests_are_refused(change: dict[str, Any]) -> None:
    request = {
        "width": 16, "hidden": 32, "gated": True, "activation": "silu", "biases": False, "expert_size": 8,
        "densities": (0.5,),
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"at least|fit|activation|share"):
        bench_ffn(**{**request, **change})


def test_the_kernel_choice_gives_reasons() -> None:
    shape = FfnShape(width=16, hidden=32, gated=True, activation="silu", biases=False, expert_size=8)
    choice = kernel_choice(shape)
    assert choice.lowering.name == "cpu-runs"
    assert "not triton-decode" in str(choice)


def test_bench_of_a_shape(run: Run) -> None:
    result = run("bench", "32x64", "--densities", 0.5, "--seconds", 0.01, "--plain", "--activation", "gelu")
    assert result.exit_code == 0, result.stderr
    assert "FFN 32x64, plain gelu" in result.stdout
    assert "cpu-runs" in result.stdout


def test_bench_of_a_model_takes_its_ffn(run_json: RunJson, llama: Path) -> None:
    document = run_json("bench", llama, "--densities", 0.25, "--densities", 1, "--seconds", 0.01, "--threads", 1)
    assert document["shape"] == {
        "width": 64, "hidden": 128, "gated": True, "activation": "silu", "biases": False, "expert_size": 32,
    }  # fmt: skip
    assert [row["density"] for row in document["rows"]] == [0.25, 1.0]
    assert document["threads"] == 1


@pytest.mark.parametrize("options", [("--densities", -1), ("--threads", 0), ("--seconds", 0), ("--expert-size", 99)])
def test_bench_refuses_bad_options(run: Run, options: tuple[object, ...]) -> None:
    result = run("bench", "32x64", *options)
    assert result.exit_code == 2
    assert result.stderr.count("error:") == 1


def test_kernels_are_explained_without_timing(run: Run, run_json: RunJson, llama: Path) -> None:
    document = run_json("bench", llama, "--explain", "--device", "cuda", "--dtype", "bf16", "--tokens", 1)
    assert [site["kernel"] for site in document["sites"]] == ["triton-decode"] * len(document["sites"])
    assert all(site["site"].endswith("down_proj.weight") for site in document["sites"])
    shown = run("bench", "32x64", "--explain", "--device", "cpu", "--tokens", 1).stdout
    assert "cpu-runs" in shown
    assert "not triton-decode: needs a CUDA device" in shown


def test_kernels_are_explained_at_the_densities_asked_about(run_json: RunJson, llama: Path) -> None:
    asked = ("--explain", "--device", "cuda", "--dtype", "bf16", "--tokens", 2048, "--densities", 0.1, "--densities", 1)
    sparse, dense = run_json("bench", "4096x11008", *asked)["sites"]
    assert (sparse["density"], sparse["kernel"]) == (0.1, "triton-prefill")
    assert (dense["density"], dense["kernel"]) == (1.0, "masked-dense")
    assert "as long as dense" in dense["refusals"]["triton-prefill"]
    assert {site["density"] for site in run_json("bench", llama, *asked)["sites"]} == {0.1, 1.0}


def test_explain_names_its_devices(run: Run) -> None:
    result = run("bench", "32x64", "--explain", "--device", "tpu")
    assert result.exit_code == 2
    assert "--device must be auto, cpu, cuda with --explain; got 'tpu'" in result.stderr
