"""The tile of the grouped product of many tokens: what its launch and the estimate of its cost share."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, sqrt

import torch

MIN_SIDE, MAX_NEURONS = 16, 32  # tl.dot's smallest side; up and gate of 32 neurons make a product 64 wide


@dataclass(frozen=True)
class GroupedTile:
    """Rows of x, neurons and columns of a step (powers of two, at least 16), and how the programs run."""

    tokens: int
    neurons: int
    block: int
    warps: int = 4
    stages: int = 3
    programs_per_sm: int = 2


# Rows, columns of a step, stages, programs per multiprocessor, and the rate over that of the largest tile: the best of
# 25 tried for 4096 x 11008 on an H200 at 256 to 8192 tokens and densities .05 to .5. A larger tile wastes the end of
# each list, a smaller one reads weights more often.
_TILES = ((128, 64, 3, 3, 1.0), (64, 128, 3, 2, 0.8), (32, 128, 4, 3, 0.6))


def grouped_tile(rows: float, expert_size: int, dtype: torch.dtype) -> GroupedTile:
    """The tile for experts that read about this many rows each."""
    neurons = max(MIN_SIDE, min(MAX_NEURONS, 1 << (expert_size - 1).bit_length()))
    if dtype == torch.float32:  # no tensor cores: the sums of a larger tile would not stay in registers
        return GroupedTile(64, neurons, 32)
    tokens, block, stages, programs, _ = min(_TILES, key=lambda tile: padded_rows(rows, tile[0]) / tile[-1])
    return GroupedTile(tokens, neurons, block, stages=stages, programs_per_sm=programs)


def padded_rows(rows: float, tile_tokens: int) -> int:
    """Rows of the tiles that an expert's list takes; lists' lengths vary by about their square root."""
    return tile_tokens * ceil((rows + 0.5 * sqrt(rows)) / tile_tokens)
