"""Runs the kernels with a router that reads another tensor than the FFN, in Triton's interpreter; prints {case:
relative error} as JSON (tests.kernels)."""

from __future__ import annotations

import json
import sys
from functools import partial

import torch

from lte_compile.kernels.masked_dense import sparse_ffn_masked_dense
from lte_compile.kernels.triton_batch import sparse_ffn_batch
from lte_compile.kernels.triton_decode import sparse_ffn_two_launches
from lte_compile.kernels.triton_decode_list import sparse_ffn_decode_list
from lte_compile.kernels.triton_decode_whole import sparse_ffn_decode_whole
from lte_compile.kernels.triton_prefill import sparse_ffn_prefill
from tests.kernels import interpreted_batch, interpreted_decode, interpreted_decode_list, interpreted_decode_whole
from tests.kernels.interpreted import Kernel, error, poison_empty
from tests.kernels.problems import Shape, make_call, with_router_input

KERNELS: dict[str, tuple[Kernel, int]] = {
    "decode": (partial(sparse_ffn_two_launches, config=interpreted_decode.CONFIG), 1),
    "decode list": (partial(sparse_ffn_decode_list, config=interpreted_decode_list.CONFIG), 3),
    "decode whole": (partial(sparse_ffn_decode_whole, config=interpreted_decode_whole.CONFIG), 1),
    "batch": (partial(sparse_ffn_batch, config=interpreted_batch.CONFIG), 3),
    "prefill": (sparse_ffn_prefill, 5),
    "masked dense": (sparse_ffn_masked_dense, 5),
}
COLUMNS = {"narrower": 19, "wider": 53}  # than the FFN's 37, of which neither is a multiple of a tile


def main() -> None:
    torch.manual_seed(0)
    poison_empty()
    errors = {}
    for name, (kernel, tokens) in KERNELS.items():
        for width, columns in COLUMNS.items():
            for dtype in (torch.float32, torch.float16):
                call = with_router_input(make_call(Shape((tokens,), 37, 61, 12), dtype=dtype), columns)
                errors[f"{name}, {width}, {dtype}"] = error(kernel, call)
    json.dump(errors, sys.stdout)


if __name__ == "__main__":
    main()
