"""A random linear router that never learns, and a model trained around it: the floor for learned routing.

Shapes: D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lte_compile.baselines.predicted import RULE, at_share, routed_by, set_share, start_with_experts
from lte_compile.baselines.registry import AtDensity, Granularity, Needs, method
from lte_compile.baselines.workbench import Workbench
from lte_compile.config import Stage, TransformConfig
from lte_compile.passes.ir import FfnSite
from lte_compile.routing.router import Router
from lte_compile.training.config import Phase


@method("random", title="Random router", granularity=Granularity.EXPERT, needs=Needs.TRAINING, fits_each_density=True)
def random_router(bench: Workbench) -> AtDensity:
    @contextmanager
    def at(density: float) -> Iterator[nn.Module]:
        model = start_with_experts(bench, bench.transform)
        routed_by(model, _random_router, bench.config.seed)
        set_share(model, density)
        phase = Phase(name=f"random router at {density:g}", steps=bench.steps, stage=Stage.HARD, selection=RULE)
        name = f"random-{density:g}"
        bench.train(model, name, [phase])
        with at_share(model, density):
            yield model
        bench.forget(name)

    return at


def _random_router(site: FfnSite, config: TransformConfig, like: Tensor) -> Router:
    """Normal rows of expected length 1 and no bias, so that every expert is as likely as any other."""
    router = Router(site, config, like=like)
    weight_ED = torch.randn(router.weight.shape) / site.width**0.5
    router.load_initial(weight_ED, weight_ED.new_zeros(router.num_experts))
    return router
