"""The kernels that only serving has, in Triton's interpreter; tests/exporters/test_ort_cuda.py compiles them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lte_compile.kernels.activations import ACTIVATIONS
from tests.kernels.interpreted import run_interpreted

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
# Of values up to about 10: float32 roundings; one to float16, 2^-11.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2}


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    return run_interpreted("tests.kernels.interpreted_serving")


@pytest.mark.parametrize("form", ["plain", "gated"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mask(errors: dict[str, float], activation: str, dtype: torch.dtype, form: str) -> None:
    assert errors[f"{activation}, {dtype}, {form}"] < TOLERANCE[dtype]


def test_fill(errors: dict[str, float]) -> None:
    assert errors["fill"] == 0


def test_numbers_of_activations_are_those_of_the_library() -> None:
    """The kernels take an activation's place in ACTIVATIONS, which is that of the C++ enumeration."""
    text = (ROOT / "exporters" / "ort" / "activation.h").read_text()
    names = re.findall(r"^  k(\w+),$", text, re.MULTILINE)
    assert [re.sub(r"(?<!^)([A-Z])", r"_\1", name).lower() for name in names] == list(ACTIVATIONS)
