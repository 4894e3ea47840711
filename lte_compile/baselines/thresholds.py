"""Selectors that compare magnitudes with a threshold, and the quantiles that place it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lte_compile.baselines.registry import AtDensity
from lte_compile.baselines.workbench import Workbench
from lte_compile.calibration.watching import SeeFfn, watch_ffns
from lte_compile.evaluation.selectors import Selector, installed
from lte_compile.passes.ir import FfnSite
from lte_compile.running.inputs import Batch

# Thresholds below shift what later FFNs see; a second look, with them in place, makes up for most of it.
ROUNDS = 2
# Values kept of one call: with 16 batches a quantile rests on a million.
SAMPLED_VALUES = 65_536
KEEP_ALL = -1.0  # magnitudes are above it


class ThresholdSelector(Selector):
    """Keeps what exceeds a threshold in magnitude; `thresholds` has one for each of `magnitudes`."""

    def __init__(self, site: FfnSite, count: int) -> None:
        super().__init__(site)
        self.thresholds = [KEEP_ALL] * count

    def magnitudes(self, x_TD: Tensor, hidden_TF: Tensor) -> Sequence[Tensor]:
        """What the thresholds are compared with."""
        raise ValueError(f"{type(self).__name__} does not say what its thresholds are compared with")


def by_thresholds(bench: Workbench, chosen: Sequence[ThresholdSelector]) -> AtDensity:
    """The dense model with the selectors in place, their thresholds placed on the calibration batches."""

    @contextmanager
    def at(density: float) -> Iterator[nn.Module]:
        fit_thresholds(bench.dense, chosen, bench.calibration, density)
        with installed(bench.dense, chosen) as model:
            yield model

    return at


def fit_thresholds(
    model: nn.Module, chosen: Sequence[ThresholdSelector], batches: Sequence[Batch], density: float
) -> None:
    """Place every threshold at the quantile that leaves `density` of the magnitudes above it, per FFN."""
    for selector in chosen:
        selector.thresholds = [KEEP_ALL] * len(selector.thresholds)
    for _ in range(ROUNDS):
        samples = {selector: [list[Tensor]() for _ in selector.thresholds] for selector in chosen}
        with installed(model, chosen):
            watch_ffns(model, batches, {s.site: _sampler(s, samples[s]) for s in chosen})
        for selector, parts in samples.items():
            selector.thresholds = [_quantile(torch.cat(values), 1 - density) for values in parts]


def _sampler(selector: ThresholdSelector, parts: list[list[Tensor]]) -> SeeFfn:
    def sample(x_TD: Tensor, hidden_TF: Tensor) -> None:
        for values, magnitude in zip(parts, selector.magnitudes(x_TD, hidden_TF), strict=True):
            values.append(spread_sample(magnitude.float().flatten()))

    return sample


def spread_sample(values_N: Tensor) -> Tensor:
    """SAMPLED_VALUES of the values, drawn evenly; all of them if they are no more.

    At random: every k-th value is of the same few neurons wherever k shares a factor with their number.
    """
    if len(values_N) <= SAMPLED_VALUES:
        return values_N
    generator = torch.Generator(values_N.device).manual_seed(0)
    return values_N[torch.randint(len(values_N), (SAMPLED_VALUES,), generator=generator, device=values_N.device)]


def _quantile(values: Tensor, share: float) -> float:
    """torch.quantile stops at 16 million values."""
    ordered = values.sort().values
    return float(ordered[min(int(share * len(ordered)), len(ordered) - 1)]) if share > 0 else KEEP_ALL
