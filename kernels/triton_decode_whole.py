"""lte::sparse_ffn for one token on a GPU that is expected to select nearly every expert: no list, two Triton launches.

Finding out what to leave unread costs a launch and a few microseconds, which the last experts do not repay.
Launch 1 (`score_and_compute`): programs for a few rows each, of the router or of up and gate, none waiting for another.
Launch 2 (`project_selected`): a block of columns of the neuron-major down-projection belongs to a few programs, which
share its rows; hidden values and weights of unselected experts count as zero. The last to arrive adds the partial sums
in a fixed order.

On Hopper and later a launch takes its places while the last programs of the one before run, and reads its first weights
before it waits for them. Results are bit-equal from run to run; no host sync, fixed grids, no memory kept between
calls: one CUDA graph serves every mask. Accumulates in fp32.
Shape suffixes: D model width, F neurons, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from lte_compile.kernels.decode_whole_kernels import project_selected, score_and_compute
from lte_compile.kernels.skipping_cost import LARGE_UP_BYTES
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall
from lte_compile.kernels.triton_launch import gpu_of, hidden_constants, launch_options

THREAD_BYTES = 128


@dataclass(frozen=True)
class WholeConfig:
    """Tile sizes (powers of two) and warps of the launches, and how many programs of the second a multiprocessor gets;
    the best of 20 tiles for launch 1 and 25 for launch 2, 4096 x 11008 on an H100."""

    up_rows: int = 1
    up_warps: int = 4
    down_rows: int = 128
    down_block: int = 64
    down_programs: int = 4
    down_warps: int = 4


# Of small layers by bytes, half precision: the best of 8 tiles for launch 2, then of 6 for launch 1 (SmolLM2-135M's
# layer, GPT-2's and 1024 x 2816, one H100). A program of the first's launch 2 holds all rows of its columns.
SMALL_LAYERS = (
    (6e6, WholeConfig(2, 2, down_rows=2048, down_block=16, down_programs=1, down_warps=16)),
    (10e6, WholeConfig(2, 1, down_rows=512, down_block=16)),
    (float("inf"), WholeConfig(4, 2, down_rows=1024, down_block=16, down_warps=8)),
)


def default_config(call: SparseFfnCall) -> WholeConfig:
    """For a layer; a thread of either launch holds about 128 bytes of weights at a time."""
    up_FD, gate_FD, *_ = call.weights
    width, item = up_FD.shape[1], up_FD.element_size()
    if up_FD.nbytes < LARGE_UP_BYTES:
        small = next(config for most, config in SMALL_LAYERS if call.weights.nbytes <= most)
        return replace(small, down_rows=2 * small.down_rows // item)
    base, thread = WholeConfig(), THREAD_BYTES // item
    up_rows = 1 if gate_FD is not None else 2
    up_warps = min(16, max(1, 2 * triton.next_power_of_2(width) // (32 * thread)))
    return replace(base, up_rows=up_rows, up_warps=up_warps, down_rows=32 * base.down_warps * thread // base.down_block)


def sparse_ffn_decode_whole(call: SparseFfnCall, config: WholeConfig | None = None) -> Tensor:
    """One token. The down-projection is neuron-major, up and gate have rows of equal strides, all else is contiguous;
    only the last expert may be smaller."""
    config = config or default_config(call)
    weights, device = call.weights, call.x_D.device
    neurons, experts, out_width = len(weights.up_FD), len(call.router_ED), weights.down_DF.shape[0]
    blocks = triton.cdiv(out_width, config.down_block)
    splits = max(1, config.down_programs * gpu_of(device).multiprocessors // blocks)
    splits = min(splits, triton.cdiv(neurons, config.down_rows))
    flags = torch.empty(experts + blocks, dtype=torch.int32, device=device)
    hidden_F = torch.empty(neurons, dtype=torch.float32, device=device)
    partial = torch.empty(splits * out_width, dtype=torch.float32, device=device)
    y_D = torch.empty((*call.x_D.shape[:-1], out_width), dtype=weights.up_FD.dtype, device=device)
    with torch.cuda.device_of(call.x_D):  # type: ignore[no-untyped-call]
        _score_and_compute(call, hidden_F, flags, flags[experts:], config)
        project_selected[(blocks, splits)](
            hidden_F,
            flags,
            weights.down_DF,
            weights.down_bias_D,
            partial,
            flags[experts:],
            y_D,
            neurons,
            D=out_width,
            EXPERT_SIZE=call.expert_size,
            ROWS=config.down_rows,
            BLOCK=config.down_block,
            SPLITS=splits,
            **launch_options(device, config.down_warps),
        )
    return y_D


def _score_and_compute(
    call: SparseFfnCall, hidden_F: Tensor, selected_E: Tensor, arrived: Tensor, config: WholeConfig
) -> None:
    """Launch 1; clears the counters of launch 2."""
    weights, (neurons, width) = call.weights, call.weights.up_FD.shape
    experts, router_width = call.router_ED.shape
    routed = config.up_rows if weights.gate_FD is None else 2 * config.up_rows
    programs = triton.cdiv(experts, routed) + triton.cdiv(neurons, config.up_rows)
    score_and_compute[(programs,)](
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
        selected_E,
        arrived,
        call.tau,
        neurons,
        D=width,
        WIDTH=triton.next_power_of_2(width),
        ROUTER_D=router_width,
        ROUTER_WIDTH=triton.next_power_of_2(router_width),
        **hidden_constants(call),
        EXPERTS=experts,
        COUNTERS=len(arrived),
        ROWS=config.up_rows,
        ROUTED=routed,
        **launch_options(call.x_D.device, config.up_warps),
    )
