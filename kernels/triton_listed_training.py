"""Launches of the products over each expert's tokens, for training with few active experts on a GPU.

The lists (kernels.token_lists) stay on the device, so grids have room for lists of every token. Results are bit-equal
from run to run: every value is computed by one program, in the order of its list or of the model's columns.
Shape suffixes: T tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lte_compile.kernels import listed_training_kernels as kernels
from lte_compile.kernels.token_lists import TokenLists, list_tokens

MIN_DOT = 16  # tl.dot's smallest side
Pair = tuple[Tensor, Tensor | None]
Biases = tuple[Tensor | None, Tensor | None]


class Tile(NamedTuple):
    """Tokens, neurons (of each matrix) and columns of one step, powers of two; warps; loads in flight."""

    tokens: int
    neurons: int
    columns: int
    warps: int
    stages: int


# Of 11 and 14 tried for 4096 x 11008 on an H200.
ROWS_TILE = Tile(tokens=128, neurons=32, columns=64, warps=8, stages=4)
OUTER_TILE = Tile(tokens=64, neurons=32, columns=128, warps=4, stages=3)


def list_active(gates_TE: Tensor) -> TokenLists:
    """The tokens at which each expert's gate is not zero."""
    return list_tokens((gates_TE != 0).to(torch.float32), 0.0)


def listed_rows(
    rows_TD: Tensor, lists: TokenLists, weights_FD: Pair, biases_F: Biases, size: int, tile: Tile = ROWS_TILE
) -> Pair:
    """rows W^T + b [T, F] of one or two weights, at each expert's listed tokens; other entries are unset.

    `rows_TD` is contiguous. Two weights have the same strides, whatever these are.
    """
    tokens, neurons = rows_TD.shape[0], weights_FD[0].shape[0]
    tile = _fitting(tile, size, rows_TD.shape[1])
    blocks = triton.cdiv(tokens, tile.tokens)

    def unset() -> Tensor:
        return torch.empty(tokens, neurons, dtype=rows_TD.dtype, device=rows_TD.device)

    outs_TF = (unset(), None if weights_FD[1] is None else unset())
    if outs_TF[0].numel():
        biases_F = (_contiguous(biases_F[0]), _contiguous(biases_F[1]))
        with torch.cuda.device_of(rows_TD):  # type: ignore[no-untyped-call]
            kernels.listed_rows[(_units(lists, size, tile) * blocks,)](
                *(rows_TD, *lists, *weights_FD, *biases_F, *outs_TF, tokens, neurons),
                **_sizes(weights_FD[0], size, tile),
            )
    return outs_TF


def listed_outer(
    values_TF: Pair, rows_TD: Tensor, lists: TokenLists, outs_FD: Pair, size: int, tile: Tile = OUTER_TILE
) -> None:
    """Writes values^T rows over each expert's listed tokens into one or two matrices [F, D] of the same strides.

    Values of tokens that are not listed are not read; values and rows are contiguous.
    """
    (tokens, width), neurons = rows_TD.shape, outs_FD[0].shape[0]
    tile = _fitting(tile, size, width)
    if not outs_FD[0].numel():
        return
    with torch.cuda.device_of(rows_TD):  # type: ignore[no-untyped-call]
        kernels.listed_outer[(_units(lists, size, tile) * triton.cdiv(width, tile.columns),)](
            *(rows_TD, *lists, *values_TF, *outs_FD, tokens, neurons),
            EXPERTS=len(lists.counts_E),
            **_sizes(outs_FD[0], size, tile),
        )


def _units(lists: TokenLists, expert_size: int, tile: Tile) -> int:
    """Blocks of neurons: those of one expert are programs of their own."""
    return len(lists.counts_E) * int(triton.cdiv(expert_size, tile.neurons))


def _sizes(matrix_FD: Tensor, expert_size: int, tile: Tile) -> dict[str, int]:
    return {
        "D": matrix_FD.shape[1],
        "NEURON_STRIDE": matrix_FD.stride(0),
        "COLUMN_STRIDE": matrix_FD.stride(1),
        "EXPERT_SIZE": expert_size,
        "TOKENS": tile.tokens,
        "NEURONS": tile.neurons,
        "BLOCK": tile.columns,
        "STAGES": tile.stages,
        "num_warps": tile.warps,
    }


def _contiguous(bias_F: Tensor | None) -> Tensor | None:
    """Biases of interleaved projections are every other number of one."""
    return None if bias_F is None else bias_F.contiguous()


def _fitting(tile: Tile, expert_size: int, width: int) -> Tile:
    def at_most(size: int, largest: int) -> int:
        return max(MIN_DOT, min(largest, int(triton.next_power_of_2(size))))

    return tile._replace(neurons=at_most(expert_size, tile.neurons), columns=at_most(width, tile.columns))
