"""What the programs that run kernels in Triton's interpreter have in common: their cases, and NaN in scratch memory.

Programs of their own, because TRITON_INTERPRET is read when triton is first imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lte_compile.kernels.activations import ACTIVATIONS
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall, sparse_ffn_reference
from tests.kernels.problems import PROGRAMS, Shape, in_float64, make_call, make_program_call, relative_error

ROOT = Path(__file__).resolve().parents[2]
Kernel = Callable[[SparseFfnCall], Tensor]


def run_interpreted(module: str) -> dict[str, float]:
    """The relative errors that `python -m module` prints, by case."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    errors: dict[str, float] = json.loads(done.stdout)
    return errors


def poison_empty() -> None:
    plain_empty = torch.empty

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        memory = plain_empty(*args, **kwargs)
        return memory.fill_(float("nan") if memory.is_floating_point() else 77)  # fits a byte

    torch.empty = empty


def error(kernel: Kernel, call: SparseFfnCall) -> float:
    return relative_error(kernel(call), sparse_ffn_reference(in_float64(call)))


def errors_of(kernel: Kernel, shapes: Mapping[str, Shape]) -> dict[str, float]:
    """{case: relative error}; `shapes` holds one called "primes"."""
    torch.manual_seed(0)
    poison_empty()
    primes = shapes["primes"]
    errors: dict[str, float] = {}
    for name, shape in shapes.items():
        for dtype in (torch.float32, torch.float16):
            for form, gated, biases in (("gated", True, False), ("plain", False, True)):
                call = make_call(shape, gated=gated, biases=biases, dtype=dtype)
                errors[f"{name}, {dtype}, {form}"] = error(kernel, call)
    for activation in ACTIVATIONS:
        errors[activation] = error(kernel, make_call(primes, dtype=torch.float32, activation=activation))
    for case, tau in (("all active", -1.0), ("none active", 1.0)):
        errors[case] = error(kernel, make_call(primes, dtype=torch.float32, tau=tau))
    for name, text in PROGRAMS.items():
        for dtype in (torch.float32, torch.float16):
            errors[f"program {name}, {dtype}"] = error(kernel, make_program_call(primes, text, dtype=dtype))
    return errors
