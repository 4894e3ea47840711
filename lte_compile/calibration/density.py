"""The run-time density knob: routers' scores measured on data, and thresholds placed by them.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeAlias

import torch
from torch import Tensor, nn

from lte_compile.config import Stage
from lte_compile.routing.linear_fit import logit_of
from lte_compile.routing.router import Router, require_routers
from lte_compile.running.inputs import Batch, at_least_one
from lte_compile.running.modes import eval_mode, for_layers, in_stage
from lte_compile.running.tracing import RouterTrace, site_names, trace_routers

Quantiles: TypeAlias = tuple[float, ...]  # of a router's scores, evenly spaced and rising

# Moving the thresholds shifts what later layers see, so scores are measured again at the new ones, until the density is
# there: two or three rounds near a density that was trained for, five far from it.
CALIBRATION_ROUNDS = 8
DENSITY_TOLERANCE = 0.005  # of the wish
# A density that ends further off is worth a warning: what training promises of its target.
DENSITY_MISSED = 0.02
# Resolution of the calibrated score distribution: half a percent of density, well under its sampling noise.
NUM_QUANTILES = 201
# Of the interval in which a threshold is sought: to where float32 scores cannot tell any more.
BISECTIONS = 64
# Of one router and batch; what is left out are tokens. Sorting all scores of 8,192 tokens and 384 experts takes longer
# than computing them.
SORTED_SCORES = 2**20


@torch.no_grad()
def evaluate_routers(model: nn.Module, batches: Iterable[Batch]) -> RouterTrace:
    """The trace of the hard-stage model in eval mode over all batches: the density that counts."""
    with eval_mode(model), in_stage(model, Stage.HARD), trace_routers(model) as trace:
        for batch in at_least_one(batches):
            model(**for_layers(model, batch))
    return trace


def calibrate(model: nn.Module, batches: Iterable[Batch], *, densities: Sequence[float] = ()) -> nn.Module:
    """Measure the routers' score distributions in the hard stage, so that `set_density` can serve any budget.

    Use held-out batches of the kind the model will see. The result is saved with the model. Returns the model.

    Args:
        batches: each a mapping of keyword arguments for the model, a tuple of positional ones, or one tensor.
        densities: measure at these budgets, a few passes over the batches for each, instead of at the thresholds of
            now alone: the further a threshold moves, the more the scores of later layers change.
    """
    if not densities:
        _calibrate(model, batches)
        return model
    if wrong := [density for density in densities if not 0.0 < density <= 1.0]:
        raise ValueError(f"densities must lie in (0, 1]; got {wrong[0]!r}")
    batches, found = list(at_least_one(batches)), require_routers(model)
    before = [router.threshold for router in found]
    tables = []
    for density in sorted(densities, reverse=True):  # their thresholds rise
        threshold = place_thresholds(model, batches, density)
        tables.append((threshold, [router.score_quantiles for router in found]))
    for number, (router, threshold) in enumerate(zip(found, before, strict=True)):
        router.threshold = threshold
        router.score_quantiles = _joined([(tau, quantiles[number]) for tau, quantiles in tables])
    return model


def _joined(tables: Sequence[tuple[float, Quantiles]]) -> Quantiles:
    """Quantiles of which each is as measured at a threshold near it; between two thresholds shares are mixed."""
    taus, share, levels = sorted(set(chain.from_iterable(q for _, q in tables))), 1.0, [0.0]
    for tau in taus[1:]:
        share = min(share, _mixed_share(tables, tau))  # falls with tau, if not always in what was measured
        levels.append(1 - share)
    found = []
    for index in range(NUM_QUANTILES):
        wanted = levels[-1] * index / (NUM_QUANTILES - 1)
        right = min(max(bisect_right(levels, wanted), 1), len(taus) - 1)
        gap = levels[right] - levels[right - 1]
        part = min((wanted - levels[right - 1]) / gap, 1.0) if gap else 0.0
        found.append(taus[right - 1] + part * (taus[right] - taus[right - 1]))
    return tuple(found)


def _mixed_share(tables: Sequence[tuple[float, Quantiles]], tau: float) -> float:
    """Share of scores above tau, by the tables of the thresholds to its left and right."""
    right = min(max(bisect_right([threshold for threshold, _ in tables], tau), 1), len(tables) - 1)
    (low, below), (high, above) = tables[max(right - 1, 0)], tables[right]
    weight = min(max((tau - low) / (high - low), 0.0), 1.0) if high > low else 1.0
    return (1 - weight) * _share_above(below, tau) + weight * _share_above(above, tau)


def _calibrate(model: nn.Module, batches: Iterable[Batch]) -> float:
    """`calibrate`; returns the density at the thresholds of now."""
    names = site_names(model)
    kept: dict[Router, list[Tensor]] = {router: [] for router in names}
    active = neurons = 0
    for batch in at_least_one(batches):
        trace = evaluate_routers(model, [batch])
        for router, name in names.items():
            kept[router].append(_spread_over_tokens(trace.scores(name)))
        now_active, now_neurons = map(sum, zip(*trace.neuron_counts().values(), strict=True))
        active, neurons = active + now_active, neurons + now_neurons
    levels = torch.linspace(0, 1, NUM_QUANTILES, dtype=torch.float64)
    for router, parts in kept.items():
        scores = torch.cat(parts).sort().values
        positions = (levels.to(scores.device) * (len(scores) - 1)).round().long()
        router.score_quantiles = tuple(scores[positions].tolist())
    return active / neurons if neurons else float("nan")


def _spread_over_tokens(scores_TE: Tensor) -> Tensor:
    """The scores of all tokens, or of evenly spread ones if there are too many, in one row."""
    return scores_TE[:: -(-scores_TE.numel() // SORTED_SCORES) or 1].flatten()


def place_thresholds(
    model: nn.Module, batches: Sequence[Batch], density: float, *, rounds: int = CALIBRATION_ROUNDS
) -> float:
    """`calibrate` and `set_density`, again and again, each time at the thresholds so far; returns the threshold.

    Ends when the density on these batches is within DENSITY_TOLERANCE of the wish, or after so many rounds, at the
    closest that was measured. Warns where that is DENSITY_MISSED or more away.
    """
    found = require_routers(model)
    here = _place(model, batches, None)
    is_shared = len({router.threshold for router in found}) == 1
    search = _Search(density, started=here if is_shared else None)
    for _ in range(rounds):
        threshold = search.between()
        here = _place(model, batches, set_density(model, density) if threshold is None else threshold)
        search.add(here)
        if search.miss(here) <= DENSITY_TOLERANCE * density:
            break
    best = search.closest()
    for router, quantiles in zip(found, best.quantiles, strict=True):
        router.threshold, router.score_quantiles = best.threshold, quantiles
    if search.miss(best) >= DENSITY_MISSED:
        warnings.warn(
            f"asked for a density of {density:g}, thresholds reach {best.density:.3f}: {search.reason()}", stacklevel=2
        )
    return best.threshold


@dataclass(frozen=True)
class _Placed:
    """One threshold of all routers, and what was measured there."""

    threshold: float
    density: float
    quantiles: tuple[Quantiles, ...]


def _place(model: nn.Module, batches: Sequence[Batch], threshold: float | None) -> _Placed:
    """Measures at a threshold of all routers; None takes them as they are."""
    found = require_routers(model)
    if threshold is not None:
        for router in found:
            router.threshold = threshold
    density = _calibrate(model, batches)
    return _Placed(found[0].threshold, density, tuple(router.score_quantiles for router in found))


@dataclass
class _Search:
    """Thresholds tried for a density.

    Later layers see less the more earlier ones leave out, and may answer with more experts than they save: a threshold
    that is raised can then raise the density. Half of such a step is taken back, again and again while rounds last; of
    the thresholds too dense, and of those too sparse, the closest to the wish is kept.
    """

    wish: float
    started: _Placed | None  # None where no threshold was shared
    tried: dict[bool, _Placed] = field(default_factory=dict)  # by whether it was too dense
    astray: _Placed | None = None  # the last one, where it was further off than the one before it on its side
    strayed: bool = False

    def miss(self, placed: _Placed) -> float:
        return abs(placed.density - self.wish)

    def add(self, placed: _Placed) -> None:
        side = placed.density > self.wish
        nearest = self._nearest(side)
        if nearest is not None and self.miss(placed) > self.miss(nearest):
            self.astray, self.strayed = placed, True
        else:
            self.astray = None
            self.tried[side] = placed

    def _nearest(self, side: bool) -> _Placed | None:
        if side in self.tried:
            return self.tried[side]
        return self.started if self.started and (self.started.density > self.wish) == side else None

    def between(self) -> float | None:
        """A threshold between two that were measured; None where the scores measured last say better."""
        if self.astray is None:
            return self._crossing(*self.tried.values()) if len(self.tried) == 2 else None
        side = self.astray.density > self.wish
        nearest, across = self._nearest(side), self.tried.get(not side)
        assert nearest is not None  # nothing is astray but from one
        if across is not None:
            low, high = sorted((nearest.threshold, across.threshold))
            if not low < self.astray.threshold < high:
                return self._crossing(nearest, across)
        return (self.astray.threshold + nearest.threshold) / 2

    def _crossing(self, one: _Placed, other: _Placed) -> float:
        """Where the line between two, of which one is too dense and the other too sparse, has the wish."""
        share = (one.density - self.wish) / (one.density - other.density)
        return one.threshold + share * (other.threshold - one.threshold)

    def closest(self) -> _Placed:
        known = [*self.tried.values(), *([self.started] if self.started else [])]
        return min(known, key=self.miss)

    def reason(self) -> str:
        if self.strayed:
            return (
                "beyond that the density moved away again, as later layers choose other experts where earlier ones do; "
                "ask for a density nearer to the one trained for"
            )
        return (
            "too many scores are alike, as they are where routers were trained until most are 0 or 1; a lower router "
            "learning rate keeps them apart"
        )


@torch.no_grad()
def logit_shifts(
    model: nn.Module, batches: Iterable[Batch], densities: Sequence[float]
) -> tuple[tuple[float, ...], float]:
    """What all routers' logits have to be lowered by for each density of active neurons; and the density now.

    One number for all routers: layers keep the shares they learned. For routers that share one threshold.
    """
    calibrate(model, batches)
    budget = _Budget(require_routers(model), 0.0, 1.0)
    threshold = budget.routers[0].threshold
    shifts = tuple(logit_of(budget.threshold_for(density)) - logit_of(threshold) for density in densities)
    return shifts, budget.density_at(threshold)


def set_density(model: nn.Module, density: float, *, floor: float = 0.0, ceiling: float = 1.0) -> float:
    """Move the threshold of every router so that about `density` of all neurons is active. Returns the threshold.

    One threshold serves all sites: layers keep the shares they learned. A site whose share it would take below `floor`
    or above `ceiling` gets a threshold of its own; with both equal to `density` every site has the same share. Scores
    are as measured by `calibrate`, at the threshold of that time; the further away the new one, the more inputs of
    later layers shift (docs/training.md).

    Raises:
        ValueError: density outside (0, 1] or outside [floor, ceiling], or a model that was not calibrated.
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must lie in (0, 1]; got {density!r}")
    if not 0.0 <= floor <= density <= ceiling <= 1.0:
        raise ValueError(
            f"floor <= density <= ceiling must hold, all in [0, 1]; got {floor!r}, {density!r}, {ceiling!r}"
        )
    found = require_routers(model)
    if missing := [r.site.name for r in found if not r.score_quantiles]:
        raise ValueError(
            f"site {missing[0]} has no calibrated scores; call lte_compile.calibrate(model, batches) first"
        )
    budget = _Budget(found, floor, ceiling)
    threshold = budget.threshold_for(density)
    for router in found:
        router.threshold = budget.threshold_at(router, threshold)
    return threshold


