"""The decode kernels without a GPU: interpreted against float64, and compiled ahead of time for two architectures."""

from __future__ import annotations

import re

import pytest
import torch

from lte_compile.kernels.activations import ACTIVATIONS
from lte_compile.kernels.program import parse_program
from tests.kernels.interpreted import run_interpreted
from tests.kernels.problems import PROGRAMS, TOLERANCE

pytest.importorskip("triton")
from tests.kernels import interpreted_decode
from tests.kernels.ahead_of_time import compile_ptx, spilled_bytes

ROUTE_UP_TYPES = {
    **dict.fromkeys(("x_ptr", "router_x_ptr", "router_ptr", "up_ptr", "gate_ptr"), "*bf16"),
    **dict.fromkeys(("up_bias_ptr", "gate_bias_ptr"), "*bf16"),
    "router_bias_ptr": "*fp32",
    "constants": (),
    "hidden_ptr": "*fp32",
    "active_ptr": "*i32",
    "arrived_ptr": "*i32",
    "tau": "fp32",
    "F": "i32",
}
DOWN_TYPES = {
    "hidden_ptr": "*fp32",
    "active_ptr": "*i32",
    "down_ptr": "*bf16",
    "down_bias_ptr": "*bf16",
    "y_ptr": "*bf16",
    "partial_ptr": "*fp32",
    "arrived_ptr": "*i32",
    "F": "i32",
}


@pytest.fixture(scope="module")
def interpreted_errors() -> dict[str, float]:
    return run_interpreted("tests.kernels.interpreted_decode")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("form", ["gated", "plain"])
@pytest.mark.parametrize("shape", interpreted_decode.SHAPES)
def test_interpreted_kernels_match_float64(
    interpreted_errors: dict[str, float], shape: str, form: str, dtype: torch.dtype
) -> None:
    assert interpreted_errors[f"{shape}, {dtype}, {form}"] < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", PROGRAMS)
def test_interpreted_generated_kernels_match_float64(
    interpreted_errors: dict[str, float], name: str, dtype: torch.dtype
) -> None:
    assert interpreted_errors[f"program {name}, {dtype}"] < TOLERANCE[dtype]


@pytest.mark.parametrize("case", [*ACTIVATIONS, "all active", "none active", "interleaved halves"])
def test_interpreted_activations_and_extremes_match_float64(interpreted_errors: dict[str, float], case: str) -> None:
    assert interpreted_errors[case] < TOLERANCE[torch.float32]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("gated", [True, False])
def test_kernels_compile_without_spills(gated: bool, capability: int) -> None:
    from lte_compile.kernels import decode_kernels
    from lte_compile.kernels.triton_decode import DecodeConfig

    config = DecodeConfig()
    missing = ("up_bias_ptr", "gate_bias_ptr") if gated else ("gate_ptr", "gate_bias_ptr")
    shape: dict[str, object] = {"D": 4096, "EXPERT_SIZE": 32}
    up = {
        "ROUTER_D": 4096,
        "ROW_STRIDE": 4096,
        "BIAS_STRIDE": 1,
        **dict.fromkeys(missing),
        **shape,
        "ACTIVATION": "silu" if gated else "gelu",
        "COUNTERS": 16,
    }
    up |= {"IS_PROGRAM": False}
    up |= {"ROWS": config.up_rows, "BLOCK": config.up_block, "STAGES": config.up_stages}
    down = {**shape, "EXPERTS": 344, "EXPERTS_PADDED": 512, "SPLITS": config.down_splits}
    down |= {"ROWS": config.down_rows, "BLOCK": config.down_block, "STAGES": config.down_stages}
    for kernel, types, constants, warps in (
        (decode_kernels.route_up, ROUTE_UP_TYPES, up, config.up_warps),
        (decode_kernels.down, DOWN_TYPES, down, config.down_warps),
    ):
        ptx = compile_ptx(kernel, types, constants | {"DEPENDENT": capability >= 90}, capability, warps)
        assert re.search(r"ld\.global\S*\.v4", ptx), "weights must be read 16 bytes at a time"
        assert ("griddepcontrol.wait" in ptx) == (capability >= 90)
        assert spilled_bytes(ptx, capability) == 0


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", PROGRAMS)
def test_generated_kernels_compile_without_spills(name: str, capability: int) -> None:
    from lte_compile.kernels import decode_kernels
    from lte_compile.kernels.program_triton import generated_kernel
    from lte_compile.kernels.triton_decode import DecodeConfig

    config, program = DecodeConfig(), parse_program(PROGRAMS[name])
    missing = ("up_bias_ptr", "gate_bias_ptr") if program.gated else ("gate_ptr", "gate_bias_ptr")
    constants = {**dict.fromkeys(missing), "D": 4096, "EXPERT_SIZE": 32, "COUNTERS": 16, "IS_PROGRAM": True}
    constants |= {"ROUTER_D": 5120, "ROW_STRIDE": 8192 if program.gated else 4096, "BIAS_STRIDE": 1}
    constants |= {"ROWS": config.up_rows, "BLOCK": config.up_block, "STAGES": config.up_stages}
    constants |= {"ACTIVATION": generated_kernel(str(program)), "DEPENDENT": capability >= 90}
    types = ROUTE_UP_TYPES | {"constants": ("*bf16",) * len(program.constant_names)}
    ptx = compile_ptx(decode_kernels.route_up, types, constants, capability, config.up_warps)
    assert re.search(r"ld\.global\S*\.v4", ptx), "weights must be read 16 bytes at a time"
    assert "mul.f64" not in ptx or "sin(" in PROGRAMS[name]  # sin of large values is reduced in fp64
    assert spilled_bytes(ptx, capability) == 0
