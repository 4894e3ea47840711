"""Fitting a model to data without training it: router initialisation, traced activations, the run-time density knob.

Shapes: T tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lte_compile.attach import follow_ffn
from lte_compile.config import Stage
from lte_compile.modes import eval_mode, for_layers, in_stage, on_device
from lte_compile.naming import current_sites
from lte_compile.padding import PaddingReader, drop_padding
from lte_compile.passes.ir import FfnSite, WeightLayout
from lte_compile.permutation import up_projection
from lte_compile.places import locate
from lte_compile.router_init import logit_of
from lte_compile.routing import Router, require_routers
from lte_compile.tracing import RouterTrace, site_names, trace_routers

Batch = Mapping[str, Any]
SeeFfn = Callable[[Tensor, Tensor], None]
Quantiles: TypeAlias = tuple[float, ...]  # of a router's scores, evenly spaced and rising

# Tokens kept per site for co-activation grouping: ten per neuron of the 1,536 of a small model (docs/grouping.md).
MAX_ACTIVATION_TOKENS = 16_384
# MiniLM on TREC, target .14 for every layer: one round gives .087 over unseen questions (.139 in the first layer, .041
# in the last) and 80.9 % before training; two give .145 and 84.6 %; a third and fitting layer by layer change nothing.
FIT_ROUNDS = 2
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


def fit_routers(model: nn.Module, batches: Iterable[Batch], density: float, *, rounds: int = FIT_ROUNDS) -> nn.Module:
    """Set every router by ridge regression on data, so that `density` of its (token, expert) pairs is selected.

    Each router then predicts which experts matter (log of the energy they add to the output) before any training;
    of the starts that were measured it is the one that keeps its density (docs/training.md). The first round sees
    inputs of the dense model; each further one those of the model with the routers so far, because layers above sparse
    ones see other inputs. The model's stage is left as it was. Returns the model.

    Args:
        batches: keyword arguments for the model; padding is read from `attention_mask`. A few thousand tokens suffice.
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
    batches = list(batches)
    sites = current_sites(model)
    for number in range(rounds):
        fits = {r: r.new_fit(down_norms(model, sites[r]), *up_projection(model, sites[r])) for r in found}
        with in_stage(model, Stage.HARD if number else Stage.DENSE):
            watch_ffns(model, batches, {sites[r]: fits[r].update for r in found})
        for router, fit in fits.items():
            router.threshold = router.config.threshold
            router.load_initial(*fit.solve(density, threshold=router.threshold))
    return model


def collect_activations(
    model: nn.Module, sites: Iterable[FfnSite], batches: Iterable[Batch], *, max_tokens: int = MAX_ACTIVATION_TOKENS
) -> dict[str, Tensor]:
    """Hidden activations [N, F] per site over non-padding tokens, for transform's grouping="coactivation".

    `sites` come from `lte_compile.inspect(model).ffn_sites`. The first `max_tokens` tokens are kept, on the CPU.
    """
    first, batches = _peek(batches)
    located = locate_sites(model, tuple(sites), first)
    kept: dict[FfnSite, list[Tensor]] = {site: [] for site in located}

    def keeper(parts: list[Tensor]) -> SeeFfn:
        def keep(x_TD: Tensor, hidden_TF: Tensor) -> None:
            room = max_tokens - sum(map(len, parts))
            parts.append(hidden_TF[: max(room, 0)].cpu().clone())

        return keep

    watch_ffns(model, batches, {site: keeper(parts) for site, parts in kept.items()})
    return {site.name: torch.cat(parts) for site, parts in kept.items()}


def locate_sites(model: nn.Module, sites: Sequence[FfnSite], batch: Batch) -> tuple[FfnSite, ...]:
    """The sites with the places where the model runs them on this batch."""
    return locate(model, sites, lambda: _call(model, batch))


def _peek(batches: Iterable[Batch]) -> tuple[Batch, Iterable[Batch]]:
    """The first batch, and all of them."""
    remaining = iter(_at_least_one(batches))
    first = next(remaining)
    return first, chain([first], remaining)


def _call(model: nn.Module, batch: Batch) -> None:
    with torch.no_grad(), eval_mode(model):
        model(**on_device(model, batch))


def down_norms(model: nn.Module, site: FfnSite) -> Tensor:
    """Length of each neuron's down-projection vector, float32 [F]."""
    weight = model.get_parameter(site.down).detach()
    weight = weight.flatten(1) if site.down_layout is WeightLayout.OUT_IN else weight.t()
    norms_F: Tensor = weight[:, site.down_start : site.down_start + site.hidden].float().norm(dim=0)
    return norms_F


