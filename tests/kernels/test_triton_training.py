"""The training kernels without a GPU: interpreted against float64, and compiled ahead of time for two architectures."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from lte_compile.kernels.activations import ACTIVATIONS
from lte_compile.kernels.program import is_program, parse_program
from tests.kernels.interpreted import run_interpreted
from tests.kernels.problems import PROGRAMS, TOLERANCE

pytest.importorskip("triton")
from tests.kernels import interpreted_training
from tests.kernels.ahead_of_time import compile_ptx, spilled_bytes

BF16 = (
    *("up_ptr", "gate_ptr", "out_ptr", "grad_ptr", "gated_ptr", "grad_up_ptr", "grad_gate_ptr", "rows_ptr"),
    *("first_w_ptr", "second_w_ptr", "first_out_ptr", "second_out_ptr", "first_ptr", "second_ptr"),
)
TYPES = {
    **dict.fromkeys(BF16, "*bf16"),
    **dict.fromkeys(("gates_ptr", "grad_gates_ptr"), "*fp32"),
    **dict.fromkeys(("lists_ptr", "counts_ptr"), "*i32"),
    **dict.fromkeys(("pairs", "F", "tokens"), "i32"),
    "constants": (),
}
NO_BIASES = dict.fromkeys(("first_bias_ptr", "second_bias_ptr"))


@pytest.fixture(scope="module")
def interpreted_errors() -> dict[str, float]:
    return run_interpreted("tests.kernels.interpreted_training")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["gated", "plain"])
@pytest.mark.parametrize("shape", interpreted_training.SHAPES)
def test_interpreted_gradients_match_float64(
    interpreted_errors: dict[str, float], shape: str, form: str, dtype: torch.dtype
) -> None:
    assert interpreted_errors[f"{shape}, {dtype}, {form}"] < TOLERANCE[dtype]


@pytest.mark.parametrize(
    "case",
    [
        *(f"{shape}, {form}" for shape in interpreted_training.SHAPES for form in interpreted_training.FORMS),
        *(f"program {name}" for name in PROGRAMS),
    ],
)
def test_interpreted_products_over_lists_match_float64(interpreted_errors: dict[str, float], case: str) -> None:
    assert interpreted_errors[f"listed {case}"] < TOLERANCE[torch.float16]


@pytest.mark.parametrize(
    "case",
    [
        *(f"{activation}, {form}" for activation in ACTIVATIONS for form in ("gated", "plain")),
        *(f"program {name}" for name in PROGRAMS),
        "separability",
        "its gradient",
    ],
)
def test_interpreted_functions_match_float64(interpreted_errors: dict[str, float], case: str) -> None:
    assert interpreted_errors[case] < TOLERANCE[torch.float32]


def pointwise(activation: str, *, gated: bool) -> list[tuple[str, dict[str, Any], int]]:
    from lte_compile.kernels.program_gradient_triton import generated_gradient
    from lte_compile.kernels.program_triton import generated_kernel
    from lte_compile.kernels.triton_gated_hidden import BACKWARD_TILE, FORWARD_TILE

    common: dict[str, Any] = {"EXPERTS": 344, "EXPERT_SIZE": 32, "EVEN": True, "SKIP": False, "WIDTH": 32}
    common |= {"IS_PROGRAM": is_program(activation)} | ({} if gated else {"gate_ptr": None})
    kernel, gradient = activation, activation
    if is_program(activation):
        kernel, gradient = generated_kernel(activation), generated_gradient(activation)
    forward = {"PAIRS": FORWARD_TILE.neurons // 32, "ACTIVATION": kernel} | common
    backward = {"PAIRS": BACKWARD_TILE.neurons // 32, "ACTIVATION": gradient} | common
    backward |= {} if gated else {"grad_gate_ptr": None}
    return [
        ("gated_hidden", forward, FORWARD_TILE.warps),
        ("gated_hidden_backward", backward, BACKWARD_TILE.warps),
    ]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["silu", "gelu", *PROGRAMS])
def test_pointwise_kernels_compile_without_spills(name: str, capability: int) -> None:
    from lte_compile.kernels import gated_hidden_kernels

    activation, gated, types = name, name == "silu", TYPES
    if name in PROGRAMS:
        program = parse_program(PROGRAMS[name])
        activation, gated = str(program), program.gated
        types = TYPES | {"constants": ("*bf16",) * len(program.constant_names)}
    for kernel, constants, warps in pointwise(activation, gated=gated):
        ptx = compile_ptx(getattr(gated_hidden_kernels, kernel), types, constants, capability, warps)
        assert re.search(r"ld\.global\S*\.v4", ptx), "values must be read 16 bytes at a time"
        assert re.search(r"st\.global\S*\.v4", ptx), "and written so"
        spilled = 128 if name == "every other operation" else 0  # a test's 33 operations, more than any model's region
        assert spilled_bytes(ptx, capability) <= spilled


def products(*, pair: bool) -> list[tuple[str, dict[str, Any], int]]:
    from lte_compile.kernels.triton_listed_training import OUTER_TILE, ROWS_TILE

    common = {"D": 4096, "EXPERT_SIZE": 32}
    common |= {"NEURON_STRIDE": 4096, "COLUMN_STRIDE": 1} if pair else {"NEURON_STRIDE": 1, "COLUMN_STRIDE": 11008}
    second_of = {"listed_rows": ("second_w_ptr", "second_out_ptr"), "listed_outer": ("second_ptr", "second_out_ptr")}
    found = []
    for name, tile in (("listed_rows", ROWS_TILE), ("listed_outer", OUTER_TILE)):
        sizes = {"TOKENS": tile.tokens, "NEURONS": tile.neurons, "BLOCK": tile.columns, "STAGES": tile.stages}
        missing = {} if pair else dict.fromkeys(second_of[name])
        own = NO_BIASES if name == "listed_rows" else {"EXPERTS": 344}
        found.append((name, {**common, **sizes, **missing, **own}, tile.warps))
    return found


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("pair", [True, False], ids=["up and gate", "down"])
def test_products_compile_without_spills(pair: bool, capability: int) -> None:
    from lte_compile.kernels import listed_training_kernels

    for name, constants, warps in products(pair=pair):
        ptx = compile_ptx(getattr(listed_training_kernels, name), TYPES, constants, capability, warps)
        assert re.search(r"\b(mma\.sync|wgmma)", ptx), "products of bf16 tiles belong on the tensor cores"
        assert "cp.async" in ptx, "loads must run ahead of the products"
        assert spilled_bytes(ptx, capability) == 0


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["partial_sums", "gradients"])
def test_losses_compile_without_spills(name: str, capability: int) -> None:
    from lte_compile.kernels import separability_kernels
    from lte_compile.kernels.separability import BLOCK

    types = dict.fromkeys(("scores_ptr", "sums_ptr", "grad_ptr", "out_ptr"), "*fp32") | {"count": "i32"}
    types |= dict.fromkeys(("tau", "eps"), "fp32")
    ptx = compile_ptx(getattr(separability_kernels, name), types, {"BLOCK": BLOCK}, capability, warps=4)
    assert spilled_bytes(ptx, capability) == 0
