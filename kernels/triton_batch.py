"""lte::sparse_ffn for a few tokens on a GPU: the experts that any token selects are read once and serve all tokens.

Launch 1 (`score_parts`): the router as a matrix product whose long sum is cut, so that enough programs share it.
Launch 2 (`gate_up`): a program per expert adds the parts up, stops if no token selects the expert, and otherwise
computes its neurons for every token, zeroing them for tokens that did not select it.
Launch 3 (`down`): each program lists the active experts by a prefix sum over the flags and adds its share of their rows
of the neuron-major down-projection; the last to arrive adds the partial sums in a fixed order.

Per-token masks save arithmetic, which is free here; what costs is reading weights, and that follows the union.
No host sync, fixed grids, no memory kept between calls: one CUDA graph serves every mask. Accumulates in fp32.
Shape suffixes: T tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from lte_compile.kernels.batch_kernels import down, gate_up, score_parts
from lte_compile.kernels.program import is_program
from lte_compile.kernels.program_triton import generated_kernel
from lte_compile.kernels.skipping_cost import expected_union
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall
from lte_compile.kernels.triton_decode import is_large
from lte_compile.kernels.triton_decode_list import sparse_ffn_decode_list
from lte_compile.kernels.triton_launch import launch_options, tokens_of

MIN_DOT = 16  # tl.dot's smallest side
# Up to this share of active experts, longer steps are faster: fewer programs have work, and each must read faster.
FEW_EXPERTS = 0.6
# Of a large layer, so few tokens with so few experts are read faster without tensor cores.
MAX_LISTED_TOKENS, LISTED_UNION = 2, 0.25


@dataclass(frozen=True)
class BatchConfig:
    """Tile sizes (powers of two, at least 16) of the three launches; of 13 tried for 4096 x 11008 on an H100."""

    score_experts: int = 16
    score_splits: int = 8
    score_block: int = 128
    score_warps: int = 4
    score_stages: int = 4
    up_neurons: int = 32
    up_block: int = 128
    up_warps: int = 4
    up_stages: int = 4
    down_neurons: int = 32
    down_block: int = 64
    down_programs: int = 256  # column blocks times splits
    down_warps: int = 4
    down_stages: int = 6
    lets_next: bool = True  # launch 3 lets the next layer's launch 1 be placed while its own last programs run


def default_config(width: int, expert_size: int, union: float = 1.0) -> BatchConfig:
    """Tile sizes for a model width, an expert size and the share of experts that any token is expected to select."""

    def fitting(size: int, largest: int) -> int:
        return max(MIN_DOT, min(largest, int(triton.next_power_of_2(size))))

    base = BatchConfig() if union > FEW_EXPERTS else BatchConfig(up_block=256, up_stages=3)
    return BatchConfig(
        score_block=fitting(width, base.score_block),
        up_neurons=fitting(expert_size, base.up_neurons),
        up_block=fitting(width, base.up_block),
        up_stages=base.up_stages,
        down_neurons=fitting(expert_size, base.down_neurons),
        down_block=fitting(width, base.down_block),
    )


def sparse_ffn_batch(call: SparseFfnCall, config: BatchConfig | None = None) -> Tensor:
    """2 to 64 tokens. The down-projection is neuron-major, all else contiguous; only the last expert may be smaller."""
    x_TD = tokens_of(call.x_D)
    union = 1.0 if call.density is None else expected_union(len(x_TD), call.density)
    if config is None and len(x_TD) <= MAX_LISTED_TOKENS and union <= LISTED_UNION and is_large(call):
        return sparse_ffn_decode_list(call)
    config = config or default_config(call.weights.up_FD.shape[1], call.expert_size, union)
    experts, out_width = call.router_ED.shape[0], call.weights.down_DF.shape[0]
    flags = torch.empty(experts + triton.cdiv(out_width, config.down_block), dtype=torch.int32, device=x_TD.device)
    active_E, arrived = flags[:experts], flags[experts:]
    with torch.cuda.device_of(x_TD):  # type: ignore[no-untyped-call]
        parts_EST = _score_parts(call, arrived, config)
        hidden_TF = _gate_up(call, x_TD, parts_EST, active_E, config)
        y_TD = _down(call, hidden_TF, active_E, arrived, config)
    return y_TD.view(*call.x_D.shape[:-1], out_width)


def _padded(tokens: int) -> int:
    return max(MIN_DOT, int(triton.next_power_of_2(tokens)))


def _score_parts(call: SparseFfnCall, arrived: Tensor, config: BatchConfig) -> Tensor:
    """Launch 1: the parts [E, S, T] that each score is the sum of, in fp32; clears the counters of launch 3."""
    x_TC = tokens_of(call.router_input)
    (tokens, width), experts = x_TC.shape, call.router_ED.shape[0]
    span = triton.cdiv(triton.cdiv(width, config.score_splits), config.score_block) * config.score_block
    splits = triton.cdiv(width, span)
    parts_EST = torch.empty(experts, splits, tokens, dtype=torch.float32, device=x_TC.device)
    score_parts[(triton.cdiv(experts, config.score_experts), splits)](
        x_TC,
        call.router_ED,
        parts_EST,
        arrived,
        tokens,
        D=width,
        EXPERTS=experts,
        COUNTERS=len(arrived),
        SPAN=span,
        TOKENS=_padded(tokens),
        BLOCK_EXPERTS=config.score_experts,
        BLOCK=config.score_block,
        UPCAST=x_TC.dtype != call.router_ED.dtype,
        STAGES=config.score_stages,
        **launch_options(x_TC.device, config.score_warps),
    )
    return parts_EST


def _gate_up(call: SparseFfnCall, x_TD: Tensor, parts_EST: Tensor, active_E: Tensor, config: BatchConfig) -> Tensor:
    """Launch 2: hidden values [T, F] of the union's neurons, the rest unset, and the flags that say which those are."""
    weights, activation, (tokens, width) = call.weights, call.activation, x_TD.shape
    neurons = weights.up_FD.shape[0]
    hidden_TF = torch.empty(tokens, neurons, dtype=weights.up_FD.dtype, device=x_TD.device)
    gate_up[(len(active_E) * triton.cdiv(call.expert_size, config.up_neurons),)](
        x_TD,
        parts_EST,
        call.router_bias_E,
        weights.up_FD,
        weights.gate_FD,
        weights.up_bias_F,
        weights.gate_bias_F,
        call.constants,
        hidden_TF,
        active_E,
        call.tau,
        tokens,
        neurons,
        D=width,
        EXPERT_SIZE=call.expert_size,
        SCORE_PARTS=parts_EST.shape[1],
        ACTIVATION=generated_kernel(activation) if is_program(activation) else activation,
        IS_PROGRAM=is_program(activation),
        TOKENS=_padded(tokens),
        NEURONS=config.up_neurons,
        BLOCK=config.up_block,
        STAGES=config.up_stages,
        **launch_options(x_TD.device, config.up_warps),
    )
    return hidden_TF


