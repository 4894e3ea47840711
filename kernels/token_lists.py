# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Which tokens each expert serves, listed on the device: what a grouped product gathers its rows by.

One launch, a program per expert: it reads the expert's score for every token, and writes the tokens that select it in
ascending order by a prefix sum over its flags. No host sync: the lists have room for every token, and how many places
are taken stays on the device.
Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Flags that a program scans at once: a prefix sum of this length stays within a few registers of each thread.
MAX_SCAN = 2048


class TokenLists(NamedTuple):
    """Expert e serves tokens_ET[e, : counts_E[e]], ascending; what lies beyond is unset. Both int32."""

    tokens_ET: Tensor
    counts_E: Tensor


def list_tokens(values_TE: Tensor, tau: float, *, bias_E: Tensor | None = None, are_logits: bool = False) -> TokenLists:
    """The tokens whose value is above `tau`, for every expert. A NaN lists nothing.

    `values_TE` are scores or gates of any strides and floating dtype, compared in fp32; or logits, whose score is
    sigmoid(value + bias). Values [S, T, E] are S parts of a sum. Reading is fastest where an expert's values are
    contiguous (`.mT` of an [E, T] tensor).
    """
    *parts, tokens, experts = values_TE.shape
    lists_ET = torch.empty(experts, tokens, dtype=torch.int32, device=values_TE.device)
    counts_E = torch.empty(experts, dtype=torch.int32, device=values_TE.device)
    if experts == 0:
        return TokenLists(lists_ET, counts_E)
    scan = max(16, min(MAX_SCAN, int(triton.next_power_of_2(tokens))))
    with torch.cuda.device_of(values_TE):
        scan_tokens[(experts,)](
            values_TE,
            bias_E,
            lists_ET,
            counts_E,
            tau,
            tokens,
            values_TE.stride(-2),
            values_TE.stride(-1),
            values_TE.stride(0),
            PARTS=parts[0] if parts else 1,
            ARE_LOGITS=are_logits,
            BLOCK=scan,
            num_warps=4 if scan <= 1024 else 8,
        )
    return TokenLists(lists_ET, counts_E)


@triton.jit
def sum_of_parts(values_ptr, place, part_stride, exists, PARTS: tl.constexpr):
    """Values that are sums of parts, added in a fixed order, in fp32."""
    value = tl.load(values_ptr + place, mask=exists, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        value += tl.load(values_ptr + part * part_stride + place, mask=exists, other=0.0).to(tl.float32)
    return value


@triton.jit
def selects(value, bias_ptr, expert, exists, tau, ARE_LOGITS: tl.constexpr):
    """Whether values in fp32 select an expert: value > tau, or sigmoid(value + bias) > tau. NaN does not."""
    if ARE_LOGITS:
        if bias_ptr is not None:
            value += tl.load(bias_ptr + expert, mask=exists, other=0.0).to(tl.float32)
        value = tl.sigmoid(value)
    return value > tau


@triton.jit
def scan_tokens(
    values_ptr,
    bias_ptr,
    lists_ptr,
    counts_ptr,
    tau,
    tokens,
    token_stride,
    expert_stride,
    part_stride,
    PARTS: tl.constexpr,
    ARE_LOGITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The list of one expert."""
    expert = tl.program_id(0).to(tl.int64)
    listed = tl.zeros([], tl.int32)
    for start in range(0, tokens, BLOCK):
        token_T = start + tl.arange(0, BLOCK)
        exists_T = token_T < tokens
        place_T = token_T.to(tl.int64) * token_stride + expert * expert_stride
        value_T = sum_of_parts(values_ptr, place_T, part_stride, exists_T, PARTS)
        selects_T = selects(value_T, bias_ptr, expert, expert >= 0, tau, ARE_LOGITS) & exists_T
        flag_T = selects_T.to(tl.int32)
        position_T = listed + tl.cumsum(flag_T, 0) - 1
        tl.store(lists_ptr + expert * tokens + position_T, token_T, mask=selects_T)
        listed += tl.sum(flag_T, 0)
    tl.store(counts_ptr + expert, listed)
