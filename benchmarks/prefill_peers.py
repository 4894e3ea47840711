# mypy: disable-error-code="no-untyped-call, untyped-decorator"
"""Published ways to run experts for many tokens, written for experts chosen by a threshold; gated SiLU FFNs.

All take rows sorted by expert, listed on the host beforehand (`rows_of`): that costs a synchronisation, which is kept
out of their times.
Shape suffixes: T tokens, D model width, F neurons, E experts, S neurons of one expert, R pairs of token and expert.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall, active_experts

BLOCK_ROWS = 64  # of the padded grouped product; an expert's rows are padded to it


class Rows(NamedTuple):
    """Pairs of token and expert, sorted by expert; `padded` has -1 where an expert's rows are filled up."""

    tokens_R: Tensor
    experts_R: Tensor
    ends_E: Tensor  # int32
    padded_tokens_P: Tensor
    block_experts_B: Tensor


def rows_of(layer: SparseFfnCall) -> Rows:
    active_ET = active_experts(layer).reshape(-1, len(layer.router_ED)).t()
    experts_R, tokens_R = active_ET.nonzero().unbind(1)
    counts_E = active_ET.sum(1)
    blocks_E = (counts_E + BLOCK_ROWS - 1) // BLOCK_ROWS
    block_experts_B = torch.arange(len(counts_E), device=counts_E.device).repeat_interleave(blocks_E)
    first_place_E = (blocks_E.cumsum(0) - blocks_E) * BLOCK_ROWS - (counts_E.cumsum(0) - counts_E)
    padded_P = torch.full((len(block_experts_B) * BLOCK_ROWS,), -1, dtype=torch.int32, device=counts_E.device)
    padded_P[torch.arange(len(tokens_R), device=counts_E.device) + first_place_E[experts_R]] = tokens_R.int()
    return Rows(tokens_R, experts_R, counts_E.cumsum(0).int(), padded_P, block_experts_B.int())


def _of_experts(matrix_FD: Tensor, size: int) -> Tensor:
    return matrix_FD.view(-1, size, matrix_FD.shape[1])


def _grouped_hidden(layer: SparseFfnCall, rows: Rows) -> Tensor:
    """Hidden values [R, S], one torch._grouped_mm for up and one for gate."""
    weights, size = layer.weights, layer.expert_size
    assert weights.gate_FD is not None
    x_RD = layer.x_D[rows.tokens_R]
    grouped: Any = torch._grouped_mm
    up_RS = grouped(x_RD, _of_experts(weights.up_FD, size).transpose(1, 2), offs=rows.ends_E)
    gate_RS = grouped(x_RD, _of_experts(weights.gate_FD, size).transpose(1, 2), offs=rows.ends_E)
    hidden_RS: Tensor = F.silu(gate_RS) * up_RS
    return hidden_RS


def grouped_mm(layer: SparseFfnCall, rows: Rows) -> Tensor:
    """A mixture of experts as torch writes one: gathered rows, three grouped products, a sum by index_add."""
    hidden_RS = _grouped_hidden(layer, rows)
    grouped: Any = torch._grouped_mm
    y_RD = grouped(hidden_RS, _of_experts(layer.weights.down_DF.t(), layer.expert_size), offs=rows.ends_E)
    return torch.zeros_like(layer.x_D).index_add_(0, rows.tokens_R, y_RD)


def grouped_mm_dense_down(layer: SparseFfnCall, rows: Rows) -> Tensor:
    """The same up to the hidden values, which are scattered for a dense down-projection."""
    neurons, experts = len(layer.weights.up_FD), len(layer.router_ED)
    hidden_TF = layer.x_D.new_zeros(len(layer.x_D), neurons)
    hidden_TF.view(-1, experts, layer.expert_size)[rows.tokens_R, rows.experts_R] = _grouped_hidden(layer, rows)
    return F.linear(hidden_TF, layer.weights.down_DF)


def padded_grouped(layer: SparseFfnCall, rows: Rows, joined_EJD: Tensor) -> Tensor:
    """Two Triton products over rows padded to blocks of one expert, as vLLM's fused MoE runs; `joined_EJD` holds
    each expert's gate and up rows."""
    size, pairs = layer.expert_size, len(rows.padded_tokens_P)
    down_EDS = _of_experts(layer.weights.down_DF.t(), size).transpose(1, 2)
    both_PJ = _padded_product(layer.x_D, rows.padded_tokens_P, rows, joined_EJD)
    hidden_PS = F.silu(both_PJ[:, :size]) * both_PJ[:, size:]
    places_P = torch.arange(pairs, dtype=torch.int32, device=hidden_PS.device)
    y_PD = _padded_product(hidden_PS, places_P, rows, down_EDS)
    tokens_P = rows.padded_tokens_P
    target_TD = layer.x_D.new_zeros(len(layer.x_D) + 1, y_PD.shape[1])  # the row of padding comes last
    return target_TD.index_add_(0, torch.where(tokens_P < 0, len(layer.x_D), tokens_P), y_PD)[:-1]


def _padded_product(a: Tensor, row_P: Tensor, rows: Rows, weights_ENK: Tensor) -> Tensor:
    _, n, k = weights_ENK.shape
    out_PN = torch.empty(len(row_P), n, dtype=a.dtype, device=a.device)
    block_n, block_k = min(128, n), min(64, k)
    _product_of_blocks[(len(rows.block_experts_B), triton.cdiv(n, block_n))](
        a,
        row_P,
        rows.block_experts_B,
        weights_ENK,
        out_PN,
        n,
        k,
        *weights_ENK.stride(),
        BLOCK_M=BLOCK_ROWS,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=4,
        num_stages=4,
    )
    return out_PN


@triton.jit
def _product_of_blocks(  # type: ignore[no-untyped-def]
    a_ptr,
    rows_ptr,
    experts_ptr,
    w_ptr,
    out_ptr,
    N,
    K,
    stride_e,
    stride_n,
    stride_k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    block = tl.program_id(0)
    expert = tl.load(experts_ptr + block).to(tl.int64)
    place_M = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_M = tl.load(rows_ptr + place_M)
    column_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    sum_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k_K = start + tl.arange(0, BLOCK_K)
        a_MK = tl.load(
            a_ptr + row_M[:, None].to(tl.int64) * K + k_K[None, :],
            mask=(row_M >= 0)[:, None] & (k_K < K)[None, :],
            other=0.0,
        )
        w_KN = tl.load(
            w_ptr + expert * stride_e + k_K[:, None] * stride_k + column_N[None, :] * stride_n,
            mask=(k_K < K)[:, None] & (column_N < N)[None, :],
            other=0.0,
        )
        sum_MN = tl.dot(a_MK, w_KN, sum_MN)
    tl.store(
        out_ptr + place_M[:, None] * N + column_N[None, :],
        sum_MN.to(out_ptr.dtype.element_ty),
        mask=(column_N < N)[None, :],
    )