def _down(call: SparseFfnCall, hidden_TF: Tensor, active_E: Tensor, arrived: Tensor, config: BatchConfig) -> Tensor:
    """Launch 3: the output [T, D]."""
    weights, experts, (tokens, neurons) = call.weights, len(active_E), hidden_TF.shape
    out_width, blocks = weights.down_DF.shape[0], len(arrived)
    splits = max(1, config.down_programs // blocks)
    partial = torch.empty(splits, tokens, out_width, dtype=torch.float32, device=hidden_TF.device)
    y_TD = torch.empty(tokens, out_width, dtype=hidden_TF.dtype, device=hidden_TF.device)
    down[(blocks, splits)](
        hidden_TF,
        active_E,
        weights.down_DF,
        weights.down_bias_D,
        partial,
        arrived,
        y_TD,
        tokens,
        neurons,
        D=out_width,
        EXPERTS=experts,
        EXPERTS_PADDED=triton.next_power_of_2(experts),
        EXPERT_SIZE=call.expert_size,
        TOKENS=_padded(tokens),
        NEURONS=config.down_neurons,
        BLOCK=config.down_block,
        SPLITS=splits,
        STAGES=config.down_stages,
        **launch_options(hidden_TF.device, config.down_warps, lets_next=config.lets_next),
    )
    return y_TD
