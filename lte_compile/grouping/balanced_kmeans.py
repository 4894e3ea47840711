"""Balanced k-means over weight rows: neurons that read the same directions become one expert (LTE, section 4.1).

Shapes: F neurons, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lte_compile.config import Grouping
from lte_compile.grouping.partition import balanced_partition
from lte_compile.grouping.registry import GroupingRequest, grouping_method


@grouping_method(Grouping.BALANCED_KMEANS)
def balanced_kmeans(request: GroupingRequest) -> Tensor:
    """Equal-sized clusters of the L2-normalised rows, as in MoEfication (arXiv 2110.01786, section 3.2)."""
    rows_FD = torch.nn.functional.normalize(request.weights_FD.float(), dim=1)
    return balanced_partition(rows_FD @ rows_FD.T, request.expert_size, request.seed)
