"""Runs the decode kernels that read every expert in Triton's interpreter; prints {case: relative error} as JSON."""

from __future__ import annotations

import json
import sys
from functools import partial

import torch

from lte_compile.kernels.ffn import FfnWeights
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall, active_experts, sparse_ffn_reference
from lte_compile.kernels.triton_decode_whole import WholeConfig, sparse_ffn_decode_whole
from tests.kernels.interpreted import error, errors_of
from tests.kernels.problems import Shape, interleaved, make_call, relative_error

CONFIG = WholeConfig(up_rows=4, down_rows=8, down_block=16, down_programs=4)
SHAPES = {
    "even": Shape((1,), 32, 64, 16),
    "primes": Shape((1, 1), 37, 61, 12),
    "size 1": Shape((1,), 8, 11, 1),
    "one expert": Shape((1,), 16, 24, 24),
}


def poisoned() -> SparseFfnCall:
    """A call whose unselected experts have NaN for weights."""
    call = make_call(SHAPES["even"], dtype=torch.float32, biases=False)
    active_F = active_experts(call)[0].repeat_interleave(call.expert_size)
    assert 0 < int(active_F.sum()) < len(active_F)
    for weight_FD in (call.weights.up_FD, call.weights.gate_FD, call.weights.down_DF.t()):
        assert weight_FD is not None
        weight_FD[~active_F] = float("nan")
    return call


def main() -> None:
    kernel = partial(sparse_ffn_decode_whole, config=CONFIG)
    errors = errors_of(kernel, SHAPES)
    errors["interleaved halves"] = error(kernel, interleaved(make_call(SHAPES["primes"], dtype=torch.float32)))
    unsplit = partial(sparse_ffn_decode_whole, config=WholeConfig(down_rows=8, down_block=16, down_programs=1))
    errors["unsplit"] = error(unsplit, make_call(SHAPES["primes"], dtype=torch.float32))
    call = poisoned()
    clean = call._replace(weights=FfnWeights._make(None if t is None else t.nan_to_num() for t in call.weights))
    errors["weights of unselected experts are NaN"] = relative_error(kernel(call), sparse_ffn_reference(clean))
    json.dump(errors, sys.stdout)


if __name__ == "__main__":
    main()
