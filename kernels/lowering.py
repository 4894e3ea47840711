"""Which implementation serves a call: a total table, read from the top. The last row of an op always matches.

Adding a lowering is one row and one kernel. A row that does not serve a request says why, so that a choice can be
explained to a user.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from lte_compile.kernels.layout import is_neuron_major
from lte_compile.kernels.sparse_ffn_cpu import sparse_ffn_cpu
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall, sparse_ffn_reference

SPARSE_FFN = "lte::sparse_ffn"
# Beyond this the union of the tokens' experts is nearly every expert, and finding it costs more than it saves.
MAX_CPU_TOKENS = 4
# Every program of the last launch lists the active experts itself, from one flag each, in registers.
MAX_LISTED_EXPERTS = 2048
# All tokens' sums stay in a program's registers; beyond this a matrix product is no longer limited by reading weights.
MAX_BATCH_TOKENS = 64
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Request(NamedTuple):
    """What a choice may depend on: never the values of a tensor. A tuple, as one is made and hashed in every call."""

    op: str
    device: str
    dtype: torch.dtype
    tokens: int
    width: int
    neurons: int
    experts: int
    expert_size: int
    gated: bool
    activation: str
    unequal_experts: bool
    down_is_neuron_major: bool
    contiguous: bool
    constants_elsewhere: bool = False
    interleaved: bool = False
    density: float | None = None  # share of active experts to expect, where it was calibrated


@dataclass(frozen=True)
class Lowering:
    """One row: `refuse` gives the reason why `kernel` cannot or should not serve a request, or None if it does."""

    op: str
    name: str
    refuse: Callable[[Request], str | None]
    kernel: Callable[[SparseFfnCall], Tensor]


@dataclass(frozen=True)
class Choice:
    """The lowering that serves a request, and why each row above it does not."""

    lowering: Lowering
    refusals: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.lowering.op}: {self.lowering.name}"]
        return "\n".join(lines + [f"  not {name}: {reason}" for name, reason in self.refusals.items()])


def _refuse_cpu(request: Request) -> str | None:
    if request.device != "cpu":
        return f"runs on a CPU, not on {request.device}"
    if request.tokens > MAX_CPU_TOKENS:
        return f"{request.tokens} tokens; pays off up to {MAX_CPU_TOKENS}"
    return None


def _refuse_decode(request: Request) -> str | None:
    if request.tokens != 1:
        return f"serves one token; got {request.tokens}"
    return _refuse_triton(request)


def _refuse_batch(request: Request) -> str | None:
    if not 2 <= request.tokens <= MAX_BATCH_TOKENS:
        return f"serves 2 to {MAX_BATCH_TOKENS} tokens; got {request.tokens}"
    if request.interleaved:
        return "up and gate must be contiguous; they are every other row of one projection"
    return _refuse_triton(request)


def _refuse_triton(request: Request) -> str | None:
    checks = (
        (request.device != "cuda", f"needs a CUDA device; x is on {request.device}"),
        (not _has_triton(), "triton is not installed"),
        (request.dtype not in TRITON_DTYPES, f"serves float32, float16 and bfloat16; got {request.dtype}"),
        (request.unequal_experts, "serves experts of one size; expert_offsets were given"),
        (not request.contiguous, "router, projections, biases and constants must be contiguous"),
        (request.constants_elsewhere, "a constant of the hidden region is on another device than x"),
        (not request.down_is_neuron_major, "the down-projection must be neuron-major (layout.neuron_major)"),
        (request.experts > MAX_LISTED_EXPERTS, f"{request.experts} experts; lists up to {MAX_LISTED_EXPERTS}"),
    )
    return next((reason for applies, reason in checks if applies), None)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _decode(call: SparseFfnCall) -> Tensor:
    from lte_compile.kernels.triton_decode import sparse_ffn_decode  # triton exists on Linux only

    return sparse_ffn_decode(call)


def _batch(call: SparseFfnCall) -> Tensor:
    from lte_compile.kernels.triton_batch import sparse_ffn_batch

    return sparse_ffn_batch(call)


def _never_refuse(request: Request) -> None:
    return None


LOWERINGS: tuple[Lowering, ...] = (
    Lowering(SPARSE_FFN, "triton-decode", _refuse_decode, _decode),
    Lowering(SPARSE_FFN, "triton-batch", _refuse_batch, _batch),
    Lowering(SPARSE_FFN, "cpu-runs", _refuse_cpu, sparse_ffn_cpu),
    Lowering(SPARSE_FFN, "reference", _never_refuse, sparse_ffn_reference),
)


@lru_cache(maxsize=4096)  # requests repeat: every layer, every token
def choose(request: Request) -> Choice:
    """The first row of the table that serves the request; a ValueError for an op that the table does not hold."""
    refusals: dict[str, str] = {}
    for lowering in LOWERINGS:
        if lowering.op != request.op:
            continue
        reason = lowering.refuse(request)
        if reason is None:
            return Choice(lowering, refusals)
        refusals[lowering.name] = reason
    raise ValueError(f"no lowering for {request.op!r}; known are {', '.join(sorted({row.op for row in LOWERINGS}))}")


def describe(call: SparseFfnCall) -> Request:
    """The request that a call of lte::sparse_ffn makes."""
    x_D, weights = call.x_D, call.weights
    neurons, width = weights.up_FD.shape
    return Request(
        op=SPARSE_FFN,
        device=x_D.device.type,
        dtype=weights.up_FD.dtype,
        tokens=x_D.numel() // width if width else 0,
        width=width,
        neurons=neurons,
        experts=call.router_ED.shape[0],
        expert_size=call.expert_size,
        gated=weights.gate_FD is not None,
        activation=call.activation,
        unequal_experts=call.offsets_E1 is not None,
        down_is_neuron_major=is_neuron_major(weights.down_DF),
        contiguous=_is_contiguous(call),
        interleaved=not weights.up_FD.is_contiguous(),
        constants_elsewhere=any(constant.device != x_D.device for constant in call.constants),
        density=call.density,
    )


def _is_contiguous(call: SparseFfnCall) -> bool:
    """Up and gate may be every other row of one projection, as long as each row is contiguous."""
    _, router, router_bias, (up, gate, _, up_bias, gate_bias, down_bias), *_ = call
    whole = (router, router_bias, down_bias, *call.constants)
    rows = up.stride(1) == 1 and (gate is None or gate.stride() == up.stride())
    steps = {bias.stride() for bias in (up_bias, gate_bias) if bias is not None}
    return rows and len(steps) <= 1 and all(t.is_contiguous() for t in whole if t is not None)


def lower_sparse_ffn(call: SparseFfnCall) -> Tensor:
    """Run the call through the lowering that the table chooses."""
    return choose(describe(call)).lowering.kernel(call)
