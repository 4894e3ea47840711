"""Runs the decode kernels in Triton's interpreter; prints {case: relative error} as JSON (tests.kernels)."""

from __future__ import annotations

import json
import sys
from functools import partial

import torch

from lte_compile.kernels.triton_decode import DecodeConfig, sparse_ffn_two_launches
from tests.kernels.interpreted import error, errors_of
from tests.kernels.problems import Shape, interleaved, make_call

CONFIG = DecodeConfig(up_rows=4, up_block=16, down_rows=8, down_block=16, down_splits=3)
SHAPES = {
    "even": Shape((1,), 32, 64, 16),
    "primes": Shape((1, 1), 37, 61, 12),
    "size 1": Shape((1,), 8, 11, 1),
    "one expert": Shape((1,), 16, 24, 24),
}


def main() -> None:
    kernel = partial(sparse_ffn_two_launches, config=CONFIG)
    errors = errors_of(kernel, SHAPES)
    errors["interleaved halves"] = error(kernel, interleaved(make_call(SHAPES["primes"], dtype=torch.float32)))
    json.dump(errors, sys.stdout)


if __name__ == "__main__":
    main()
