"""lte::sparse_ffn for few tokens on a CPU: reads the weights of the active experts, and little else.

Two ways, whichever should be faster. Where experts are large: active ones are taken in runs of neighbours, each a
contiguous slice of the weights (no copy). Where a run costs more than the bytes it saves: active rows are gathered, as
many at a time as the cache holds. Either way the parts' outputs are summed in order. With several tokens both cover the
union of their experts, and each token's own are kept.
Shape suffixes: T tokens, D model width, F neurons, E experts, R the neurons of one part.
"""

from __future__ import annotations

import threading

import torch
import torch.nn.functional as F
from torch import Tensor

from lte_compile.kernels.experts import expand_to_neurons
from lte_compile.kernels.ffn import FfnWeights, hidden_value
from lte_compile.kernels.hidden import constants_of_neurons, hidden_of
from lte_compile.kernels.layout import as_rows
from lte_compile.kernels.sparse_ffn_reference import SparseFfnCall, active_experts

# What one more run costs in bytes read instead. Measured on two cores (Cascade Lake, 10 GB/s a core): 25-50 us a run.
RUN_COST_BYTES = 512 * 1024
# Gathering a row reads it, and writes and reads it in the cache: on an EPYC (Zen 4) 1.05 to 1.4 times the time of a
# slice, from 384x1536 to 4096x11008.
GATHER_COST = 1.3
# Rows gathered at a time. Of 0.25 to 8 MB, 4 were fastest or within a tenth there (L2 1 MB, L3 32 MB). Into memory that
# is used again: fresh memory of this size takes a page fault every 4 KB, which costs as much as the row itself.
GATHERED_BYTES = 4 * 1024 * 1024
# Up to here the C library has memory at hand that it was given back before.
AT_HAND_BYTES = 1024 * 1024

Run = tuple[int, int]  # experts [first, stop)


def find_runs(active: list[bool], max_gap: int) -> list[Run]:
    """Maximal runs of active experts; runs no more than `max_gap` inactive experts apart are joined."""
    runs: list[Run] = []
    for expert, is_active in enumerate(active):
        if not is_active:
            continue
        if runs and expert - runs[-1][1] <= max_gap:
            runs[-1] = (runs[-1][0], expert + 1)
        else:
            runs.append((expert, expert + 1))
    return runs


def sparse_ffn_cpu(call: SparseFfnCall) -> Tensor:
    """Equal to the reference up to the order of the sum over neurons."""
    weights = call.weights
    active_TE = as_rows(active_experts(call))
    x_TD = as_rows(call.x_D).to(weights.up_FD.dtype)
    union = (active_TE[0] if x_TD.shape[0] == 1 else active_TE.any(0)).tolist()
    runs = find_runs(union, _max_gap(call, len(union)))
    compute = _by_gathering if _gathering_is_cheaper(call, union, runs) else _by_runs
    y_TD = compute(call, x_TD, active_TE, union, runs)
    return y_TD.reshape(*call.x_D.shape[:-1], weights.down_DF.shape[0])


def _by_runs(call: SparseFfnCall, x_TD: Tensor, active_TE: Tensor, union: list[bool], runs: list[Run]) -> Tensor:
    weights = call.weights
    outputs = _PartSum(weights, x_TD)
    for first, stop in runs:
        start, end = _neurons(call, first, stop)
        constants = constants_of_neurons(call.activation, call.constants, slice(start, end))
        hidden_TR = hidden_value(x_TD, _rows(weights, start, end), call.activation, constants)
        if x_TD.shape[0] > 1 or not all(union[first:stop]):
            offsets = None if call.offsets_E1 is None else call.offsets_E1[first : stop + 1]
            active_TR = expand_to_neurons(active_TE[:, first:stop], end - start, call.expert_size, offsets)
            hidden_TR.masked_fill_(~active_TR, 0)
        outputs.add(hidden_TR, weights.down_DF[:, start:end])
    return outputs.total()


