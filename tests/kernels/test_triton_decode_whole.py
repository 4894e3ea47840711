"""The decode kernels that read every expert without a GPU: interpreted, and compiled ahead of time."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from lte_compile.kernels.activations import ACTIVATIONS
from tests.kernels.interpreted import run_interpreted
from tests.kernels.problems import PROGRAMS, TOLERANCE

pytest.importorskip("triton")
from tests.kernels import interpreted_decode_whole
from tests.kernels.ahead_of_time import compile_ptx, spilled_bytes

TYPES = {
    **dict.fromkeys(("x_ptr", "router_x_ptr", "router_ptr", "up_ptr", "gate_ptr"), "*bf16"),
    **dict.fromkeys(("up_bias_ptr", "gate_bias_ptr", "down_ptr", "down_bias_ptr", "y_ptr"), "*bf16"),
    **dict.fromkeys(("router_bias_ptr", "hidden_ptr", "partial_ptr"), "*fp32"),
    **dict.fromkeys(("selected_ptr", "arrived_ptr"), "*i32"),
    "F": "i32",
    "constants": (),
    "tau": "fp32",
}


@pytest.fixture(scope="module")
def interpreted_errors() -> dict[str, float]:
    return run_interpreted("tests.kernels.interpreted_decode_whole")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "case",
    [
        *(f"{shape}, {{}}, {form}" for shape in interpreted_decode_whole.SHAPES for form in ("gated", "plain")),
        *(f"program {name}, {{}}" for name in PROGRAMS),
    ],
)
def test_interpreted_kernels_match_float64(interpreted_errors: dict[str, float], case: str, dtype: torch.dtype) -> None:
    assert interpreted_errors[case.format(dtype)] < TOLERANCE[dtype]


@pytest.mark.parametrize("case", [*ACTIVATIONS, "all active", "none active", "interleaved halves", "unsplit"])
def test_interpreted_activations_and_extremes_match_float64(interpreted_errors: dict[str, float], case: str) -> None:
    assert interpreted_errors[case] < TOLERANCE[torch.float32]


def test_what_is_not_selected_adds_nothing_whatever_its_weights(interpreted_errors: dict[str, float]) -> None:
    assert interpreted_errors["weights of unselected experts are NaN"] < TOLERANCE[torch.float32]


def launches(gated: bool) -> list[tuple[str, dict[str, Any], int]]:
    from lte_compile.kernels.triton_decode_whole import WholeConfig

    config = WholeConfig()
    missing = ("up_bias_ptr", "gate_bias_ptr") if gated else ("gate_ptr", "gate_bias_ptr")
    rows = 1 if gated else 2
    up = {**dict.fromkeys(missing), "WIDTH": 4096, "ROUTER_D": 5120, "ROUTER_WIDTH": 8192, "ROW_STRIDE": 4096}
    up |= {"BIAS_STRIDE": 1, "EXPERTS": 344, "ACTIVATION": "silu" if gated else "gelu", "IS_PROGRAM": False}
    up |= {"COUNTERS": 64, "ROWS": rows, "ROUTED": 2}
    down = {"EXPERT_SIZE": 32, "ROWS": config.down_rows, "BLOCK": config.down_block, "SPLITS": 8}
    return [
        ("score_and_compute", {"D": 4096} | up, config.up_warps),
        ("project_selected", {"D": 4096} | down, config.down_warps),
    ]


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_tiles_of_small_layers_compile_without_spills(layer: int) -> None:
    """SmolLM2-135M, GPT-2 and 1024 x 2816."""
    from lte_compile.kernels import decode_whole_kernels
    from lte_compile.kernels.triton_decode_whole import SMALL_LAYERS

    config, width = SMALL_LAYERS[layer][1], (576, 768, 1024)[layer]
    (_, up, _), (_, down, _) = launches(gated=layer != 1)
    up |= {"ROUTER_D": width, "ROUTER_WIDTH": 1024, "WIDTH": 1024, "ROW_STRIDE": width, "ROWS": config.up_rows}
    up |= {"ROUTED": config.up_rows if layer == 1 else 2 * config.up_rows}
    down |= {"ROWS": config.down_rows, "BLOCK": config.down_block, "SPLITS": (1, 6, 3)[layer]}
    for name, constants, warps in (
        ("score_and_compute", up, config.up_warps),
        ("project_selected", down, config.down_warps),
    ):
        constants |= {"D": width, "DEPENDENT": 1}
        ptx = compile_ptx(getattr(decode_whole_kernels, name), TYPES, constants, 90, warps)
        assert spilled_bytes(ptx, 90) == 0


@pytest.mark.parametrize(("capability", "dependent"), [(80, 0), (90, 1)])
@pytest.mark.parametrize("gated", [True, False])
def test_kernels_compile_without_spills(gated: bool, capability: int, dependent: int) -> None:
    from lte_compile.kernels import decode_whole_kernels

    for name, constants, warps in launches(gated):
        constants |= {"DEPENDENT": dependent}
        ptx = compile_ptx(getattr(decode_whole_kernels, name), TYPES, constants, capability, warps)
        assert re.search(r"ld\.global\S*\.v4", ptx), "weights must be read 16 bytes at a time"
        waits = [match.start() for match in re.finditer(r"griddepcontrol\.wait", ptx)]
        assert (len(waits) > 0) == (dependent > 0)
        assert all(re.search(r"ld\.global\S*\.v4", ptx[:wait]) for wait in waits), "weights are read ahead of the wait"
        assert spilled_bytes(ptx, capability) == 0
