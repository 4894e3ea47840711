"""The dense model itself, trained for as many steps as the others: what losses are measured against."""

from __future__ import annotations

from lte_compile.baselines.registry import AtDensity, Granularity, Needs, method
from lte_compile.baselines.workbench import Workbench
from lte_compile.evaluation.selectors import Selector, installed


@method("dense", title="Dense", granularity=Granularity.FFN, needs=Needs.TRAINING, only_density=1.0)
def dense(bench: Workbench) -> AtDensity:
    """Selectors that keep everything, so that costs are counted as for the others."""
    return lambda density: installed(bench.dense, [Selector(site) for site in bench.sites])
