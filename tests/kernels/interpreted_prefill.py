"""Runs the kernels for many tokens in Triton's interpreter; prints {case: relative error} as JSON (tests.kernels)."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lte_compile.kernels.fused_up import FusedTile, sparse_ffn_fused_up
from lte_compile.kernels.grouped_tile import GroupedTile
from lte_compile.kernels.masked_dense import MaskConfig, sparse_ffn_masked_dense
from lte_compile.kernels.sparse_ffn_reference import sparse_ffn_reference
from lte_compile.kernels.token_lists import list_tokens
from lte_compile.kernels.triton_prefill import sparse_ffn_prefill
from tests.kernels.interpreted import Kernel, error, errors_of
from tests.kernels.problems import Shape, in_float64, interleaved, make_call

CHUNKED = MaskConfig(elements=32, from_end=False, in_gate=True, up_beside=False, parts=2, finishes=True, chunk=128)
KERNELS: dict[str, Kernel] = {
    "sorted": partial(sparse_ffn_prefill, config=GroupedTile(tokens=16, neurons=16, block=16)),
    "masked dense": partial(sparse_ffn_masked_dense, config=MaskConfig(elements=64)),
    "fused": partial(sparse_ffn_fused_up, config=FusedTile(tokens=16, neurons=16, block=16)),
}
SHAPES = {
    "65": Shape((65,), 64, 64, 16),  # wide enough to cut the router's sums
    "primes": Shape((7, 3), 37, 61, 12),
    "size 1": Shape((5,), 8, 11, 1),
    "one expert": Shape((17,), 16, 24, 24),
    "large experts": Shape((2, 2), 16, 100, 40),
}
LISTS = {"few": (5, 3), "one": (1, 1), "no tokens": (0, 4), "two scans": (2049, 2)}


def non_finite(kernel: Kernel) -> float:
    """A token with NaN, one with an infinity of each sign; the others must not notice."""
    call = make_call(SHAPES["primes"], dtype=torch.float32)
    call.x_D.view(-1, 37)[:3, 5] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    actual, expected = kernel(call), sparse_ffn_reference(in_float64(call)).float()
    if not torch.equal(actual.isnan(), expected.isnan()):
        return float("inf")
    finite = expected.isfinite()
    return float((actual[finite] - expected[finite]).norm() / expected[finite].norm())


def lists_differ(values_TE: Tensor, bias_E: Tensor | None, parts_STE: Tensor | None = None) -> float:
    tau = 0.6
    lists = list_tokens(
        values_TE if parts_STE is None else parts_STE, tau, bias_E=bias_E, are_logits=bias_E is not None
    )
    scores_TE = values_TE if bias_E is None else torch.sigmoid(values_TE + bias_E)
    expected = [column.nonzero().flatten().tolist() for column in (scores_TE > tau).t()]
    counts = lists.counts_E.tolist()
    return float([row[:n].tolist() for row, n in zip(lists.tokens_ET, counts, strict=True)] != expected)


def errors_of_lists() -> dict[str, float]:
    errors = {}
    for name, (tokens, experts) in LISTS.items():
        values_TE = torch.randn(tokens, experts)
        values_TE[:1] = float("nan")
        errors[f"lists: {name}, scores"] = lists_differ(values_TE, None)
        errors[f"lists: {name}, logits"] = lists_differ(values_TE, torch.randn(experts))
        parts_STE = torch.stack([values_TE / 4, values_TE / 2, values_TE / 4])
        errors[f"lists: {name}, parts"] = lists_differ(values_TE, torch.randn(experts), parts_STE)
        errors[f"lists: {name}, strided"] = lists_differ(values_TE.t().contiguous().t(), None)
    return errors


def errors_of_chunks() -> dict[str, float]:
    """More tokens than a chunk has; a plain FFN whose hidden values its product computes."""
    chunked = partial(sparse_ffn_masked_dense, config=CHUNKED)
    calls = {gated: make_call(Shape((2, 150), 64, 20, 8), gated=gated, dtype=torch.float32) for gated in (True, False)}
    plain = make_call(SHAPES["primes"], gated=False, dtype=torch.float16, activation="gelu_tanh")
    finished = partial(sparse_ffn_masked_dense, config=replace(CHUNKED, chunk=None))
    return {
        "three chunks, gated": error(chunked, calls[True]),
        "three chunks, plain": error(chunked, calls[False]),
        "finished by a product": error(finished, plain),
    }


def main() -> None:
    errors = {f"{name}: {case}": e for name, kernel in KERNELS.items() for case, e in errors_of(kernel, SHAPES).items()}
    for name, kernel in KERNELS.items():
        errors[f"{name}: non-finite"] = non_finite(kernel)
        errors[f"{name}: interleaved"] = error(kernel, interleaved(make_call(SHAPES["primes"], dtype=torch.float32)))
    json.dump(errors | errors_of_chunks() | errors_of_lists(), sys.stdout)


if __name__ == "__main__":
    main()
