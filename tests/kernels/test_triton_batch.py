"""The batch kernels without a GPU: interpreted against float64, and compiled ahead of time for two architectures."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from lte_compile.kernels.activations import ACTIVATIONS
from tests.kernels.interpreted import run_interpreted
from tests.kernels.problems import PROGRAMS, TOLERANCE

pytest.importorskip("triton")
from tests.kernels import interpreted_batch
from tests.kernels.ahead_of_time import compile_ptx, spilled_bytes

TYPES = {
    **dict.fromkeys(("x_ptr", "router_ptr", "up_ptr", "gate_ptr", "up_bias_ptr", "gate_bias_ptr"), "*bf16"),
    **dict.fromkeys(("hidden_ptr", "down_ptr", "down_bias_ptr", "y_ptr"), "*bf16"),
    **dict.fromkeys(("router_bias_ptr", "parts_ptr", "partial_ptr"), "*fp32"),
    **dict.fromkeys(("active_ptr", "arrived_ptr"), "*i32"),
    **dict.fromkeys(("F", "tokens"), "i32"),
    "constants": (),
    "tau": "fp32",
}


@pytest.fixture(scope="module")
def interpreted_errors() -> dict[str, float]:
    return run_interpreted("tests.kernels.interpreted_batch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "case",
    [
        *(f"{shape}, {{}}, {form}" for shape in interpreted_batch.SHAPES for form in ("gated", "plain")),
        *(f"program {name}, {{}}" for name in PROGRAMS),
    ],
)
def test_interpreted_kernels_match_float64(interpreted_errors: dict[str, float], case: str, dtype: torch.dtype) -> None:
    assert interpreted_errors[case.format(dtype)] < TOLERANCE[dtype]


@pytest.mark.parametrize("case", [*ACTIVATIONS, "all active", "none active"])
def test_interpreted_activations_and_extremes_match_float64(interpreted_errors: dict[str, float], case: str) -> None:
    assert interpreted_errors[case] < TOLERANCE[torch.float32]


def launches(tokens: int) -> list[tuple[str, dict[str, Any]]]:
    from lte_compile.kernels.triton_batch import BatchConfig

    config = BatchConfig()
    common = {"D": 4096, "TOKENS": tokens}
    scores = {"EXPERTS": 344, "COUNTERS": 64, "SPAN": 512, "BLOCK_EXPERTS": config.score_experts}
    scores |= {"BLOCK": config.score_block, "UPCAST": False, "STAGES": config.score_stages}
    up = {"EXPERT_SIZE": 32, "SCORE_PARTS": 8, "ACTIVATION": "silu", "IS_PROGRAM": False, "up_bias_ptr": None}
    up |= {"gate_bias_ptr": None, "NEURONS": 32, "BLOCK": config.up_block, "STAGES": config.up_stages}
    down = {"EXPERTS": 344, "EXPERTS_PADDED": 512, "EXPERT_SIZE": 32, "NEURONS": 32, "BLOCK": config.down_block}
    down |= {"SPLITS": 4, "STAGES": config.down_stages}
    return [(name, common | own) for name, own in (("score_parts", scores), ("gate_up", up), ("down", down))]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("tokens", [16, 64])
def test_kernels_compile_without_spills(tokens: int, capability: int) -> None:
    from lte_compile.kernels import batch_kernels

    for name, constants in launches(tokens):
        constants |= {"DEPENDENT": capability >= 90}
        ptx = compile_ptx(getattr(batch_kernels, name), TYPES, constants, capability, warps=4)
        assert ("griddepcontrol.wait" in ptx) == (capability >= 90)
        assert re.search(r"\b(mma\.sync|wgmma)", ptx), "products of bf16 tiles belong on the tensor cores"
        assert spilled_bytes(ptx, capability) == 0
