"""Steering eta, the weight of the efficiency loss, so that the density users ask for is the density they get."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lte_compile.training.budgets import NUM_NODES
from lte_compile.training.config import TrainConfig
from lte_compile.training.rows import Rows

# Gains of the PI controller on the relative density error, per measurement. Full error gives an eta inside the range
# the paper sweeps (0.05 to 2) at once; the small integral removes what is left without ringing (tests/test_controller).
PROPORTIONAL_GAIN = 1.5
INTEGRAL_GAIN = 0.05
# Beyond this the efficiency loss drowns any task loss; it also bounds the wind-up of the integral.
MAX_ETA = 4.0
# Weight of the newest measurement in the smoothed density: a memory of about three measurements.
SMOOTHING = 0.4
# About the derivative of L_eff by a common shift of all logits: 1/6 where scores are spread evenly, else less.
SLOPE = 0.1
# Of a multiplier: the share of the distance that a step closes; gradients of about three batches are smoothed over.
MULTIPLIER_GAIN = 0.3


@dataclass
class DensityController:
    """PI controller from measured density to eta.

    `measure` takes a density seen on held-out data, in eval mode at the hard stage; densities of training batches
    mislead (a controller fed with them ended at density 1.0: docs/training.md). It smooths them and returns the eta to
    use next. A density below the target makes eta negative: experts are then paid to open, which L_eff alone cannot do.
    """

    target: float
    eta: float = 0.0
    integral: float = 0.0
    smoothed: float | None = None
    latest: float | None = None
    is_fixed: bool = False  # eta stays as it is

    def __post_init__(self) -> None:
        if not 0.0 < self.target <= 1.0:
            raise ValueError(f"target density must lie in (0, 1]; got {self.target!r}")

    def measure(self, density: float) -> float:
        """Take in one held-out density; returns the new eta."""
        self.latest = density
        previous = density if self.smoothed is None else self.smoothed
        self.smoothed = SMOOTHING * density + (1 - SMOOTHING) * previous
        if self.is_fixed:
            return self.eta
        self.eta = _clamp(PROPORTIONAL_GAIN * self._add_up(self.smoothed) + self.integral)
        return self.eta

    def _add_up(self, density: float) -> float:
        """The relative error of a density, which the integral takes in."""
        error = max(-1.0, min(1.0, (density - self.target) / self.target))
        self.integral = _clamp(self.integral + INTEGRAL_GAIN * error)
        return error

    @property
    def price(self) -> float | Tensor:
        """The eta of the next step."""
        return self.eta

    def observe(self, parts: Iterable[Rows], total: Callable[[Tensor], Tensor]) -> None:
        """Look at the gradients of a step, whose rows come in `parts`; `total` sums over processes."""

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


class Multiplier(DensityController):
    """A price for every density that rows run at: there the loss gains nothing by a row's logits being higher.

    These are the constraints' Lagrange multipliers. Without any the task raises all logits, which the shift of all
    takes back at the next measurement only. With one price for all rows those of low densities gain by higher logits
    and those of high ones by lower ones; routers see what a row lacks, and learn to undo what it was lowered by
    (docs/training.md). Every step moves the prices against the loss's derivatives by the rows' shifts; what the
    density drifts all the same is added up in `integral`. `eta` is their mean at the last measurement.
    """

    _price_N: Tensor | None = None

    @property
    def price(self) -> Tensor:
        return torch.zeros(NUM_NODES) if self._price_N is None else self._price_N

    def observe(self, parts: Iterable[Rows], total: Callable[[Tensor], Tensor]) -> None:
        pulls = [pull_N for rows in parts if (pull_N := rows.pulls()) is not None]
        if pulls:
            pull_N = total(torch.stack(pulls).sum(0)) * NUM_NODES / SLOPE
            missing_N = self.integral + pull_N
            self._price_N = (self.price.to(pull_N) + MULTIPLIER_GAIN * missing_N).clamp(-MAX_ETA, MAX_ETA)

    def measure(self, density: float) -> float:
        """As of a controller, but the density is held by other means, and is what it has drifted to since."""
        self.latest = density
        self._add_up(density)
        self.eta = float(self.price.mean())
        return self.eta

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "price": self.price.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict({name: value for name, value in state.items() if name != "price"})
        self._price_N = torch.tensor(state["price"])


def _clamp(eta: float) -> float:
    return max(-MAX_ETA, min(MAX_ETA, eta))


def controller_of(config: TrainConfig) -> DensityController:
    """What sets eta: the density, what it takes to hold one, or the configuration once and for all."""
    if config.eta is None and config.budget_range is not None:
        return Multiplier(target=config.target_density)
    return DensityController(target=config.target_density, eta=config.eta or 0.0, is_fixed=config.eta is not None)
