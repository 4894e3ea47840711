"""lte::sparse_ffn for many tokens on a GPU: up and gate of each expert for the tokens that select it, down dense.

1. The router as a matrix product, beside it the hidden values [T, F] set to zero.
2. A list of tokens for every expert (`token_lists`).
3. One grouped product (`listed_up`): rows of x gathered by the lists, up and gate together, the hidden function, and
   the results scattered into the hidden values.
4. The library's dense down-projection: its sum over every expert has no room to skip, a token's few experts lie apart.

No host sync, fixed grids, no memory kept between calls: one CUDA graph serves every mask. Accumulates in fp32, in a
fixed order.
Shape suffixes: S parts of the router's sums, T tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from lte_compile.kernels.grouped_tile import GroupedTile, grouped_tile
from lte_compile.kernels.many_tokens import beside, rejoin, router_parts, router_product
from lte_compile.kernels.prefill_kernels import listed_up
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall
from lte_compile.kernels.token_lists import TokenLists, list_tokens
from lte_compile.kernels.triton_launch import hidden_constants, tokens_of


def sparse_ffn_prefill(call: SparseFfnCall, config: GroupedTile | None = None) -> Tensor:
    """At least one token; up and gate have rows of equal strides, all else is contiguous; only the last expert may be
    smaller. The down-projection may have either layout. `call.density` only chooses a tile."""
    weights = call.weights
    x_TD = tokens_of(call.x_D)
    config = config or grouped_tile(len(x_TD) * (call.density or 1.0), call.expert_size, weights.up_FD.dtype)
    router_x_TC = tokens_of(call.router_input)
    parts = router_parts(*router_x_TC.shape)
    logits_SET = torch.empty(parts, len(call.router_ED), len(x_TD), dtype=torch.float32, device=x_TD.device)
    hidden_TF = torch.empty(len(x_TD), len(weights.up_FD), dtype=weights.up_FD.dtype, device=x_TD.device)
    with torch.cuda.device_of(x_TD):  # type: ignore[no-untyped-call]
        with beside(x_TD):
            hidden_TF.zero_()
        router_product(call.router_ED, router_x_TC, logits_SET)
        lists = list_tokens(logits_SET.mT, call.tau, bias_E=call.router_bias_E, are_logits=True)
        rejoin(x_TD)
        _listed_up(call, x_TD.to(hidden_TF.dtype), lists, hidden_TF, config)
    y_TD = F.linear(hidden_TF, weights.down_DF, weights.down_bias_D)
    return y_TD.view(*call.x_D.shape[:-1], y_TD.shape[-1])


def _listed_up(call: SparseFfnCall, x_TD: Tensor, lists: TokenLists, hidden_TF: Tensor, config: GroupedTile) -> None:
    weights, experts = call.weights, len(lists.counts_E)
    listed_up[(multiprocessors(x_TD.device) * config.programs_per_sm,)](
        x_TD,
        lists.tokens_ET,
        lists.counts_E,
        weights.up_FD,
        weights.gate_FD,
        weights.up_bias_F,
        weights.gate_bias_F,
        call.constants,
        hidden_TF,
        *hidden_TF.shape,
        D=x_TD.shape[1],
        **hidden_constants(call),
        EXPERTS=experts,
        EXPERTS_PADDED=triton.next_power_of_2(experts),
        EXPERT_SIZE=call.expert_size,
        TOKENS=config.tokens,
        NEURONS=config.neurons,
        BLOCK=config.block,
        STAGES=config.stages,
        num_warps=config.warps,
    )


@cache
def multiprocessors(device: torch.device) -> int:
    """One on a CPU, where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
