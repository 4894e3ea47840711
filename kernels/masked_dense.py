"""lte::sparse_ffn by dense products: what serves best when skipping does not pay.

The projections are the library's; one kernel between them computes the hidden value and sets it to zero where a token
did not select the expert. Router, up and gate run on streams of their own, beside one another: each fills what the
others' last wave of tiles leaves of the device. No host sync; one CUDA graph serves every mask.
Shape suffixes: S parts of the router's sums, T tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from lte_compile.kernels.many_tokens import beside, rejoin, router_parts, router_product
from lte_compile.kernels.prefill_kernels import mask_hidden
from lte_compile.kernels.program import is_program
from lte_compile.kernels.program_triton import generated_kernel
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall
from lte_compile.kernels.triton_launch import tokens_of

ROUTER_LANE, UP_LANE = 0, 1


@dataclass(frozen=True)
class MaskConfig:
    """Elements (a power of two) of a program of the kernel between the projections."""

    elements: int = 2048
    warps: int = 8


def sparse_ffn_masked_dense(call: SparseFfnCall, config: MaskConfig | None = None) -> Tensor:
    """Any number of tokens, experts of one size; only the last may be smaller."""
    weights = call.weights
    x_TD = tokens_of(call.x_D)
    wide_TD = x_TD.to(weights.up_FD.dtype)
    router_x_TC = tokens_of(call.router_input)
    parts = router_parts(*router_x_TC.shape)
    logits_STE = torch.empty(parts, len(x_TD), len(call.router_ED), dtype=torch.float32, device=x_TD.device)
    up_TF = torch.empty(len(x_TD), len(weights.up_FD), dtype=wide_TD.dtype, device=x_TD.device)
    gate_TF = None if weights.gate_FD is None else torch.empty_like(up_TF)
    with torch.cuda.device_of(x_TD):  # type: ignore[no-untyped-call]
        with beside(x_TD, UP_LANE):
            _project(wide_TD, weights.up_FD, weights.up_bias_F, up_TF)
        with beside(x_TD, ROUTER_LANE):
            router_product(router_x_TC, call.router_ED, logits_STE)
        if weights.gate_FD is not None and gate_TF is not None:
            _project(wide_TD, weights.gate_FD, weights.gate_bias_F, gate_TF)
        rejoin(x_TD, UP_LANE)
        rejoin(x_TD, ROUTER_LANE)
        _mask_hidden(call, logits_STE, up_TF, gate_TF, config or MaskConfig())
    y_TD = F.linear(up_TF, weights.down_DF, weights.down_bias_D)
    return y_TD.view(*call.x_D.shape[:-1], y_TD.shape[-1])


def _project(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None, out_TF: Tensor) -> None:
    if bias_F is None:
        torch.mm(x_TD, weight_FD.t(), out=out_TF)
    else:
        torch.addmm(bias_F, x_TD, weight_FD.t(), out=out_TF)


def _mask_hidden(
    call: SparseFfnCall, logits_STE: Tensor, up_TF: Tensor, gate_TF: Tensor | None, config: MaskConfig
) -> None:
    """Hidden values in the place of `up_TF`: the thread that reads a value writes it."""
    (tokens, neurons), (parts, _, experts) = up_TF.shape, logits_STE.shape
    size = min(int(triton.next_power_of_2(call.expert_size)), config.elements)
    block_experts = max(1, config.elements // size)
    tiles = triton.cdiv(experts, block_experts) * triton.cdiv(call.expert_size, size)
    mask_hidden[(tokens * tiles,)](
        logits_STE,
        call.router_bias_E,
        up_TF,
        gate_TF,
        call.constants,
        up_TF,
        call.tau,
        tokens,
        neurons,
        PARTS=parts,
        EXPERTS=experts,
        EXPERT_SIZE=call.expert_size,
        ACTIVATION=generated_kernel(call.activation) if is_program(call.activation) else call.activation,
        IS_PROGRAM=is_program(call.activation),
        BLOCK_EXPERTS=block_experts,
        NEURONS=size,
        num_warps=config.warps,
    )
