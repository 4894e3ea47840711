"""TEAL (Liu et al. 2024, arXiv 2408.14690): what is small among a projection's inputs counts as zero. No training.

Shapes: T tokens, D model width, F neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from lte_compile.baselines.registry import AtDensity, Granularity, Needs, method
from lte_compile.baselines.thresholds import ThresholdSelector, by_thresholds
from lte_compile.baselines.workbench import Workbench
from lte_compile.evaluation.costs import Reads
from lte_compile.passes.ir import FfnSite


class InputThresholds(ThresholdSelector):
    """One threshold for the input of gate and up projection, one for the hidden value, the input of down."""

    reads: ClassVar[Reads] = Reads.INPUTS
    drops_inputs: ClassVar[bool] = True

    def __init__(self, site: FfnSite) -> None:
        super().__init__(site, count=2)

    def magnitudes(self, x_TD: Tensor, hidden_TF: Tensor) -> Sequence[Tensor]:
        return x_TD.abs(), hidden_TF.abs()

    def kept_inputs(self, x_TD: Tensor) -> Tensor:
        return x_TD.abs() > self.thresholds[0]

    def gates(self, x_TD: Tensor, hidden_TF: Tensor) -> Tensor:
        return (hidden_TF.abs() > self.thresholds[1]).to(hidden_TF.dtype)


@method("teal", title="TEAL", granularity=Granularity.INPUT, needs=Needs.TEXT)
def teal(bench: Workbench) -> AtDensity:
    """`density` of the input channels of every projection: the same share of its weights is read."""
    chosen = [InputThresholds(site) for site in bench.sites]
    for site in bench.sites:
        _check_separate(bench.dense, site)
    return by_thresholds(bench, chosen)


def _check_separate(model: nn.Module, site: FfnSite) -> None:
    """Inputs dropped for the FFN must not be missing elsewhere: some layers project to attention by the same weight."""
    projections = 1 if site.gate != site.up else 2
    if model.get_parameter(site.up).numel() != projections * site.hidden * site.width:
        raise ValueError(f"teal: {site.up} projects to more than the FFN, so its inputs cannot be dropped")
