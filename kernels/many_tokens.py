"""What the lowerings for many tokens on a GPU share: the router as a matrix product, and streams beside the main one.

Shape suffixes: T tokens, D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)


@cache
def _side_stream(device: torch.device, lane: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def beside(like: Tensor, lane: int = 0) -> Iterator[None]:
    """Work inside runs on a side stream, after all that was launched before; `rejoin` makes the main stream wait.

    Memory that several streams use must be allocated outside and kept until `rejoin`. CUDA graphs capture all of them.
    On a CPU there is one stream only.
    """
    if not like.is_cuda:
        yield
        return
    side = _side_stream(like.device, lane)
    side.wait_stream(torch.cuda.current_stream(like.device))
    with torch.cuda.stream(side):
        yield


@contextmanager
def on_lane(like: Tensor, lane: int) -> Iterator[None]:
    """Work inside goes on on a side stream that `beside` has opened."""
    if not like.is_cuda:
        yield
        return
    with torch.cuda.stream(_side_stream(like.device, lane)):
        yield


def rejoin(like: Tensor, lane: int = 0) -> None:
    """The main stream goes on when the side stream is done."""
    if like.is_cuda:
        torch.cuda.current_stream(like.device).wait_stream(_side_stream(like.device, lane))


def router_parts(tokens: int, width: int) -> int:
    """Into how many parts to cut a router's sums, so that enough programs share them: 4 were the best of 1, 2, 4 and 8
    at 128 and 512 tokens (344 experts of width 4096 on an H200), 1 or 2 at 2048."""
    return 4 if tokens <= 1024 and width % 64 == 0 else 1


def router_product(a_MD: Tensor, b_ND: Tensor, out_SMN: Tensor) -> None:
    """Parts of a b^T in fp32, to be added up; one of a and b is x and the other the router.

    Products of equal half-precision types are exact in fp32, so the tensor cores take them as they are; only the order
    of addition differs from the reference's.
    """
    parts = len(out_SMN)
    exact = a_MD.is_cuda and a_MD.dtype == b_ND.dtype and a_MD.dtype in HALVES
    if not exact:
        a_MD, b_ND = a_MD.float(), b_ND.float()
    a_SMK, b_SKN = _parts(a_MD, parts), _parts(b_ND, parts).mT
    if exact:
        torch.bmm(a_SMK, b_SKN, out_dtype=torch.float32, out=out_SMN)
    else:
        torch.bmm(a_SMK, b_SKN, out=out_SMN)


def _parts(matrix_MD: Tensor, parts: int) -> Tensor:
    return matrix_MD.view(len(matrix_MD), parts, -1).transpose(0, 1)
