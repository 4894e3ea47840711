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

from lte_compile.kernels.ffn import FfnWeights
from lte_compile.kernels.grouped_tile import grouped_tile
from lte_compile.kernels.layout import is_neuron_major
from lte_compile.kernels.skipping_cost import LARGE_UP_BYTES, Layer, dense_cost, expected_union, grouped_cost
from lte_compile.kernels.sparse_ffn_cpu import sparse_ffn_cpu
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall, sparse_ffn_reference

SPARSE_FFN = "lte::sparse_ffn"
# Beyond this the union of the tokens' experts is nearly every expert, and finding it costs more than it saves.
MAX_CPU_TOKENS = 4
# Every program of the last launch lists the active experts itself, from one flag each, in registers.
MAX_LISTED_EXPERTS = 2048
# All tokens' sums stay in a program's registers; beyond this a matrix product is no longer limited by reading weights.
MAX_BATCH_TOKENS = 64
# Up to this many tokens the kernel for a few is as fast as dense even if every expert is needed (docs/kernels.md).
ALWAYS_BATCHED_TOKENS = 16
# Share of experts from which dense with zeroed gates is faster: measured on an H200 at .9 for 16 tokens, .7 for 32 and
# .8 for 64, on an H100 at .95, .9 and .9.
MAX_UNION_OF_FEW, MAX_UNION = 0.9, 0.75
# Of so large a layer (LLaMA-2-7B's has 270 MB) the kernel for a few tokens takes at most as long as dense whatever the
# density: 16 tokens that need every expert .99 times as long on an H100, dense with zeroed gates 1.03 times.
LARGE_LAYER_BYTES = 200e6
# One token of 4096 x 11008 on an H100: a list of the active experts takes 88.5 us at density .9 and 95.0 at .98,
# reading every expert 89.8. Its programs hold a whole row.
NEARLY_EVERY_EXPERT, MAX_WHOLE_WIDTH = 0.92, 8192
# Bytes of a small layer, and the density from which reading all of it is faster on an H100: SmolLM2-135M's (5 MB)
# takes 5.6 us to 7.0 at .1, GPT-2's (9 MB) 7.6 to 7.8 at .3, 1024 x 2816 (17 MB) 10.0 to 10.2 at .5.
WHOLE_SMALL_LAYERS = ((6e6, 0.1), (10e6, 0.3), (20e6, 0.5))
# What the device reads in the 5 us that the batch kernel's launches take longer (SmolLM2-135M, 8 tokens, H200).
LEAST_SAVED_BYTES = 20e6
MASKING = "dense with zeroed gates is faster"
# Router, up and gate in one launch, over dense on an H100: 576 x 1536 (5 MB) .74 to 1.07 from 8 to 8192 tokens, 1024 x
# 2816 (17 MB) .81 to 1.05 up to 512 tokens and 1.14 at 2048; GPT-2's plain FFN (9 MB) .97 to 1.02 at 32 and 128 tokens
# and 1.14 at 512, where dense products with zeroed gates take 1.22. At 8 these take 1.00, and one launch 1.02.
TINY_LAYER_BYTES, SMALL_LAYER_BYTES = 6e6, 20e6
MAX_FUSED_TOKENS, LEAST_PLAIN_TOKENS = 512, 9
# A choice that rests on an estimate should win by more than the estimate may be wrong.
LEAST_GAIN = 1.04
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
    mixed: bool = False  # x, router and projections are not of one dtype
    density: float | None = None  # share of active experts to expect, where it was calibrated
    own_router_input: bool = False  # the router reads another tensor than the FFN


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


def _refuse_whole(request: Request) -> str | None:
    """One token that selects nearly every expert of a large layer, or whatever of a small one: nothing is skipped."""
    tokens, density = request.tokens, request.density
    if tokens != 1:
        return f"serves one token; got {tokens}"
    if density is None:
        return "the share of active experts is unknown; it pays only from some share on"
    if density < _whole_from(request):
        return f"density {density:.2g}: leaving the other experts unread is faster"
    if request.width > MAX_WHOLE_WIDTH:
        return f"serves widths up to {MAX_WHOLE_WIDTH}; got {request.width}"
    return _refuse_triton(request)


