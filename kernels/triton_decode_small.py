"""lte::sparse_ffn for one token of a small layer on a GPU: two Triton launches, whose time is that of launches and of
waiting for memory, not of bytes.

Launch 1 (`route_hidden`): a program of one warp for every neuron recomputes its expert's score (a row that the
expert's programs share through L2) and, if the expert is active, the neuron's hidden value; else it stores 0.
Launch 2 (`project_hidden`): a program for a few columns of the output reads the rows of the neuron-major
down-projection whose hidden value is not 0, all at once, and adds them up. There is nothing to list and nothing to add
up between programs, whatever the size of experts.

A two-layer router's features take one launch before these (`append_features`). Results are bit-equal from run to run;
no host sync, fixed grids: one CUDA graph serves every mask. Accumulates in fp32.
Shape suffixes: D model width, C columns that the router reads, R features, F neurons.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from lte_compile.kernels.decode_small_kernels import append_features, project_hidden, route_hidden
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall
from lte_compile.kernels.triton_launch import hidden_constants, launch_options

# SmolLM2-135M's layer has 5.3 MB (docs/kernels.md). The few programs of launch 2 would take long to read more.
MAX_BYTES = 6_000_000
MAX_WIDTH = 1024  # one warp holds a row of everything that a neuron needs


@dataclass(frozen=True)
class SmallConfig:
    """Neurons and columns (powers of two) of a step of launch 2, steps at once, and warps."""

    down_rows: int = 1024
    down_steps: int = 2
    down_block: int = 8
    down_warps: int = 8


def is_small(call: SparseFfnCall) -> bool:
    """Whether the layer is as small as these kernels are made for."""
    widest = max(call.weights.up_FD.shape[1], call.router_ED.shape[1])
    return call.weights.nbytes <= MAX_BYTES and widest <= MAX_WIDTH


def sparse_ffn_decode_small(call: SparseFfnCall, config: SmallConfig | None = None) -> Tensor:
    """One token. The down-projection is neuron-major, up and gate have rows of equal strides, all else is contiguous;
    only the last expert may be smaller."""
    config = config or SmallConfig()
    weights, device = call.weights, call.x_D.device
    out_width, neurons = weights.down_DF.shape
    y_D = torch.empty((*call.x_D.shape[:-1], out_width), dtype=weights.up_FD.dtype, device=device)
    with torch.cuda.device_of(call.x_D):  # type: ignore[no-untyped-call]
        hidden_F = _hidden(call)
        project_hidden[(triton.cdiv(out_width, config.down_block),)](
            hidden_F,
            weights.down_DF,
            weights.down_bias_D,
            y_D,
            neurons,
            D=out_width,
            ROWS=min(config.down_rows, triton.next_power_of_2(neurons)),
            STEPS=config.down_steps,
            BLOCK=config.down_block,
            **launch_options(device, config.down_warps),
        )
    return y_D


def _hidden(call: SparseFfnCall) -> Tensor:
    """Launch 1: hidden values [F] in fp32, 0 where the expert is not active."""
    weights = call.weights
    (neurons, width), router_width = weights.up_FD.shape, call.router_ED.shape[1]
    hidden_F = torch.empty(neurons, dtype=torch.float32, device=call.x_D.device)
    route_hidden[(neurons,)](
        call.x_D.contiguous(),
        call.router_input.contiguous(),
        call.router_ED,
        call.router_bias_E,
        weights.up_FD,
        weights.gate_FD,
        weights.up_bias_F,
        weights.gate_bias_F,
        call.constants,
        hidden_F,
        call.tau,
        D=width,
        WIDTH=triton.next_power_of_2(width),
        ROUTER_D=router_width,
        ROUTER_WIDTH=triton.next_power_of_2(router_width),
        **hidden_constants(call),
        EXPERT_SIZE=call.expert_size,
        **launch_options(hidden_F.device, 1, early=True),
    )
    return hidden_F


def features_of_one(x_D: Tensor, weight_RD: Tensor, bias_R: Tensor) -> Tensor:
    """[x, relu(W x + b)] of one token, [..., D + R], in one launch. All are contiguous."""
    (rank, width), x_D = weight_RD.shape, x_D.contiguous()
    joined_C = torch.empty((*x_D.shape[:-1], width + rank), dtype=x_D.dtype, device=x_D.device)
    with torch.cuda.device_of(x_D):  # type: ignore[no-untyped-call]
        append_features[(rank,)](
            x_D,
            weight_RD,
            bias_R,
            joined_C,
            D=width,
            WIDTH=triton.next_power_of_2(width),
            **launch_options(x_D.device, 1, early=True),
        )
    return joined_C
