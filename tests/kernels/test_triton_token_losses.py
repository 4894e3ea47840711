"""The kernels of token losses without a GPU: interpreted against float64, and compiled ahead of time."""

from __future__ import annotations

import pytest
import torch

from lte_compile.kernels.token_losses import BLOCK, WARPS
from tests.kernels.interpreted import run_interpreted
from tests.kernels.problems import TOLERANCE

pytest.importorskip("triton")
from tests.kernels.ahead_of_time import compile_ptx, spilled_bytes
from tests.kernels.interpreted_token_losses import DTYPES, SHAPES

POINTERS = ("entropy_ptr", "distance_ptr", "learned_lse_ptr", "taught_lse_ptr", "grad_entropy_ptr", "grad_distance_ptr")
TYPES = {
    **dict.fromkeys(("logits_ptr", "taught_ptr", "out_ptr"), "*bf16"),
    **dict.fromkeys(POINTERS, "*fp32"),
    "labels_ptr": "*i64",
    "C": "i32",
}


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    return run_interpreted("tests.kernels.interpreted_token_losses")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["taught", "alone"])
def test_interpreted_losses_and_gradients_match_float64(
    errors: dict[str, float], shape: str, dtype: torch.dtype, kind: str
) -> None:
    found = {name: error for name, error in errors.items() if name.startswith(f"{shape}, {dtype}, {kind}, ")}
    assert len(found) == 3
    # Losses are in float32 whatever the logits' dtype; only the gradient is rounded to it.
    gradient = found.pop(f"{shape}, {dtype}, {kind}, gradient")
    assert gradient < TOLERANCE[dtype]
    assert max(found.values()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("teaches", [True, False])
@pytest.mark.parametrize("kernel", ["losses", "gradients"])
def test_kernels_compile_without_spilling(kernel: str, teaches: bool, capability: int) -> None:
    from lte_compile.kernels import token_losses_kernels as kernels

    constants = {"BLOCK": BLOCK, **({} if teaches else {"taught_ptr": None})}
    assert spilled_bytes(compile_ptx(getattr(kernels, kernel), TYPES, constants, capability, WARPS), capability) == 0