def _whole_from(request: Request) -> float:
    """The density from which reading everything is faster; more than 1 where nobody measured it."""
    if request.width * request.neurons * request.dtype.itemsize >= LARGE_UP_BYTES:
        return NEARLY_EVERY_EXPERT
    return next((density for most, density in WHOLE_SMALL_LAYERS if _layer_bytes(request) <= most), 2.0)


def _refuse_batch(request: Request) -> str | None:
    tokens, density = request.tokens, request.density
    if not 2 <= tokens <= MAX_BATCH_TOKENS:
        return f"serves 2 to {MAX_BATCH_TOKENS} tokens; got {tokens}"
    if request.interleaved:
        return "up, gate and their biases must be contiguous, not every other row of one projection"
    if reason := _refuse_triton(request):
        return reason
    few = tokens <= ALWAYS_BATCHED_TOKENS
    if density is None and not few:
        return f"{tokens} tokens of unknown density may need every expert: {MASKING}"
    layer_bytes = _layer_bytes(request)
    union = 0.0 if density is None else expected_union(tokens, density)
    if few and layer_bytes >= LARGE_LAYER_BYTES:
        return None  # nothing is lost if masks are independent, much is won if they agree
    if union > (MAX_UNION_OF_FEW if few else MAX_UNION):
        return f"{tokens} tokens at density {density:.2g} need {union:.0%} of the experts: {MASKING}"
    if (1.0 - union) * layer_bytes < LEAST_SAVED_BYTES:
        return f"skipping saves at most {(1.0 - union) * layer_bytes / 1e6:.0f} MB of reading: {MASKING}"
    return None


def _refuse_prefill(request: Request) -> str | None:
    """Up and gate by lists of tokens: worth it where estimates say so; what is unknown is taken to be dense."""
    tokens, density = request.tokens, request.density
    if reason := _refuse_lists(request):
        return reason
    if tokens <= MAX_BATCH_TOKENS:
        return f"serves more than {MAX_BATCH_TOKENS} tokens; got {tokens}"
    if density is None:
        return "the share of active experts is unknown; it pays only if that is small"
    layer = Layer(
        request.width, request.neurons, request.experts, request.expert_size, 1 + request.gated, request.dtype
    )
    tile = grouped_tile(density * tokens, request.expert_size, request.dtype)
    gain = dense_cost(layer, tokens) / grouped_cost(layer, tokens, density, tile)
    if gain < LEAST_GAIN:
        return f"{tokens} tokens at density {density:.2g} would take {1 / gain:.2f} times as long as dense"
    return None


def _refuse_fused(request: Request) -> str | None:
    """One launch for router, up and gate: worth it where a launch takes as long as the arithmetic."""
    if reason := _refuse_everywhere(request):
        return reason
    if request.mixed or request.dtype == torch.float32:
        return "serves x, router and projections of one half-precision type"
    if request.own_router_input:
        return "the router must read what the FFN reads"
    if not request.gated and request.tokens < LEAST_PLAIN_TOKENS:
        return f"{request.tokens} tokens of a plain FFN: {MASKING}"
    layer_bytes = _layer_bytes(request)
    if layer_bytes > SMALL_LAYER_BYTES:
        return f"serves layers up to {SMALL_LAYER_BYTES / 1e6:.0f} MB; this one has {layer_bytes / 1e6:.0f} MB"
    if request.tokens > MAX_FUSED_TOKENS and not (request.gated and layer_bytes <= TINY_LAYER_BYTES):
        return f"serves up to {MAX_FUSED_TOKENS} tokens of a layer of {layer_bytes / 1e6:.0f} MB; got {request.tokens}"
    return None


def _layer_bytes(request: Request) -> int:
    return (2 + request.gated) * request.width * request.neurons * request.dtype.itemsize


def _refuse_triton(request: Request) -> str | None:
    """What the kernels that skip rows of the down-projection have in common."""
    if reason := _refuse_lists(request):
        return reason
    if not request.down_is_neuron_major:
        return "the down-projection must be neuron-major (layout.neuron_major)"
    return None