@dataclass(frozen=True)
class _Budget:
    """Densities of calibrated routers under one threshold, each kept between a floor and a ceiling."""

    routers: tuple[Router, ...]
    floor: float
    ceiling: float

    def threshold_for(self, density: float) -> float:
        """The score with the density closest to, but not above, the wish."""
        if density == 1.0:
            return 0.0
        low, high = 0.0, max(router.score_quantiles[-1] for router in self.routers)
        for _ in range(BISECTIONS):  # density_at falls with tau
            middle = (low + high) / 2
            low, high = (low, middle) if self.density_at(middle) <= density else (middle, high)
        return high

    def density_at(self, tau: float) -> float:
        active = sum(self._share(r, tau) * r.site.hidden for r in self.routers)
        return active / sum(r.site.hidden for r in self.routers)

    def threshold_at(self, router: Router, tau: float) -> float:
        """tau, or the router's own where tau leaves its bounds."""
        share = self._share(router, tau)
        if share == _share_above(router.score_quantiles, tau):
            return tau
        position = (1 - share) * (NUM_QUANTILES - 1)
        below = min(int(position), NUM_QUANTILES - 2)
        left, right = router.score_quantiles[below : below + 2]
        return left + (position - below) * (right - left) if share < 1 else 0.0

    def _share(self, router: Router, tau: float) -> float:
        return min(max(_share_above(router.score_quantiles, tau), self.floor), self.ceiling)


def _share_above(found: Quantiles, tau: float) -> float:
    """Share of a router's scores above tau, linear between the quantiles."""
    count = bisect_right(found, tau)
    if count in (0, len(found)):
        return 1.0 - count / len(found)
    left, right = found[count - 1 : count + 1]
    return 1 - (count - 1 + (tau - left) / (right - left)) / (len(found) - 1)
