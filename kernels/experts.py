"""Which neurons an expert owns, and moving values between experts and neurons.

Shape suffixes: F neurons, E experts, S neurons per expert; any leading dimensions come before them.
Expert e owns neurons [e*S, min((e+1)*S, F)), so the last one may be smaller; with `offsets` (int64 [E+1], first 0,
last F, not decreasing) it owns [offsets[e], offsets[e+1]).
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from lte_compile.kernels.layout import as_rows


def count_experts(num_neurons: int, expert_size: int) -> int:
    """E = ceil(F / S)."""
    return -(-num_neurons // expert_size)


def check_experts(num_neurons: int, num_experts: int, expert_size: int, offsets_E1: Tensor | None) -> None:
    """ValueError unless `num_experts` gates describe `num_neurons` neurons."""
    if expert_size < 1:
        raise ValueError(f"expert_size must be at least 1; got {expert_size}")
    if offsets_E1 is None:
        expected = count_experts(num_neurons, expert_size)
        if num_experts != expected:
            raise ValueError(
                f"{num_neurons} neurons in experts of {expert_size} make {expected} experts; "
                f"got gates for {num_experts}"
            )
        return
    if offsets_E1.dtype != torch.int64 or tuple(offsets_E1.shape) != (num_experts + 1,):
        raise ValueError(
            f"expert_offsets must be int64 of shape [{num_experts + 1}] (experts + 1); "
            f"got {offsets_E1.dtype} of shape {list(offsets_E1.shape)}"
        )


def check_offsets(offsets_E1: Tensor | None, num_neurons: int) -> None:
    """ValueError unless the offsets cut `num_neurons` neurons; reads values on CPU only (no device sync)."""
    if offsets_E1 is None or offsets_E1.device.type != "cpu":
        return
    cuts = offsets_E1.tolist()
    if cuts[0] != 0 or cuts[-1] != num_neurons or any(a > b for a, b in pairwise(cuts)):
        raise ValueError(f"expert_offsets must rise from 0 to {num_neurons} (neurons); got {cuts}")


def expand_to_neurons(gates_E: Tensor, num_neurons: int, expert_size: int, offsets_E1: Tensor | None) -> Tensor:
    """[..., E] -> [..., F]: every neuron gets its expert's value."""
    if offsets_E1 is not None:
        return gates_E.repeat_interleave(offsets_E1.diff(), dim=-1, output_size=num_neurons)
    return gates_E.repeat_interleave(expert_size, dim=-1)[..., :num_neurons]


def scale_by_gates(hidden_F: Tensor, gates_E: Tensor, expert_size: int, offsets_E1: Tensor | None) -> Tensor:
    """hidden times its expert's gate, in the wider of the two dtypes, rounded once to hidden's dtype. A new tensor."""
    num_neurons, num_experts = hidden_F.shape[-1], gates_E.shape[-1]
    if offsets_E1 is None and num_experts * expert_size == num_neurons:  # broadcast: gates never grow to [..., F]
        hidden_ES = hidden_F.reshape(*hidden_F.shape[:-1], num_experts, expert_size)
        return (hidden_ES * gates_E.unsqueeze(-1)).flatten(-2).to(hidden_F.dtype)
    return (hidden_F * expand_to_neurons(gates_E, num_neurons, expert_size, offsets_E1)).to(hidden_F.dtype)


def sum_per_expert(values_F: Tensor, num_experts: int, expert_size: int, offsets_E1: Tensor | None) -> Tensor:
    """[..., F] -> [..., E] in at least fp32: the transpose of `expand_to_neurons`, with a fixed order of addition."""
    wide_F = values_F if values_F.dtype == torch.float64 else values_F.float()
    if offsets_E1 is None:
        missing = num_experts * expert_size - wide_F.shape[-1]
        padded_F = F.pad(wide_F, (0, missing)) if missing else wide_F
        return padded_F.reshape(*padded_F.shape[:-1], num_experts, expert_size).sum(-1)
    rows_FT = as_rows(wide_F).t().contiguous()
    sums_ET = torch.segment_reduce(rows_FT, "sum", offsets=offsets_E1, axis=0, unsafe=True, initial=0)
    return sums_ET.t().reshape(*wide_F.shape[:-1], num_experts).contiguous()