@torch.no_grad()
def watch_ffns(model: nn.Module, batches: Iterable[Batch], watchers: Mapping[FfnSite, SeeFfn]) -> None:
    """Run the model in eval mode, showing each watcher its FFN's inputs [T, D] and ungated hidden values [T, F].

    Padding is left out, and there are no gradients. Sites need places (`locate_sites`, or a transformed model's).
    """
    with eval_mode(model), watching(model, watchers):
        for batch in _at_least_one(batches):
            model(**for_layers(model, batch))


def _at_least_one(batches: Iterable[Batch]) -> Iterator[Batch]:
    empty = True
    for batch in batches:
        empty = False
        yield batch
    if empty:
        raise ValueError("no batches were given; pass at least one mapping of keyword arguments for the model")


@contextmanager
def watching(model: nn.Module, watchers: Mapping[FfnSite, SeeFfn]) -> Iterator[None]:
    """Show each watcher its FFN's inputs and hidden values while the model runs inside the block."""
    padding = PaddingReader(model)
    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(padding, with_kwargs=True).remove)
        for site, see in watchers.items():
            watch = _WatchFfn(site, padding, see)
            stack.callback(follow_ffn(model, site, watch.see_input, watch.see_hidden))
        yield


class _WatchFfn:
    """Brings an FFN's input and hidden value of the same call together."""

    def __init__(self, site: FfnSite, padding: PaddingReader, see: SeeFfn) -> None:
        self.site = site
        self.padding = padding
        self.see = see
        self.x_TD = torch.empty(0)

    def see_input(self, module: nn.Module, x_TD: Tensor) -> None:
        self.x_TD = self._counted(module, x_TD)

    def see_hidden(self, module: nn.Module, input_TF: Tensor) -> None:
        hidden_TF = input_TF[..., self.site.down_start : self.site.down_start + self.site.hidden]
        self.see(self.x_TD, self._counted(module, hidden_TF))

    def _counted(self, module: nn.Module, values: Tensor) -> Tensor:
        return drop_padding(values, self.padding.mask_of(module, self.padding.current))


@torch.no_grad()
def evaluate_routers(model: nn.Module, batches: Iterable[Batch]) -> RouterTrace:
    """The trace of the hard-stage model in eval mode over all batches: the density that counts."""
    with eval_mode(model), in_stage(model, Stage.HARD), trace_routers(model) as trace:
        for batch in _at_least_one(batches):
            model(**for_layers(model, batch))
    return trace


def calibrate(model: nn.Module, batches: Iterable[Batch], *, densities: Sequence[float] = ()) -> nn.Module:
    """Measure the routers' score distributions in the hard stage, so that `set_density` can serve any budget.

    Use held-out batches of the kind the model will see. The result is saved with the model. Returns the model.

    Args:
        densities: measure at these budgets, a few passes over the batches for each, instead of at the thresholds of
            now alone: the further a threshold moves, the more the scores of later layers change.
    """
    if not densities:
        _calibrate(model, batches)
        return model
    batches, found = list(batches), require_routers(model)
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
    for batch in _at_least_one(batches):
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

    Ends when the density on these batches is within DENSITY_TOLERANCE of the wish, or after so many rounds. Warns where
    it then still is DENSITY_MISSED or more away.
    """
    calibrate(model, batches)
    measured = density
    seen: dict[bool, tuple[float, float]] = {}  # by whether it was too dense, the last threshold and density
    for _ in range(rounds):
        threshold = set_density(model, density)
        if len(seen) == 2:  # between two that were measured is safer than what scores at one of them say
            (left, high), (right, low) = seen[True], seen[False]
            threshold = left + (high - density) / (high - low) * (right - left)
            for router in require_routers(model):
                router.threshold = threshold
        measured = _calibrate(model, batches)
        if abs(measured - density) <= DENSITY_TOLERANCE * density:
            break
        seen[measured > density] = threshold, measured
    if abs(measured - density) >= DENSITY_MISSED:
        warnings.warn(
            f"asked for a density of {density:g}, thresholds reach {measured:.3f}: too many scores are alike, as they "
            "are where routers were trained until most are 0 or 1; a lower router learning rate keeps them apart",
            stacklevel=2,
        )
    return threshold


@torch.no_grad()
def logit_shift(model: nn.Module, batches: Iterable[Batch], density: float) -> tuple[float, float]:
    """What all routers' logits have to be lowered by for `density` of the neurons to be active; and the density now.

    One number for all: layers keep the shares they learned. For routers that share one threshold, as in training.
    """
    calibrate(model, batches)
    budget = _Budget(require_routers(model), 0.0, 1.0)
    threshold = budget.routers[0].threshold
    return logit_of(budget.threshold_for(density)) - logit_of(threshold), budget.density_at(threshold)


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
