"""Rows gathered on a CPU: in parts, into memory that a thread uses again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor

from lte_compile.kernels import sparse_ffn_cpu as cpu
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall, sparse_ffn_reference
from tests.kernels.problems import SHAPES, Shape, make_call, relative_error, with_tokens

# Sums in another order; half precision rounds the hidden value once, as the reference does, and the output once.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(autouse=True)
def always_gathering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "GATHER_COST", 0.0)
    monkeypatch.setattr(cpu, "AT_HAND_BYTES", 0)


def _bytes_of_rows(call: SparseFfnCall, rows: int) -> int:
    up_FD = call.weights.up_FD
    return rows * max(up_FD.shape[1], call.weights.down_DF.shape[0]) * up_FD.element_size()


@pytest.mark.parametrize("rows", [1, 3, 1000], ids=["row by row", "in threes", "at once"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parts_sum_to_the_reference(
    monkeypatch: pytest.MonkeyPatch, shape: Shape, tokens: int, dtype: torch.dtype, rows: int
) -> None:
    torch.manual_seed(0)
    call = make_call(with_tokens(shape, tokens), dtype=dtype)
    monkeypatch.setattr(cpu, "GATHERED_BYTES", _bytes_of_rows(call, rows))
    assert relative_error(cpu.sparse_ffn_cpu(call), sparse_ffn_reference(call)) < TOLERANCE[dtype]


def test_memory_of_one_mode_and_dtype_serves_the_others() -> None:
    torch.manual_seed(0)
    calls = {dtype: make_call(Shape((1,), 64, 256, 4), dtype=dtype) for dtype in TOLERANCE}

    def run() -> None:
        for dtype, call in calls.items():
            for weight in (call.weights.up_FD, call.weights.down_DF):
                weight.requires_grad_()
            with torch.inference_mode():  # in which a new thread's memory is made
                inside = cpu.sparse_ffn_cpu(call)
            with torch.no_grad():
                outside = cpu.sparse_ffn_cpu(call)
            assert torch.equal(inside, outside)
            assert relative_error(outside, sparse_ffn_reference(call)) < TOLERANCE[dtype]

    with ThreadPoolExecutor(1) as pool:
        pool.submit(run).result()


def test_threads_do_not_share_their_rows() -> None:
    torch.manual_seed(0)
    calls = [make_call(Shape((1,), 64, 256, 4), dtype=torch.float64) for _ in range(4)]
    expected, together = [sparse_ffn_reference(call) for call in calls], Barrier(len(calls), timeout=60)

    def run(call: SparseFfnCall) -> list[Tensor]:
        together.wait()
        return [cpu.sparse_ffn_cpu(call) for _ in range(50)]

    with ThreadPoolExecutor(len(calls)) as pool:
        for outputs, wanted in zip(pool.map(run, calls), expected, strict=True):
            assert max(relative_error(output, wanted) for output in outputs) < TOLERANCE[torch.float64]


def test_small_experts_are_gathered_and_large_ones_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    gathered: list[int] = []

    def gather(call: SparseFfnCall, *rest: object) -> Tensor:
        gathered.append(call.expert_size)
        return sparse_ffn_reference(call)

    monkeypatch.setattr(cpu, "_by_gathering", gather)
    torch.manual_seed(0)
    small = make_call(Shape((1,), 64, 1024, 4), dtype=torch.float32)
    large = make_call(Shape((1,), 1024, 4096, 1024), dtype=torch.float32)
    for call in (small, large):
        cpu.sparse_ffn_cpu(call)
    assert gathered == [4]
