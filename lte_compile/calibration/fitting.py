"""Routers fitted to the energy that experts add to their FFN's output.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lte_compile.calibration.watching import down_norms, watch_ffns
from lte_compile.config import Stage
from lte_compile.rewriting.naming import current_sites
from lte_compile.rewriting.permutation import up_projection
from lte_compile.routing.router import require_routers
from lte_compile.running.inputs import Batch, at_least_one
from lte_compile.running.modes import in_stage

# MiniLM on TREC, target .14 for every layer: one round gives .087 over unseen questions (.139 in the first layer, .041
# in the last) and 80.9 % before training; two give .145 and 84.6 %; a third and fitting layer by layer change nothing.
FIT_ROUNDS = 2


def fit_routers(model: nn.Module, batches: Iterable[Batch], density: float, *, rounds: int = FIT_ROUNDS) -> nn.Module:
    """Set every router by ridge regression on data, so that `density` of its (token, expert) pairs is selected.

    Each router then predicts which experts matter (log of the energy they add to the output) before any training;
    of the starts that were measured it is the one that keeps its density (docs/training.md). The first round sees
    inputs of the dense model; each further one those of the model with the routers so far, because layers above sparse
    ones see other inputs. The model's stage is left as it was. Returns the model.

    Args:
        batches: as for `calibrate`; padding is read from `attention_mask`. A few thousand tokens suffice.
        density: target share of active neurons in the hard stage, in (0, 1), for every site.

    Raises:
        ValueError: no routers, routers without a bias, density or rounds out of range, no batch, or non-finite
            activations.
    """
    found = require_routers(model)
    if missing := [r.site.name for r in found if r.bias is None]:
        raise ValueError(f"fitted routers need a bias; transform with router_bias=True (site {missing[0]} has none)")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1; got {rounds}")
    batches = list(at_least_one(batches))
    sites = current_sites(model)
    for number in range(rounds):
        fits = {r: r.new_fit(down_norms(model, sites[r]), *up_projection(model, sites[r])) for r in found}
        with in_stage(model, Stage.HARD if number else Stage.DENSE):
            watch_ffns(model, batches, {sites[r]: fits[r].update for r in found})
        for router, fit in fits.items():
            router.threshold = router.config.threshold
            router.load_initial(*fit.solve(density, threshold=router.threshold))
    return model
