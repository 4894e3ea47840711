"""The kernels for many tokens without a GPU: interpreted against float64, and compiled for two architectures."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from lte_compile.kernels.activations import ACTIVATIONS
from tests.kernels.interpreted import run_interpreted
from tests.kernels.problems import PROGRAMS, TOLERANCE

pytest.importorskip("triton")
from tests.kernels import interpreted_prefill
from tests.kernels.ahead_of_time import compile_ptx, spilled_bytes

TYPES = {
    **dict.fromkeys(
        ("x_ptr", "router_ptr", "up_ptr", "gate_ptr", "up_bias_ptr", "gate_bias_ptr", "hidden_ptr"), "*bf16"
    ),
    **dict.fromkeys(("values_ptr", "logits_ptr", "bias_ptr", "router_bias_ptr"), "*fp32"),
    **dict.fromkeys(("lists_ptr", "counts_ptr"), "*i32"),
    **dict.fromkeys(("tokens", "F", "token_stride", "expert_stride", "part_stride"), "i32"),
    "constants": (),
    "tau": "fp32",
}
EXTREMES = ("all active", "none active", "non-finite", "interleaved")


@pytest.fixture(scope="module")
def interpreted_errors() -> dict[str, float]:
    return run_interpreted("tests.kernels.interpreted_prefill")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "case",
    [
        *(f"{shape}, {{}}, {form}" for shape in interpreted_prefill.SHAPES for form in ("gated", "plain")),
        *(f"program {name}, {{}}" for name in PROGRAMS),
    ],
)
@pytest.mark.parametrize("kernel", interpreted_prefill.KERNELS)
def test_interpreted_kernels_match_float64(
    interpreted_errors: dict[str, float], kernel: str, case: str, dtype: torch.dtype
) -> None:
    assert interpreted_errors[f"{kernel}: {case.format(dtype)}"] < TOLERANCE[dtype]


@pytest.mark.parametrize("case", [*ACTIVATIONS, *EXTREMES])
@pytest.mark.parametrize("kernel", interpreted_prefill.KERNELS)
def test_interpreted_activations_and_extremes_match_float64(
    interpreted_errors: dict[str, float], kernel: str, case: str
) -> None:
    assert interpreted_errors[f"{kernel}: {case}"] < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("three chunks, gated", torch.float32),
        ("three chunks, plain", torch.float32),
        ("finished by a product", torch.float16),
    ],
)
def test_interpreted_ways_of_dense_products_match_float64(
    interpreted_errors: dict[str, float], case: str, dtype: torch.dtype
) -> None:
    assert interpreted_errors[case] < TOLERANCE[dtype]


@pytest.mark.parametrize("values", ["scores", "logits", "parts", "strided"])
@pytest.mark.parametrize("case", interpreted_prefill.LISTS)
def test_lists_hold_the_tokens_above_the_threshold(
    interpreted_errors: dict[str, float], case: str, values: str
) -> None:
    assert interpreted_errors[f"lists: {case}, {values}"] == 0


def launches() -> list[tuple[str, dict[str, Any], int]]:
    """(kernel, constants, warps) with every default tile."""
    from lte_compile.kernels.fused_up import ROUTED, fused_tile
    from lte_compile.kernels.grouped_tile import grouped_tile

    configs = [grouped_tile(rows, 32, torch.bfloat16) for rows in (10, 50, 1000)]
    function = {"ACTIVATION": "silu", "IS_PROGRAM": False}
    experts = {"EXPERTS": 344, "EXPERT_SIZE": 32}
    width = {"D": 4096, "ROW_STRIDE": 4096, "BIAS_STRIDE": 1, "up_bias_ptr": None, "gate_bias_ptr": None}
    masking = function | experts | {"PARTS": 4, "BLOCK_EXPERTS": 64, "NEURONS": 32, "FROM_END": True}
    launches = [("mask_hidden", masking, 8)]
    for config in configs:
        tile = {"TOKENS": config.tokens, "NEURONS": config.neurons, "BLOCK": config.block, "STAGES": config.stages}
        launches.append(("listed_up", function | experts | tile | width | {"EXPERTS_PADDED": 512}, config.warps))
    for fused in (fused_tile(tokens, 32, True, torch.bfloat16) for tokens in (100, 1000)):
        sides = {"TOKENS": fused.tokens, "NEURONS": fused.neurons, "BLOCK": fused.block, "STAGES": fused.stages}
        launches.append(("routed_up", function | experts | width | sides | {"ROUTED": ROUTED}, fused.warps))
    return launches


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_spills(capability: int) -> None:
    from lte_compile.kernels import mask_kernels, prefill_kernels

    for name, constants, warps in launches():
        module = mask_kernels if name == "mask_hidden" else prefill_kernels
        ptx = compile_ptx(getattr(module, name), TYPES, constants, capability, warps)
        assert spilled_bytes(ptx, capability) == 0
        if name in ("listed_up", "routed_up"):
            wide = capability == 90 and constants["TOKENS"] >= 64  # the smallest wgmma
            assert re.search(r"\bwgmma" if wide else r"\bmma\.sync", ptx), "tensor cores"
            assert "cp.async.cg.shared.global" in ptx, "rows are copied while products run"


def test_lists_compile_without_spills() -> None:
    from lte_compile.kernels.token_lists import scan_tokens

    ptx = compile_ptx(scan_tokens, TYPES, {"PARTS": 4, "ARE_LOGITS": True, "BLOCK": 2048}, 90, warps=8)
    assert spilled_bytes(ptx, 90) == 0
