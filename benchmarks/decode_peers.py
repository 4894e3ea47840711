# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Published ways to skip weights for one token, written for benchmarks.decode from their papers; gated SiLU FFNs.

- TEAL (Liu et al., 2024): inputs of small magnitude are left out. Weights are column-major: an input left out is a
  column not read. The long sum is cut over programs that add up with atomics; a memset and a launch a projection.
- CATS (Lee et al., 2024): the whole gate projection is read; where the activated gate is small, the neuron's rows of up
  and down are not. Three launches, the last adds up with fp32 atomics.
- Deja Vu (Liu et al., 2023): a predictor chooses, here the experts' router; then the chosen rows of gate, up and down
  are gathered. Three launches, the last adds up with fp32 atomics.

Each skips by thresholds kept in a layer's `constants`, so that one CUDA graph serves every density; `set_thresholds`
makes each read the same share of what it can skip. TEAL and CATS compute another function than an FFN of experts does:
each is compared with its own.
Shape suffixes: D model width, F neurons, K inputs and N outputs of a projection, R rows and B columns of a program.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lte_compile.kernels.layout import neuron_major
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall

SAMPLES = 256  # tokens that the thresholds are set from


def column_major(layer: SparseFfnCall) -> SparseFfnCall:
    """TEAL's layout: the inputs' columns contiguous in all three projections; room for the two thresholds."""
    up, gate = layer.weights.up_FD, layer.weights.gate_FD
    assert gate is not None
    weights = layer.weights._replace(up_FD=neuron_major(up), gate_FD=neuron_major(gate))
    return layer._replace(weights=weights, constants=(torch.zeros(2, device="cuda"),))


def with_thresholds(layer: SparseFfnCall) -> SparseFfnCall:
    return layer._replace(constants=(torch.zeros(2, device="cuda"),))


def set_thresholds(layers: list[SparseFfnCall], density: float) -> None:
    """Thresholds at which random inputs keep this share: of TEAL's inputs and hidden values, of CATS' gates."""
    for layer in layers:
        up, gate, *_ = layer.weights
        assert gate is not None
        x = torch.randn(SAMPLES, layer.x_D.shape[-1], device="cuda", dtype=layer.x_D.dtype)
        of_input = _threshold(x, density)
        if up.stride(0) == 1:  # TEAL's layout
            x = x.masked_fill(x.abs() <= of_input, 0)
            of_hidden = _threshold(F.silu(F.linear(x, gate)) * F.linear(x, up), density)
        else:
            of_hidden = _threshold(F.silu(F.linear(x, gate)), density)
        layer.constants[0].copy_(torch.stack([of_input, of_hidden]))


def _threshold(values: Tensor, density: float) -> Tensor:
    """The magnitude that this share of values exceeds; all of them at density 1."""
    magnitudes = values.float().abs().flatten()
    rank = min(len(magnitudes) - 1, int(density * len(magnitudes)))
    return magnitudes.sort(descending=True).values[rank] if density < 1 else magnitudes.new_tensor(-1.0)


