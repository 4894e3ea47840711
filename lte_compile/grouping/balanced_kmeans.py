"""Balanced k-means over weight rows: neurons that read the same directions become one expert (LTE, section 4.1).

Shapes: F neurons, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lte_compile.config import Grouping
from lte_compile.grouping.partition import balanced_partition
from lte_compile.grouping.registry import GroupingRequest, grouping_method

# Rows multiplied at a time: larger blocks are no faster, and two of them are all that is held in float32.
BLOCK = 2048
# From here on the Gram matrix would take over 256 MB in float32. Float16 changes the inertia of SmolLM2-135M's first
# gate projection by less than 0.02 % (three seeds).
FLOAT16_FROM = 8192


@grouping_method(Grouping.BALANCED_KMEANS)
def balanced_kmeans(request: GroupingRequest) -> Tensor:
    """Equal-sized clusters of the L2-normalised rows, as in MoEfication (arXiv 2110.01786, section 3.2)."""
    return balanced_partition(cosines(request.weights_FD), request.expert_size, request.seed)


def cosines(weights_FD: Tensor) -> Tensor:
    """Cosines between all rows [F, F], float32, or float16 for many rows; computed in float32 block by block."""
    neurons = len(weights_FD)
    dtype = torch.float32 if neurons < FLOAT16_FROM else torch.float16
    result_FF = torch.empty(neurons, neurons, dtype=dtype, device=weights_FD.device)
    starts = range(0, neurons, BLOCK)
    for start in starts:
        left = slice(start, start + BLOCK)
        left_BD = _directions(weights_FD[left])
        for other in starts[: start // BLOCK + 1]:
            right = slice(other, other + BLOCK)
            right_BD = left_BD if other == start else _directions(weights_FD[right])
            block_BB = left_BD @ right_BD.T
            result_FF[left, right] = block_BB
            if other != start:
                result_FF[right, left] = block_BB.T
    return result_FF


def _directions(weights_BD: Tensor) -> Tensor:
    return torch.nn.functional.normalize(weights_BD.float(), dim=1)
