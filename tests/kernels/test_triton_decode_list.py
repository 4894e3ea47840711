"""The decode kernels over a list of experts without a GPU: interpreted, and compiled ahead of time."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from lte_compile.kernels.activations import ACTIVATIONS
from tests.kernels.interpreted import run_interpreted
from tests.kernels.problems import PROGRAMS, TOLERANCE

pytest.importorskip("triton")
from tests.kernels import interpreted_decode_list
from tests.kernels.ahead_of_time import compile_ptx, spilled_bytes

TYPES = {
    **dict.fromkeys(("x_ptr", "router_ptr", "up_ptr", "gate_ptr", "up_bias_ptr", "gate_bias_ptr"), "*bf16"),
    **dict.fromkeys(("down_ptr", "down_bias_ptr", "y_ptr"), "*bf16"),
    **dict.fromkeys(("router_bias_ptr", "hidden_ptr", "partial_ptr"), "*fp32"),
    **dict.fromkeys(("selected_ptr", "lists_ptr", "arrived_ptr"), "*i32"),
    **dict.fromkeys(("F", "tokens"), "i32"),
    "constants": (),
    "tau": "fp32",
}


@pytest.fixture(scope="module")
def interpreted_errors() -> dict[str, float]:
    return run_interpreted("tests.kernels.interpreted_decode_list")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "case",
    [
        *(f"{shape}, {{}}, {form}" for shape in interpreted_decode_list.SHAPES for form in ("gated", "plain")),
        *(f"program {name}, {{}}" for name in PROGRAMS),
    ],
)
def test_interpreted_kernels_match_float64(interpreted_errors: dict[str, float], case: str, dtype: torch.dtype) -> None:
    assert interpreted_errors[case.format(dtype)] < TOLERANCE[dtype]


@pytest.mark.parametrize("case", [*ACTIVATIONS, "all active", "none active", "interleaved halves", "unsplit"])
def test_interpreted_activations_and_extremes_match_float64(interpreted_errors: dict[str, float], case: str) -> None:
    assert interpreted_errors[case] < TOLERANCE[torch.float32]


def launches(tokens: int, gated: bool) -> list[tuple[str, dict[str, Any], int]]:
    from lte_compile.kernels.triton_decode_list import ListConfig

    config = ListConfig()
    missing = ("up_bias_ptr", "gate_bias_ptr") if gated else ("gate_ptr", "gate_bias_ptr")
    lists = {"EXPERTS": 344, "EXPERTS_PADDED": 512, "EXPERT_SIZE": 32}
    scores = {"WIDTH": 4096, "COUNTERS": 64}
    up = {**lists, **dict.fromkeys(missing), "WIDTH": 4096, "ROW_STRIDE": 4096, "BIAS_STRIDE": 1, "IS_PROGRAM": False}
    up |= {"ACTIVATION": "silu" if gated else "gelu", "STAGES": config.up_stages}
    down = {**lists, "ROWS": config.down_rows // tokens**2, "BLOCK": config.down_block, "SPLITS": 8}
    down |= {"STAGES": config.down_stages}
    common = {"D": 4096, "TOKENS": tokens}
    return [
        ("score_expert", common | scores, config.score_warps),
        ("compute_hidden", common | up, config.up_warps),
        ("project_down", common | down, config.down_warps),
    ]


@pytest.mark.parametrize(("capability", "dependent"), [(80, 0), (90, 2)])
@pytest.mark.parametrize(("tokens", "gated"), [(1, True), (1, False), (2, True)])
def test_kernels_compile_without_spills(tokens: int, gated: bool, capability: int, dependent: int) -> None:
    from lte_compile.kernels import decode_list_kernels

    for name, constants, warps in launches(tokens, gated):
        constants |= {"DEPENDENT": 3 if dependent and name == "project_down" else dependent}
        ptx = compile_ptx(getattr(decode_list_kernels, name), TYPES, constants, capability, warps)
        assert re.search(r"ld\.global\S*\.v4|cp\.async\.cg", ptx), "weights must be read 16 bytes at a time"
        assert ("griddepcontrol.wait" in ptx) == (dependent > 0)
        assert ("griddepcontrol.launch_dependents" in ptx) == (dependent > 0)
        assert spilled_bytes(ptx, capability) == 0
