"""Runs the decode kernels in Triton's interpreter and prints {case: relative error} as JSON.

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
from lte_compile.kernels.triton_decode import DecodeConfig, sparse_ffn_decode
from tests.kernels.problems import (
    PROGRAMS,
    Shape,
    in_float64,
    interleaved,
    make_call,
    make_program_call,
    relative_error,
)

CONFIG = DecodeConfig(up_rows=4, up_block=16, down_rows=8, down_block=16, down_splits=3)
SHAPES = {
    "even": Shape((1,), 32, 64, 16),
    "primes": Shape((1, 1), 37, 61, 12),
    "size 1": Shape((1,), 8, 11, 1),
    "one expert": Shape((1,), 16, 24, 24),
}


def poison_empty() -> None:
    plain_empty = torch.empty

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        memory = plain_empty(*args, **kwargs)
        return memory.fill_(float("nan") if memory.is_floating_point() else 12345)

    torch.empty = empty


def error(call: SparseFfnCall) -> float:
    return relative_error(sparse_ffn_decode(call, CONFIG), sparse_ffn_reference(in_float64(call)))


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
    errors["interleaved halves"] = error(interleaved(make_call(SHAPES["primes"], dtype=torch.float32)))
    json.dump(errors, sys.stdout)


if __name__ == "__main__":
    main()
