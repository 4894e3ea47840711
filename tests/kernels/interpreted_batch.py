"""Runs the batch kernels in Triton's interpreter; prints {case: relative error} as JSON (tests.kernels)."""

from __future__ import annotations

import json
import sys
from functools import partial

from lte_compile.kernels.triton_batch import BatchConfig, sparse_ffn_batch
from tests.kernels.interpreted import errors_of
from tests.kernels.problems import Shape

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


def main() -> None:
    json.dump(errors_of(partial(sparse_ffn_batch, config=CONFIG), SHAPES), sys.stdout)


if __name__ == "__main__":
    main()
