"""Which neurons form an expert. `group_neurons` is the interface; each method is one registered function.

Adding a method: write `@grouping_method("name") def name(request) -> permutation_F`, import it here, and test it.
"""

from lte_compile.grouping.balanced_kmeans import balanced_kmeans
from lte_compile.grouping.coactivation import coactivation
from lte_compile.grouping.plain import contiguous, random
from lte_compile.grouping.registry import (
    GROUPING_METHODS,
    GroupingRequest,
    check_expert_size,
    group_neurons,
    grouping_method,
    is_finite,
)

__all__ = [
    "GROUPING_METHODS",
    "GroupingRequest",
    "balanced_kmeans",
    "check_expert_size",
    "coactivation",
    "contiguous",
    "group_neurons",
    "grouping_method",
    "is_finite",
    "random",
]