def _by_gathering(call: SparseFfnCall, x_TD: Tensor, active_TE: Tensor, union: list[bool], runs: list[Run]) -> Tensor:
    weights = call.weights
    active_TF = expand_to_neurons(active_TE, weights.up_FD.shape[0], call.expert_size, call.offsets_E1)
    needed_R = (active_TF[0] if x_TD.shape[0] == 1 else active_TF.any(0)).nonzero().squeeze(1)
    row_bytes = max(weights.up_FD.shape[1], weights.down_DF.shape[0]) * weights.up_FD.element_size()
    outputs = _PartSum(weights, x_TD)
    at_once = max(GATHERED_BYTES // row_bytes, 1)
    for part_R in torch.split(needed_R, at_once):
        hidden_TR = _gathered_hidden(call, x_TD, part_R)
        if x_TD.shape[0] > 1:
            hidden_TR.masked_fill_(~active_TF[:, part_R], 0)
        outputs.add(hidden_TR, _gathered(weights.down_DF.t(), part_R).t())
    return outputs.total()


def _gathered_hidden(call: SparseFfnCall, x_TD: Tensor, part_R: Tensor) -> Tensor:
    """One projection after the other, which share the memory that rows are gathered into."""
    up_FD, gate_FD, _, up_bias_F, gate_bias_F, _ = call.weights

    def project(weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
        return F.linear(x_TD, _gathered(weight_FD, part_R), None if bias_F is None else bias_F.index_select(0, part_R))

    up_TR = project(up_FD, up_bias_F)
    gate_TR = None if gate_FD is None else project(gate_FD, gate_bias_F)
    return hidden_of(call.activation, constants_of_neurons(call.activation, call.constants, part_R), up_TR, gate_TR)


def _gathered(weight_FD: Tensor, part_R: Tensor) -> Tensor:
    """These rows, until the next ones are gathered in this thread."""
    rows, width = part_R.shape[0], weight_FD.shape[1]
    if rows * width * weight_FD.element_size() <= AT_HAND_BYTES:
        return weight_FD.index_select(0, part_R)
    to_RD = _used_before(rows * width, weight_FD.dtype).view(rows, width)
    return torch.index_select(weight_FD.detach(), 0, part_R, out=to_RD)


_of_thread = threading.local()


def _used_before(count: int, dtype: torch.dtype) -> Tensor:
    """Numbers in the thread's memory for gathered rows: GATHERED_BYTES, unless a single row has more."""
    needed = count * dtype.itemsize
    memory: Tensor | None = getattr(_of_thread, "memory", None)
    if memory is None or memory.numel() < needed:
        with torch.inference_mode(False):  # or it could not be written to outside of that mode
            memory = _of_thread.memory = torch.empty(max(needed, GATHERED_BYTES), dtype=torch.uint8)
    return memory[:needed].view(dtype)


def _gathering_is_cheaper(call: SparseFfnCall, union: list[bool], runs: list[Run]) -> bool:
    if not runs:
        return False
    expert_bytes = _expert_bytes(call, len(union))
    in_runs = sum(stop - first for first, stop in runs)
    return GATHER_COST * sum(union) * expert_bytes < in_runs * expert_bytes + (len(runs) - 1) * RUN_COST_BYTES


def _neurons(call: SparseFfnCall, first: int, stop: int) -> tuple[int, int]:
    """Neurons [start, end) of experts [first, stop)."""
    if call.offsets_E1 is not None:
        return int(call.offsets_E1[first]), int(call.offsets_E1[stop])
    return first * call.expert_size, min(stop * call.expert_size, call.weights.up_FD.shape[0])


def _max_gap(call: SparseFfnCall, num_experts: int) -> int:
    """How many inactive experts between two runs are cheaper to read than to skip."""
    return RUN_COST_BYTES // max(_expert_bytes(call, num_experts), 1)


def _expert_bytes(call: SparseFfnCall, num_experts: int) -> int:
    up_FD = call.weights.up_FD
    matrices = 2 if call.weights.gate_FD is None else 3
    return matrices * up_FD.numel() * up_FD.element_size() // max(num_experts, 1)


def _rows(weights: FfnWeights, start: int, stop: int) -> FfnWeights:
    """The projections into neurons [start, stop), as views."""
    up, gate, down, up_bias, gate_bias, down_bias = weights
    return FfnWeights(
        up[start:stop],
        None if gate is None else gate[start:stop],
        down,
        None if up_bias is None else up_bias[start:stop],
        None if gate_bias is None else gate_bias[start:stop],
        down_bias,
    )


class _PartSum:
    """The sum of the parts' outputs and the bias. Half precision adds in fp32, to be rounded once at the end."""

    def __init__(self, weights: FfnWeights, x_TD: Tensor) -> None:
        self._bias_D = weights.down_bias_D
        self._x_TD = x_TD
        self._width = weights.down_DF.shape[0]
        self._wide = torch.promote_types(x_TD.dtype, torch.float32)
        self._sum_TD: Tensor | None = None

    def add(self, hidden_TR: Tensor, down_DR: Tensor) -> None:
        if self._sum_TD is None:
            first_TD = F.linear(hidden_TR, down_DR, self._bias_D)
            self._sum_TD = first_TD if first_TD.dtype == self._wide else first_TD.to(self._wide)
        elif self._wide == hidden_TR.dtype:
            self._sum_TD.addmm_(hidden_TR, down_DR.t())
        else:
            self._sum_TD.add_(hidden_TR @ down_DR.t())

    def total(self) -> Tensor:
        if self._sum_TD is not None:
            return self._sum_TD.to(self._x_TD.dtype)
        empty_TD = self._x_TD.new_zeros(self._x_TD.shape[0], self._width)
        return empty_TD if self._bias_D is None else empty_TD + self._bias_D
