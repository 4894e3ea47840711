"""KLA, the oracle that keeps a token's largest activations: LTE's paper compares with it (arXiv 2402.06126).

Shapes: T tokens, F neurons.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from lte_compile.baselines.registry import AtDensity, Granularity, Needs, method
from lte_compile.baselines.workbench import Workbench
from lte_compile.evaluation.selectors import Selector, installed
from lte_compile.kernels.selection import top_share
from lte_compile.passes.ir import FfnSite


class TopNeurons(Selector):
    """Keeps, per token, the share `density` of neurons with the largest |hidden activation|, at least one."""

    def __init__(self, site: FfnSite, density: float) -> None:
        super().__init__(site)
        self.density = density

    def gates(self, x_TD: Tensor, hidden_TF: Tensor) -> Tensor:
        return top_share(hidden_TF.abs(), self.density)


@method("kla", title="KLA oracle", granularity=Granularity.NEURON, needs=Needs.NOTHING, is_oracle=True)
def kla(bench: Workbench) -> AtDensity:
    return lambda density: oracle_selection(bench.dense, bench.sites, density)


@contextmanager
def oracle_selection(model: nn.Module, sites: Sequence[FfnSite], density: float) -> Iterator[nn.Module]:
    """Inside the block, each FFN keeps only the neurons that `TopNeurons` does.

    The oracle has computed them all first: an upper bound for selection without training.
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must lie in (0, 1]; got {density!r}")
    with installed(model, [TopNeurons(site, density) for site in sites]):
        yield model