def _refuse_lists(request: Request) -> str | None:
    """What the kernels that list experts have in common."""
    if request.experts > MAX_LISTED_EXPERTS:
        return f"{request.experts} experts; lists up to {MAX_LISTED_EXPERTS}"
    return _refuse_everywhere(request)


def _refuse_everywhere(request: Request) -> str | None:
    """What all Triton kernels have in common."""
    checks = (
        (request.device != "cuda", f"needs a CUDA device; x is on {request.device}"),
        (not _has_triton(), "triton is not installed"),
        (request.tokens == 0, "there are no tokens"),
        (request.neurons == 0, "there are no neurons"),
        (request.dtype not in TRITON_DTYPES, f"serves float32, float16 and bfloat16; got {request.dtype}"),
        (request.unequal_experts, "serves experts of one size; expert_offsets were given"),
        (not request.contiguous, "router, projections, biases and constants must be contiguous"),
        (request.constants_elsewhere, "a constant of the hidden region is on another device than x"),
    )
    return next((reason for applies, reason in checks if applies), None)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _decode(call: SparseFfnCall) -> Tensor:
    from lte_compile.kernels.triton_decode import sparse_ffn_decode  # triton exists on Linux only

    return sparse_ffn_decode(call)


def _whole(call: SparseFfnCall) -> Tensor:
    from lte_compile.kernels.triton_decode_whole import sparse_ffn_decode_whole

    return sparse_ffn_decode_whole(call)


def _batch(call: SparseFfnCall) -> Tensor:
    from lte_compile.kernels.triton_batch import sparse_ffn_batch

    return sparse_ffn_batch(call)


def _prefill(call: SparseFfnCall) -> Tensor:
    from lte_compile.kernels.triton_prefill import sparse_ffn_prefill

    return sparse_ffn_prefill(call)


def _fused(call: SparseFfnCall) -> Tensor:
    from lte_compile.kernels.fused_up import sparse_ffn_fused_up

    return sparse_ffn_fused_up(call)


def _masked_dense(call: SparseFfnCall) -> Tensor:
    from lte_compile.kernels.masked_dense import sparse_ffn_masked_dense

    return sparse_ffn_masked_dense(call)


def _never_refuse(request: Request) -> None:
    return None


LOWERINGS: tuple[Lowering, ...] = (
    Lowering(SPARSE_FFN, "triton-whole", _refuse_whole, _whole),
    Lowering(SPARSE_FFN, "triton-decode", _refuse_decode, _decode),
    Lowering(SPARSE_FFN, "triton-batch", _refuse_batch, _batch),
    Lowering(SPARSE_FFN, "triton-prefill", _refuse_prefill, _prefill),
    Lowering(SPARSE_FFN, "triton-fused", _refuse_fused, _fused),
    Lowering(SPARSE_FFN, "masked-dense", _refuse_everywhere, _masked_dense),
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
        interleaved=_is_interleaved(weights),
        mixed=not (x_D.dtype == call.router_ED.dtype == weights.up_FD.dtype),
        constants_elsewhere=any(constant.device != x_D.device for constant in call.constants),
        density=call.density,
        own_router_input=call.router_x_C is not None,
    )


def _is_contiguous(call: SparseFfnCall) -> bool:
    """Up and gate may be every other row of one projection, as long as each row is contiguous."""
    _, router, router_bias, (up, gate, _, up_bias, gate_bias, down_bias), *_ = call
    whole = (router, router_bias, down_bias, *call.constants)
    rows = up.stride(1) == 1 and (gate is None or gate.stride() == up.stride())
    steps = {bias.stride() for bias in (up_bias, gate_bias) if bias is not None}
    return rows and len(steps) <= 1 and all(t.is_contiguous() for t in whole if t is not None)


def _is_interleaved(weights: FfnWeights) -> bool:
    """Whether rows or biases of up, which lie as gate's do, are apart from one another."""
    up, _, _, up_bias, gate_bias, _ = weights
    return not all(t.is_contiguous() for t in (up, up_bias, gate_bias) if t is not None)


def lower_sparse_ffn(call: SparseFfnCall) -> Tensor:
    """Run the call through the lowering that the table chooses."""
    return choose(describe(call)).lowering.kernel(call)
