"""lte::sparse_ffn for one token on a GPU: Triton launches that read the router and the active experts' weights.

Large layers take three launches (`triton_decode_list`), small ones two of their own (`triton_decode_small`), all
others these two.
Launch 1 (`route_up`): each program recomputes its expert's score (a few KB, shared through L2 by the expert's
programs), stops if the expert is inactive, and otherwise computes a few of its neurons.
Launch 2 (`down`): each program lists the active experts by a prefix sum over the flags, adds its share of their rows
of the neuron-major down-projection, and stores a partial sum. The last program to arrive adds the partial sums in
a fixed order, so results are bit-equal from run to run.

No host sync, a fixed grid, no memory kept between calls: one CUDA graph serves every mask. Accumulates in fp32.
Shape suffixes: D model width, F neurons, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from lte_compile.kernels.decode_kernels import down, route_up
from lte_compile.kernels.skipping_cost import LARGE_UP_BYTES
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall
from lte_compile.kernels.triton_decode_list import MAX_WIDTH, sparse_ffn_decode_list
from lte_compile.kernels.triton_decode_small import is_small, sparse_ffn_decode_small
from lte_compile.kernels.triton_launch import hidden_constants, launch_options

# Bytes of the up-projection below which launches of many one-warp programs are fastest; from LARGE_UP_BYTES on, three
# launches are faster than two.
SMALL_BYTES = 2**23


@dataclass(frozen=True)
class DecodeConfig:
    """Tile sizes (powers of two) of the two launches. `*_rows` neurons and `*_block` columns to a program or step."""

    up_rows: int = 4
    up_block: int = 1024
    up_warps: int = 4
    up_stages: int = 1
    down_rows: int = 32
    down_block: int = 256
    down_splits: int = 32
    down_warps: int = 2
    down_stages: int = 1


# Programs of one warp, for layers of a few megabytes: as many as possible, each done at once.
SMALL_LAYER = DecodeConfig(up_rows=1, up_warps=1, down_block=32, down_warps=1)


def default_config(call: SparseFfnCall) -> DecodeConfig:
    """Tile sizes for a layer."""
    pad, (up_FD, gate_FD, *_) = triton.next_power_of_2, call.weights
    base = DecodeConfig() if up_FD.nbytes >= SMALL_BYTES else SMALL_LAYER
    up_rows = 2 * base.up_rows if gate_FD is None else base.up_rows
    return replace(
        base,
        up_rows=min(up_rows, pad(call.expert_size)),
        up_block=min(base.up_block, pad(up_FD.shape[1])),
        down_rows=min(base.down_rows, pad(call.expert_size)),
        down_block=min(base.down_block, pad(call.weights.down_DF.shape[0])),
    )


def sparse_ffn_decode(call: SparseFfnCall) -> Tensor:
    """One token. The down-projection is neuron-major, up and gate have rows of equal strides, all else is contiguous;
    only the last expert may be smaller."""
    if is_large(call):
        return sparse_ffn_decode_list(call)
    return sparse_ffn_decode_small(call) if is_small(call) else sparse_ffn_two_launches(call)


def is_large(call: SparseFfnCall) -> bool:
    """Whether the kernels over a list of experts can serve the layer, and are the faster ones."""
    up_FD = call.weights.up_FD
    return up_FD.nbytes >= LARGE_UP_BYTES and max(up_FD.shape[1], call.router_ED.shape[1]) <= MAX_WIDTH


def sparse_ffn_two_launches(call: SparseFfnCall, config: DecodeConfig | None = None) -> Tensor:
    """One token. The down-projection is neuron-major, up and gate have rows of equal strides, all else is contiguous;
    only the last expert may be smaller."""
    weights, x_D, config = call.weights, call.x_D, config or default_config(call)
    out_width, experts = weights.down_DF.shape[0], len(call.router_ED)
    blocks = triton.cdiv(out_width, config.down_block)
    flags = torch.empty(experts + blocks, dtype=torch.int32, device=x_D.device)
    with torch.cuda.device_of(x_D):  # type: ignore[no-untyped-call]
        hidden_F = _route_up(call, flags[:experts], flags[experts:], config)
        return _project_down(call, hidden_F, flags[:experts], flags[experts:], config)


def _route_up(call: SparseFfnCall, active_E: Tensor, arrived: Tensor, config: DecodeConfig) -> Tensor:
    """Launch 1: hidden values [F] in fp32 of active experts, the rest unset; clears the counters of launch 2."""
    weights, (neurons, width) = call.weights, call.weights.up_FD.shape
    hidden_F = torch.empty(neurons, dtype=torch.float32, device=call.x_D.device)
    route_up[(len(active_E) * triton.cdiv(call.expert_size, config.up_rows),)](
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
        active_E,
        arrived,
        call.tau,
        neurons,
        D=width,
        ROUTER_D=call.router_ED.shape[1],
        **hidden_constants(call),
        EXPERT_SIZE=call.expert_size,
        COUNTERS=len(arrived),
        ROWS=config.up_rows,
        BLOCK=config.up_block,
        STAGES=config.up_stages,
        **launch_options(hidden_F.device, config.up_warps),
    )
    return hidden_F


def _project_down(
    call: SparseFfnCall, hidden_F: Tensor, active_E: Tensor, arrived: Tensor, config: DecodeConfig
) -> Tensor:
    """Launch 2: the output, of the active experts' rows."""
    weights, device = call.weights, hidden_F.device
    out_width, experts = weights.down_DF.shape[0], len(active_E)
    partial = torch.empty(config.down_splits * out_width, dtype=torch.float32, device=device)
    y_D = torch.empty((*call.x_D.shape[:-1], out_width), dtype=weights.up_FD.dtype, device=device)
    down[(len(arrived), config.down_splits)](
        hidden_F,
        active_E,
        weights.down_DF,
        weights.down_bias_D,
        partial,
        arrived,
        y_D,
        len(hidden_F),
        D=out_width,
        EXPERTS=experts,
        EXPERTS_PADDED=triton.next_power_of_2(experts),
        EXPERT_SIZE=call.expert_size,
        ROWS=config.down_rows,
        BLOCK=config.down_block,
        SPLITS=config.down_splits,
        STAGES=config.down_stages,
        **launch_options(device, config.down_warps),
    )
    return y_D