@triton.jit
def split_gemv(
    x_ptr,
    weight_ptr,
    y_ptr,
    threshold_ptr,
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y [N] += W x over a block of inputs, leaving out |x| <= threshold. W is stored as [K, N]."""
    column_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_K = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    x_K = tl.load(x_ptr + row_K, mask=row_K < K, other=0.0).to(tl.float32)
    kept_K = (tl.abs(x_K) > tl.load(threshold_ptr)) & (row_K < K)
    w_KN = tl.load(
        weight_ptr + row_K[:, None].to(tl.int64) * N + column_N[None, :],
        mask=kept_K[:, None] & (column_N < N)[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )
    sum_N = tl.sum(w_KN.to(tl.float32) * x_K[:, None], 0)
    tl.atomic_add(y_ptr + column_N, sum_N.to(y_ptr.dtype.element_ty), mask=column_N < N, sem="relaxed")


def _split_gemv(x_D: Tensor, weight_NK: Tensor, threshold: Tensor) -> Tensor:
    outputs, inputs = weight_NK.shape
    y = torch.zeros(1, outputs, dtype=x_D.dtype, device=x_D.device)
    block_k, block_n, warps = 64, 256, 4  # 32 KB of weights to a program
    grid = (triton.cdiv(outputs, block_n), triton.cdiv(inputs, block_k))
    split_gemv[grid](
        x_D, weight_NK, y, threshold, K=inputs, N=outputs, BLOCK_K=block_k, BLOCK_N=block_n, num_warps=warps
    )
    return y


@torch.compile(dynamic=False)
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def teal(layer: SparseFfnCall) -> Tensor:
    """A layer of `column_major`."""
    up, gate, down, *_ = layer.weights
    assert gate is not None
    of_input, of_hidden = layer.constants[0].split(1)
    hidden = _swiglu(_split_gemv(layer.x_D, gate, of_input), _split_gemv(layer.x_D, up, of_input))
    return _split_gemv(hidden, down, of_hidden)


def teal_exact(layer: SparseFfnCall) -> Tensor:
    """What TEAL computes, in float64 but for the choice of hidden values, which is made on rounded ones."""
    up, gate, down, *_ = layer.weights
    assert gate is not None
    of_input, of_hidden = layer.constants[0].split(1)
    x = layer.x_D.double().masked_fill(layer.x_D.float().abs() <= of_input, 0)
    hidden = F.silu(x @ gate.double().t()) * (x @ up.double().t())
    return hidden.masked_fill(hidden.abs() <= of_hidden, 0) @ down.double().t()


@triton.jit
def predict(
    x_ptr,
    weight_ptr,
    bias_ptr,
    threshold_ptr,
    value_ptr,
    kept_ptr,
    N: tl.constexpr,
    D: tl.constexpr,
    IS_GATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows of CATS' gate projection, activated, or Deja Vu's predictor of experts; and which of them are kept."""
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sum_RB = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        column_B = start + tl.arange(0, BLOCK)
        mask_RB = (row_R < N)[:, None] & (column_B < D)[None, :]
        w_RB = tl.load(
            weight_ptr + row_R[:, None].to(tl.int64) * D + column_B[None, :],
            mask=mask_RB,
            other=0.0,
            eviction_policy="evict_first",
        )
        x_B = tl.load(x_ptr + column_B, mask=column_B < D, other=0.0)
        sum_RB += w_RB.to(tl.float32) * x_B.to(tl.float32)[None, :]
    value_R = tl.sum(sum_RB, 1)
    if IS_GATE:
        value_R = value_R * tl.sigmoid(value_R)
        tl.store(value_ptr + row_R, value_R, mask=row_R < N)
        kept_R = tl.abs(value_R) > tl.load(threshold_ptr + 1)
    else:
        bias_R = tl.load(bias_ptr + row_R, mask=row_R < N, other=0.0)
        kept_R = value_R + bias_R > 0.0
    tl.store(kept_ptr + row_R, kept_R.to(tl.int8), mask=row_R < N)


@triton.jit
def gather_up(
    x_ptr,
    gate_ptr,
    up_ptr,
    kept_ptr,
    hidden_ptr,
    y_ptr,
    F,
    D: tl.constexpr,
    SIZE: tl.constexpr,
    HAS_GATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Hidden values of the kept neurons, zero elsewhere; clears y. Without HAS_GATE, hidden holds the gates."""
    program = tl.program_id(0)
    row_R = program * ROWS + tl.arange(0, ROWS)
    for column in range(program, D, tl.num_programs(0)):
        tl.store(y_ptr + column, 0.0)
    kept_R = tl.load(kept_ptr + row_R // SIZE, mask=row_R < F, other=0) != 0
    up_RB = tl.zeros([ROWS, BLOCK], tl.float32)
    gate_RB = tl.zeros([ROWS, BLOCK], tl.float32)
    if tl.max(kept_R.to(tl.int32), 0) != 0:
        for start in range(0, D, BLOCK):
            column_B = start + tl.arange(0, BLOCK)
            x_B = tl.load(x_ptr + column_B, mask=column_B < D, other=0.0).to(tl.float32)
            offset_RB = row_R[:, None].to(tl.int64) * D + column_B[None, :]
            mask_RB = kept_R[:, None] & (column_B < D)[None, :]
            w_RB = tl.load(up_ptr + offset_RB, mask=mask_RB, other=0.0, eviction_policy="evict_first")
            up_RB += w_RB.to(tl.float32) * x_B[None, :]
            if not HAS_GATE:
                w_RB = tl.load(gate_ptr + offset_RB, mask=mask_RB, other=0.0, eviction_policy="evict_first")
                gate_RB += w_RB.to(tl.float32) * x_B[None, :]
    if HAS_GATE:
        gate_R = tl.load(hidden_ptr + row_R, mask=kept_R, other=0.0)
    else:
        gate_R = tl.sum(gate_RB, 1)
        gate_R = gate_R * tl.sigmoid(gate_R)
    tl.store(hidden_ptr + row_R, tl.where(kept_R, gate_R * tl.sum(up_RB, 1), 0.0), mask=row_R < F)


@triton.jit
def gather_down(
    hidden_ptr,
    kept_ptr,
    down_ptr,
    y_ptr,
    F,
    D: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y [D] += the kept rows of the transposed down-projection times their hidden values, by fp32 atomics."""
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column_B = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    kept_R = tl.load(kept_ptr + row_R // SIZE, mask=row_R < F, other=0) != 0
    if tl.max(kept_R.to(tl.int32), 0) != 0:
        hidden_R = tl.load(hidden_ptr + row_R, mask=kept_R, other=0.0)
        w_RB = tl.load(
            down_ptr + row_R[:, None].to(tl.int64) * D + column_B[None, :],
            mask=kept_R[:, None] & (column_B < D)[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        tl.atomic_add(
            y_ptr + column_B, tl.sum(w_RB.to(tl.float32) * hidden_R[:, None], 0), mask=column_B < D, sem="relaxed"
        )


def _gather(layer: SparseFfnCall, weight_ND: Tensor, size: int, is_gate: bool) -> Tensor:
    """Three launches and the rounding of y; a flag for every `size` neurons."""
    up, gate, down, *_ = layer.weights
    neurons, width = up.shape
    rows = len(weight_ND)
    kept = torch.empty(rows, dtype=torch.int8, device=up.device)
    hidden = torch.empty(neurons, dtype=torch.float32, device=up.device)
    y = torch.empty(1, width, dtype=torch.float32, device=up.device)
    predict[(triton.cdiv(rows, 4),)](
        layer.x_D,
        weight_ND,
        layer.router_bias_E,
        layer.constants[0],
        hidden,
        kept,
        N=rows,
        D=width,
        IS_GATE=is_gate,
        ROWS=4,
        BLOCK=1024,
    )
    gather_up[(triton.cdiv(neurons, 4),)](
        layer.x_D, gate, up, kept, hidden, y, neurons, D=width, SIZE=size, HAS_GATE=is_gate, ROWS=4, BLOCK=1024
    )
    gather_down[(triton.cdiv(neurons, 32), triton.cdiv(width, 512))](
        hidden, kept, down, y, neurons, D=width, SIZE=size, ROWS=32, BLOCK=512
    )
    return y.to(up.dtype)


def cats(layer: SparseFfnCall) -> Tensor:
    """A layer of `with_thresholds`."""
    assert layer.weights.gate_FD is not None
    return _gather(layer, layer.weights.gate_FD, 1, is_gate=True)


def cats_exact(layer: SparseFfnCall) -> Tensor:
    up, gate, down, *_ = layer.weights
    assert gate is not None
    x = layer.x_D.double()
    value = F.silu(x @ gate.double().t())
    hidden = value.masked_fill(value.abs() <= layer.constants[0][1], 0) * (x @ up.double().t())
    return hidden @ down.double().t()


def deja_vu(layer: SparseFfnCall) -> Tensor:
    """The function of lte::sparse_ffn at tau .5, where the sigmoid's argument is positive."""
    return _gather(layer, layer.router_ED, layer.expert_size, is_gate=False)
