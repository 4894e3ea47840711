"""Runs the decode kernels over a list of experts in Triton's interpreter; prints {case: relative error} as JSON."""

from __future__ import annotations

import json
import sys
from functools import partial

import torch

from lte_compile.kernels.triton_decode_list import ListConfig, sparse_ffn_decode_list
from tests.kernels.interpreted import error, errors_of
from tests.kernels.problems import Shape, interleaved, make_call

CONFIG = ListConfig(up_programs=2, down_rows=8, down_block=16, down_programs=4)
SHAPES = {
    "one token": Shape((1,), 32, 64, 16),
    "primes": Shape((1, 1), 37, 61, 12),
    "three tokens": Shape((3,), 37, 61, 12),
    "size 1": Shape((2,), 8, 11, 1),
    "one expert": Shape((1,), 16, 24, 24),
}


def main() -> None:
    kernel = partial(sparse_ffn_decode_list, config=CONFIG)
    errors = errors_of(kernel, SHAPES)
    errors["interleaved halves"] = error(kernel, interleaved(make_call(SHAPES["three tokens"], dtype=torch.float32)))
    unsplit = partial(sparse_ffn_decode_list, config=ListConfig(down_rows=8, down_block=16, down_programs=1))
    errors["unsplit"] = error(unsplit, make_call(SHAPES["three tokens"], dtype=torch.float32))
    json.dump(errors, sys.stdout)


if __name__ == "__main__":
    main()
