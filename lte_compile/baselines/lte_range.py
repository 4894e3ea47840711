"""LTE trained once for a range of densities (lte_compile.training.budgets), its thresholds moved to each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from lte_compile.baselines.registry import AtDensity, Granularity, Needs, method
from lte_compile.baselines.workbench import Workbench
from lte_compile.calibration.density import calibrate, place_thresholds
from lte_compile.config import Stage
from lte_compile.routing.router import routers, set_stage
from lte_compile.training.budgets import Budgets
from lte_compile.training.config import lte_phases

# Where the configuration has none.
RANGE = (0.2, 0.6)


@method("lte-range", title="LTE, one for all", granularity=Granularity.EXPERT, needs=Needs.TRAINING)
def lte_range(bench: Workbench) -> AtDensity:
    lowest, highest = bench.config.budget_range or RANGE
    middle = (lowest * highest) ** 0.5
    model = bench.transformed(bench.transform)
    phases = tuple(
        replace(phase, name=f"LTE {phase.name} from {lowest:g} to {highest:g}") for phase in lte_phases(bench.config)
    )
    bench.train(model, "lte-range", phases, steer=True, target_density=middle, budget_range=(lowest, highest))
    set_stage(model, Stage.HARD)
    place_thresholds(model, bench.calibration, middle)
    calibrate(model, bench.steering, densities=Budgets(lowest, highest, target=middle).nodes)
    bench.keep(model, "lte-range")
    calibrated = [(router, router.threshold, router.score_quantiles) for router in routers(model)]

    @contextmanager
    def at(density: float) -> Iterator[nn.Module]:
        for router, threshold, quantiles in calibrated:  # whichever densities were asked for before
            router.threshold, router.score_quantiles = threshold, quantiles
        place_thresholds(model, bench.calibration, density)
        yield model

    return at
