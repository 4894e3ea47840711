"""LTE itself (arXiv 2402.06126), as `lte-compile train` runs it (docs/training.md)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from lte_compile.baselines.registry import AtDensity, Granularity, Needs, method
from lte_compile.baselines.workbench import Workbench
from lte_compile.calibration.density import place_thresholds
from lte_compile.config import Stage
from lte_compile.routing.router import set_stage
from lte_compile.training.config import Phase, lte_phases


@method("lte", title="LTE", granularity=Granularity.EXPERT, needs=Needs.TRAINING, fits_each_density=True)
def lte(bench: Workbench) -> AtDensity:
    @contextmanager
    def at(density: float) -> Iterator[nn.Module]:
        model = bench.transformed(bench.transform)
        name = f"lte-{density:g}"
        bench.train(model, name, _phases(bench, density), steer=True, target_density=density, budget_range=None)
        set_stage(model, Stage.HARD)
        if bench.config.is_steered:
            place_thresholds(model, bench.calibration, density)
        bench.keep(model, name)
        yield model
        bench.forget(name)

    return at


def _phases(bench: Workbench, density: float) -> tuple[Phase, ...]:
    """LTE's two stages, named after the density for whoever watches."""
    return tuple(replace(phase, name=f"LTE {phase.name} at {density:g}") for phase in lte_phases(bench.config))
