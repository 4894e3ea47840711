"""lte::sparse_ffn of small layers, where launches cost as much as arithmetic: router, up and gate in one launch.

1. `routed_up`: a tile of tokens by neurons, the scores of the tile's experts beside it, and hidden values, zero where a
   token did not select the expert.
2. The library's dense down-projection.

Nothing is skipped: two launches instead of the dense layer's four are what makes it faster. No host sync; one CUDA
graph serves every mask. Accumulates in fp32, in a fixed order.
Shape suffixes: T tokens, D model width, F neurons.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from lte_compile.kernels.prefill_kernels import routed_up
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall
from lte_compile.kernels.triton_launch import hidden_constants, tokens_of

# tl.dot's smallest side: so many experts' logits are computed for a tile whether it has them or not.
ROUTED = 16


@dataclass(frozen=True)
class FusedTile:
    """Rows of x, neurons and columns of a step (powers of two, at least 16), and how a program runs."""

    tokens: int
    neurons: int
    block: int = 64
    warps: int = 4
    stages: int = 3

    def experts(self, expert_size: int) -> int:
        """Experts that a tile of neurons may belong to."""
        return (self.neurons - 1) // expert_size + (1 if self.neurons % expert_size == 0 else 2)


def fused_tile(tokens: int, expert_size: int, gated: bool, dtype: torch.dtype) -> FusedTile:
    """The default tile, with fewer neurons where these would belong to more than `ROUTED` experts."""
    if dtype == torch.float32:  # no tensor cores: the sums of a larger tile would not stay in registers
        tile = FusedTile(32, 32, 32)
    elif tokens <= (256 if gated else 512):  # 512 of GPT-2's layer: 23.7 us, with larger tiles 24.4 (H100)
        tile = FusedTile(64, 32 if gated else 64, stages=4)
    else:
        tile = FusedTile(128, 64 if gated else 128, warps=8)
    while tile.experts(expert_size) > ROUTED:  # 16 neurons belong to 16 experts at most
        tile = replace(tile, neurons=tile.neurons // 2)
    return tile


def sparse_ffn_fused_up(call: SparseFfnCall, config: FusedTile | None = None) -> Tensor:
    """At least one token; x, router and projections of one dtype; only the last expert may be smaller. The
    down-projection may have either layout."""
    weights = call.weights
    x_TD = tokens_of(call.x_D)
    tile = config or fused_tile(len(x_TD), call.expert_size, weights.gate_FD is not None, x_TD.dtype)
    hidden_TF = torch.empty(len(x_TD), len(weights.up_FD), dtype=x_TD.dtype, device=x_TD.device)
    with torch.cuda.device_of(x_TD):  # type: ignore[no-untyped-call]
        routed_up[(triton.cdiv(hidden_TF.shape[1], tile.neurons), triton.cdiv(len(x_TD), tile.tokens))](
            x_TD,
            call.router_ED,
            call.router_bias_E,
            weights.up_FD,
            weights.gate_FD,
            weights.up_bias_F,
            weights.gate_bias_F,
            call.constants,
            hidden_TF,
            call.tau,
            *hidden_TF.shape,
            D=x_TD.shape[1],
            **hidden_constants(call),
            EXPERTS=len(call.router_ED),
            EXPERT_SIZE=call.expert_size,
            TOKENS=tile.tokens,
            NEURONS=tile.neurons,
            ROUTED=ROUTED,
            BLOCK=tile.block,
            STAGES=tile.stages,
            num_warps=tile.warps,
        )
    y_TD = F.linear(hidden_TF, weights.down_DF, weights.down_bias_D)
    return y_TD.view(*call.x_D.shape[:-1], y_TD.shape[-1])
