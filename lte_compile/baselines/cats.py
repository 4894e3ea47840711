"""CATS (Lee et al. 2024, arXiv 2404.08763): neurons whose gate activation is small are left out. No training.

Shapes: T tokens, D model width, F neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from lte_compile.baselines.registry import AtDensity, Granularity, Needs, method
from lte_compile.baselines.thresholds import ThresholdSelector, by_thresholds
from lte_compile.baselines.workbench import Workbench
from lte_compile.evaluation.costs import Reads
from lte_compile.kernels.activations import find_activation
from lte_compile.passes.ir import FfnSite
from lte_compile.rewriting.permutation import projection_bias, projection_rows


class GateThreshold(ThresholdSelector):
    """Computes the gate projection whole, its activation too, and keeps the neurons where that is large.

    An FFN without a gate has its up-projection in this role: what is thresholded is then the hidden value itself.
    """

    reads: ClassVar[Reads] = Reads.GATE_FIRST

    def __init__(self, site: FfnSite, model: nn.Module) -> None:
        super().__init__(site, count=1)
        self.activation = find_activation(site.activation)
        self.rows_FD = projection_rows(model, site)
        self.bias_F = projection_bias(model, site)

    def magnitudes(self, x_TD: Tensor, hidden_TF: Tensor) -> Sequence[Tensor]:
        return (self.activation.apply(F.linear(x_TD, self.rows_FD, self.bias_F)).abs(),)

    def gates(self, x_TD: Tensor, hidden_TF: Tensor) -> Tensor:
        [gate_TF] = self.magnitudes(x_TD, hidden_TF)
        return (gate_TF > self.thresholds[0]).to(hidden_TF.dtype)


@method("cats", title="CATS", granularity=Granularity.NEURON, needs=Needs.TEXT)
def cats(bench: Workbench) -> AtDensity:
    """`density` of the neurons; the gate projection is read whole, which the weight bytes count."""
    chosen = [GateThreshold(site, bench.dense) for site in bench.sites]
    return by_thresholds(bench, chosen)
