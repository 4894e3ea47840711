"""lte::sparse_ffn for one to four tokens on a GPU: three Triton launches over a list of the active experts.

Launch 1 (`score_expert`): a program an expert scores it.
Launch 2 (`compute_hidden`): as many programs as run at once list the active experts and share their neurons one by one,
so that every multiprocessor reads the same number of rows.
Launch 3 (`project_down`): a block of columns of the neuron-major down-projection belongs to a few programs, which list
the experts too and share their rows; the last of them to arrive adds the partial sums in a fixed order.

On Hopper and later a launch is set up before the one before it has ended. Only launch 1 lets the next one take its
places early: programs placed while others still run would crowd onto the multiprocessors that are free first.
Results are bit-equal from run to run; no host sync, fixed grids, no memory kept between calls: one CUDA graph serves
every mask. Accumulates in fp32.
Shape suffixes: T tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from lte_compile.kernels.decode_list_kernels import compute_hidden, project_down, score_expert
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall
from lte_compile.kernels.triton_launch import gpu_of, hidden_constants, launch_options, tokens_of

MAX_TOKENS = 4  # every token's sums stay in registers
MAX_WIDTH = 8192  # so does a whole token
# Up to here it gains .5 to .9 us that the next layer's launch 1 starts early; at .5 and above it loses (H100).
LETS_NEXT_DENSITY = 0.3
DOWN_THREAD_BYTES = 128  # of a tile of launch 3: then four programs, no more, fit a multiprocessor


@dataclass(frozen=True)
class ListConfig:
    """Tile sizes (powers of two) of the launches, and how many programs a multiprocessor gets."""

    score_warps: int = 4
    up_programs: int = 6
    up_warps: int = 4
    up_stages: int = 1
    down_rows: int = 128
    down_block: int = 64
    down_programs: int = 4
    down_warps: int = 4
    down_stages: int = 1
    early: bool = True  # launch 3 is placed while launch 2 runs, lists experts and reads its first rows
    lets_next: bool = False  # and lets the next layer's launch 1 be placed while its own last programs run


def default_config(call: SparseFfnCall) -> ListConfig:
    """Tile sizes for a model width, a dtype and one or a few tokens."""
    width, item = call.weights.up_FD.shape[1], call.weights.up_FD.element_size()
    up_warps = min(16, max(1, triton.next_power_of_2(width) * item // (32 * 64)))  # 64 bytes of a row to a thread
    base = ListConfig()
    rows = 32 * base.down_warps * DOWN_THREAD_BYTES // (item * base.down_block)
    tokens = triton.next_power_of_2(max(1, call.x_D.numel() // width))
    return replace(
        base,
        up_warps=up_warps,
        up_programs=max(1, 24 // up_warps),
        down_rows=rows // tokens**2,
        lets_next=call.density is not None and call.density <= LETS_NEXT_DENSITY,
    )


def sparse_ffn_decode_list(call: SparseFfnCall, config: ListConfig | None = None) -> Tensor:
    """The down-projection is neuron-major, up and gate have rows of equal strides, all else is contiguous;
    only the last expert may be smaller."""
    config = config or default_config(call)
    x_TD = tokens_of(call.x_D)
    experts, out_width = call.router_ED.shape[0], call.weights.down_DF.shape[0]
    blocks = triton.cdiv(out_width, config.down_block)
    flags = torch.empty(experts + blocks, dtype=torch.int32, device=x_TD.device)
    selected_E, arrived = flags[:experts], flags[experts:]
    with torch.cuda.device_of(x_TD):  # type: ignore[no-untyped-call]
        _score(call, selected_E, arrived, config)
        hidden_TF = _hidden(call, x_TD, selected_E, config)
        y_TD = _down(call, hidden_TF, selected_E, arrived, config)
    return y_TD.view(*call.x_D.shape[:-1], out_width)


def _score(call: SparseFfnCall, selected_E: Tensor, arrived: Tensor, config: ListConfig) -> None:
    """Launch 1; clears the counters of launch 3."""
    x_TC = tokens_of(call.router_input)
    tokens, width = x_TC.shape
    score_expert[(len(selected_E),)](
        x_TC,
        call.router_ED,
        call.router_bias_E,
        selected_E,
        arrived,
        call.tau,
        tokens,
        D=width,
        WIDTH=triton.next_power_of_2(width),
        TOKENS=triton.next_power_of_2(tokens),
        COUNTERS=len(arrived),
        **launch_options(x_TC.device, config.score_warps),
    )


def _hidden(call: SparseFfnCall, x_TD: Tensor, selected_E: Tensor, config: ListConfig) -> Tensor:
    """Launch 2: hidden values [T, F] of active experts, the rest unset."""
    weights, (tokens, width) = call.weights, x_TD.shape
    neurons, padded = len(weights.up_FD), triton.next_power_of_2(len(selected_E))
    hidden_TF = torch.empty(tokens, neurons, dtype=torch.float32, device=x_TD.device)
    programs = gpu_of(x_TD.device).multiprocessors * config.up_programs
    lists = torch.empty(programs * padded, dtype=torch.int32, device=x_TD.device)
    compute_hidden[(programs,)](
        x_TD,
        selected_E,
        lists,
        weights.up_FD,
        weights.gate_FD,
        weights.up_bias_F,
        weights.gate_bias_F,
        call.constants,
        hidden_TF,
        tokens,
        neurons,
        D=width,
        WIDTH=triton.next_power_of_2(width),
        TOKENS=triton.next_power_of_2(tokens),
        **hidden_constants(call),
        EXPERTS=len(selected_E),
        EXPERTS_PADDED=padded,
        EXPERT_SIZE=call.expert_size,
        STAGES=config.up_stages,
        **launch_options(x_TD.device, config.up_warps, config.early),
    )
    return hidden_TF


def _down(call: SparseFfnCall, hidden_TF: Tensor, selected_E: Tensor, arrived: Tensor, config: ListConfig) -> Tensor:
    """Launch 3: the output [T, D]."""
    weights, (tokens, neurons) = call.weights, hidden_TF.shape
    out_width, blocks, device = weights.down_DF.shape[0], len(arrived), hidden_TF.device
    splits = max(1, config.down_programs * gpu_of(device).multiprocessors // blocks)
    padded = triton.next_power_of_2(len(selected_E))
    lists = torch.empty(blocks * splits * padded, dtype=torch.int32, device=device)
    partial = torch.empty(splits * tokens * out_width if splits > 1 else 0, dtype=torch.float32, device=device)
    y_TD = torch.empty(tokens, out_width, dtype=weights.down_DF.dtype, device=device)
    project_down[(blocks, splits)](
        hidden_TF,
        selected_E,
        lists,
        weights.down_DF,
        weights.down_bias_D,
        partial,
        arrived,
        y_TD,
        tokens,
        neurons,
        D=out_width,
        TOKENS=triton.next_power_of_2(tokens),
        EXPERTS=len(selected_E),
        EXPERTS_PADDED=padded,
        EXPERT_SIZE=call.expert_size,
        ROWS=config.down_rows,
        BLOCK=config.down_block,
        SPLITS=splits,
        STAGES=config.down_stages,
        **launch_options(device, config.down_warps, config.early, config.early and config.lets_next),
    )
    return y_TD
