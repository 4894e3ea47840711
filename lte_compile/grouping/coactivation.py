"""Co-activation grouping: neurons that are large on the same tokens become one expert.

Shapes: F neurons, N traced tokens.
"""

from __future__ import annotations

from torch import Tensor

from lte_compile.config import Grouping
from lte_compile.grouping.partition import balanced_partition
from lte_compile.grouping.registry import GroupingRequest, grouping_method


@grouping_method(Grouping.COACTIVATION)
def coactivation(request: GroupingRequest) -> Tensor:
    """Balanced partition of the graph whose edge i-j weighs sum over tokens of |h_i h_j|.

    The graph is MoEfication's (arXiv 2110.01786, section 3.2); maximising the weight inside the parts is minimising
    the cut between them.
    """
    if request.activations_NF is None:
        raise ValueError(
            f"co-activation grouping needs the hidden activations of {request.name}: run a few batches of typical "
            "inputs through the model, record the input of the down projection as [tokens, neurons] and pass it as "
            "activations_NF; or choose the grouping 'balanced_kmeans', which needs weights only"
        )
    magnitudes_NF = request.activations_NF.float().abs()
    return balanced_partition(magnitudes_NF.T @ magnitudes_NF, request.expert_size, request.seed)
