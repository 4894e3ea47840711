"""Runs the kernels for small layers in Triton's interpreter; prints {case: relative error} as JSON (tests.kernels)."""

from __future__ import annotations

import json
import sys
from functools import partial

import torch

from lte_compile.kernels.router_features import features_reference
from lte_compile.kernels.triton_decode_small import SmallConfig, features_of_one, sparse_ffn_decode_small
from tests.kernels import interpreted_decode
from tests.kernels.interpreted import error, errors_of
from tests.kernels.problems import interleaved, make_call, relative_error, with_router_input

CONFIG = SmallConfig(down_rows=16, down_steps=2, down_block=16)
FEATURES = {"even": (32, 8), "primes": (37, 5), "one": (8, 1)}  # width, rank


def main() -> None:
    kernel = partial(sparse_ffn_decode_small, config=CONFIG)
    errors = errors_of(kernel, interpreted_decode.SHAPES)
    primes = make_call(interpreted_decode.SHAPES["primes"], dtype=torch.float32)
    errors["interleaved halves"] = error(kernel, interleaved(primes))
    for name, columns in (("narrower", 19), ("wider", 53)):
        errors[f"router input {name}"] = error(kernel, with_router_input(primes, columns))
    for name, (width, rank) in FEATURES.items():
        for dtype in (torch.float32, torch.float16):
            x, w, b = (torch.randn(size).to(dtype) for size in ((1, 1, width), (rank, width), (rank,)))
            expected = features_reference(x.double(), w.double(), b.double())
            errors[f"features {name}, {dtype}"] = relative_error(features_of_one(x, w, b), expected)
    json.dump(errors, sys.stdout)


if __name__ == "__main__":
    main()
