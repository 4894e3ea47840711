"""MoEfication with oracle selection (Zhang et al. 2022, arXiv 2110.01786): clustered neurons, the best experts.

Shapes: T tokens, F neurons, E experts.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import Tensor, nn

from lte_compile.baselines.registry import AtDensity, Granularity, Needs, method
from lte_compile.baselines.workbench import Workbench
from lte_compile.config import Grouping
from lte_compile.evaluation.selectors import Selector, installed
from lte_compile.grouping import GroupingRequest, group_neurons
from lte_compile.kernels.experts import sum_per_expert
from lte_compile.kernels.selection import top_share
from lte_compile.passes.ir import FfnSite
from lte_compile.rewriting.permutation import permute_neurons, projection_rows


class TopExperts(Selector):
    """Keeps, per token, the share `density` of experts with the largest activation mass, at least one."""

    def __init__(self, site: FfnSite, expert_size: int, density: float) -> None:
        super().__init__(site, expert_size)
        self.density = density

    def gates(self, x_TD: Tensor, hidden_TF: Tensor) -> Tensor:
        return top_share(activation_mass(hidden_TF, self.expert_size), self.density)


@method(
    "moefication-oracle",
    title="MoEfication, oracle",
    granularity=Granularity.EXPERT,
    needs=Needs.NOTHING,
    is_oracle=True,
)
def moefication_oracle(bench: Workbench) -> AtDensity:
    model, size = bench.dense_copy(), bench.transform.expert_size
    for site in bench.sites:
        _cluster(model, site, size, bench.transform.seed)

    def at(density: float) -> AbstractContextManager[nn.Module]:
        return installed(model, [TopExperts(site, size, density) for site in bench.sites])

    return at


def activation_mass(hidden_TF: Tensor, expert_size: int) -> Tensor:
    """Sum of |hidden| per expert, [T, E].

    The paper sums ReLU activations, which are their own absolute values. Gated and smooth activations have negative
    ones that matter as much, hence the bars.
    """
    experts = -(-hidden_TF.shape[-1] // expert_size)
    return sum_per_expert(hidden_TF.abs(), experts, expert_size, None)


def _cluster(model: nn.Module, site: FfnSite, expert_size: int, seed: int) -> None:
    request = GroupingRequest(
        method=Grouping.BALANCED_KMEANS,
        weights_FD=projection_rows(model, site),
        expert_size=expert_size,
        seed=seed,
        name=site.name,
    )
    permute_neurons(model, site, group_neurons(request))
