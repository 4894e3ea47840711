"""Runs the batch kernels in Triton's interpreter and prints {case: relative error} as JSON.

A program of its own, because TRITON_INTERPRET is read when triton is first imported. Scratch memory
comes filled with NaN.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor

from lte_compile.kernels.activations import ACTIVATIONS
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall, sparse_ffn_reference
from lte_compile.kernels.triton_batch import BatchConfig, sparse_ffn_batch
from tests.kernels.problems import PROGRAMS, Shape, in_float64, make_call, make_program_call, relative_error

CONFIG = BatchConfig(
    score_block=16, score_splits=2, up_neurons=16, up_block=16, down_neurons=16, down_block=16, down_programs=8
)
SHAPES = {
    "two": Shape((2,), 32, 64, 16),
    "primes": Shape((3, 1), 37, 61, 12),
    "size 1": Shape((5,), 8, 11, 1),
    "one expert": Shape((17,), 16, 24, 24),
    "large experts": Shape((2, 2), 16, 100, 40),
}


def poison_empty() -> None:
    plain_empty = torch.empty

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        memory = plain_empty(*args, **kwargs)
        return memory.fill_(float("nan") if memory.is_floating_point() else 12345)

    torch.empty = empty


def error(call: SparseFfnCall) -> float:
    return relative_error(sparse_ffn_batch(call, CONFIG), sparse_ffn_reference(in_float64(call)))


def main() -> None:
    torch.manual_seed(0)
    poison_empty()
    errors: dict[str, float] = {}
    for name, shape in SHAPES.items():
        for dtype in (torch.float32, torch.float16):
            for form, gated, biases in (("gated", True, False), ("plain", False, True)):
                errors[f"{name}, {dtype}, {form}"] = error(make_call(shape, gated=gated, biases=biases, dtype=dtype))
    for activation in ACTIVATIONS:
        errors[activation] = error(make_call(SHAPES["primes"], dtype=torch.float32, activation=activation))
    errors["all active"] = error(make_call(SHAPES["primes"], dtype=torch.float32, tau=-1.0))
    errors["none active"] = error(make_call(SHAPES["primes"], dtype=torch.float32, tau=1.0))
    for name, text in PROGRAMS.items():
        for dtype in (torch.float32, torch.float16):
            errors[f"program {name}, {dtype}"] = error(make_program_call(SHAPES["primes"], text, dtype=dtype))
    json.dump(errors, sys.stdout)


if __name__ == "__main__":
    main()
