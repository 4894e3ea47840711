"""Launches of the kernels between an FFN's projections: the gated hidden value, and its gradients in one pass.

Shape suffixes: F neurons, E experts; any leading dimensions come before them, the same in all arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lte_compile.kernels import gated_hidden_kernels as kernels
from lte_compile.kernels.program import is_program
from lte_compile.kernels.program_gradient_triton import generated_gradient
from lte_compile.kernels.program_triton import generated_kernel


class Tile(NamedTuple):
    """Neurons of one program (a power of two), and its warps."""

    neurons: int = 2048
    warps: int = 8


FORWARD_TILE = Tile()
BACKWARD_TILE = Tile()
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def gated_hidden(
    up_F: Tensor,
    gate_F: Tensor | None,
    gates_E: Tensor,
    activation: str,
    expert_size: int,
    constants: Sequence[Tensor] = (),
    *,
    skip: bool = False,
    tile: Tile = FORWARD_TILE,
) -> Tensor:
    """hidden(up, gate) times the gate of each neuron's expert, [..., F] in up's dtype. Tensors are contiguous."""
    out_F = torch.empty(up_F.shape, dtype=up_F.dtype, device=up_F.device)
    if not out_F.numel():
        return out_F
    program = is_program(activation)
    grid, sizes = _sizes(up_F, gates_E, expert_size, tile)
    with torch.cuda.device_of(up_F):  # type: ignore[no-untyped-call]
        kernels.gated_hidden[grid](
            up_F,
            gate_F,
            gates_E,
            tuple(constants),
            out_F,
            **sizes,
            SKIP=skip,
            ACTIVATION=generated_kernel(activation) if program else activation,
            IS_PROGRAM=program,
            num_warps=tile.warps,
        )
    return out_F


def gated_hidden_backward(
    grad_F: Tensor,
    up_F: Tensor,
    gate_F: Tensor | None,
    gates_E: Tensor,
    activation: str,
    expert_size: int,
    constants: Sequence[Tensor],
    wanted: tuple[bool, bool, bool],
    *,
    overwrite: bool = False,
    skip: bool = False,
    tile: Tile = BACKWARD_TILE,
) -> Gradients:
    """(the gated value anew, gradients of up, gate and the gates) from that of the gated value; tensors are contiguous.

    `wanted`: the gated value, the gradients of up and gate, that of the gates; what is not is None. `overwrite`: up's
    gradient takes the place of `grad_F`.
    """

    def like(tensor: Tensor | None, is_wanted: bool) -> Tensor | None:
        if tensor is None or not is_wanted:
            return None
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    want_gated, want_hidden, want_gates = wanted
    grad_up_F = grad_F if overwrite and want_hidden else like(up_F, want_hidden)
    result = (like(up_F, want_gated), grad_up_F, like(gate_F, want_hidden), like(gates_E, want_gates))
    if not up_F.numel():
        return result
    grid, sizes = _sizes(up_F, gates_E, expert_size, tile)
    program = is_program(activation)
    with torch.cuda.device_of(up_F):  # type: ignore[no-untyped-call]
        kernels.gated_hidden_backward[grid](
            *(grad_F, up_F, gate_F, gates_E, tuple(constants), *result),
            **sizes,
            SKIP=skip,
            ACTIVATION=generated_gradient(activation) if program else activation,
            IS_PROGRAM=program,
            num_warps=tile.warps,
        )
    return result


def _sizes(up_F: Tensor, gates_E: Tensor, expert_size: int, tile: Tile) -> tuple[tuple[int], dict[str, Any]]:
    """The grid, and what the kernels' `locate` wants to know."""
    neurons, experts = up_F.shape[-1], gates_E.shape[-1]
    expert_size = min(expert_size, neurons)  # one expert may be larger than the layer
    width = int(triton.next_power_of_2(expert_size))
    pairs_of_program = max(1, tile.neurons // width)
    pairs = gates_E.numel()
    sizes = {
        "pairs": pairs,
        "F": neurons,
        "EXPERTS": experts,
        "EXPERT_SIZE": expert_size,
        "EVEN": experts * expert_size == neurons,
        "PAIRS": pairs_of_program,
        "WIDTH": width,
    }
    return (triton.cdiv(pairs, pairs_of_program),), sizes
