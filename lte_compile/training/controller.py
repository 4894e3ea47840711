"""Steering eta, the weight of the efficiency loss, so that the density users ask for is the density they get."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# Gains of the PI controller on the relative density error, per measurement. Full error gives an eta inside the range
# the paper sweeps (0.05 to 2) at once; the small integral removes what is left without ringing (tests/test_controller).
PROPORTIONAL_GAIN = 1.5
INTEGRAL_GAIN = 0.05
# Beyond this the efficiency loss drowns any task loss; it also bounds the wind-up of the integral.
MAX_ETA = 4.0
# Weight of the newest measurement in the smoothed density: a memory of about three measurements.
SMOOTHING = 0.4


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
        error = max(-1.0, min(1.0, (self.smoothed - self.target) / self.target))
        self.integral = _clamp(self.integral + INTEGRAL_GAIN * error)
        self.eta = _clamp(PROPORTIONAL_GAIN * error + self.integral)
        return self.eta

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def _clamp(eta: float) -> float:
    return max(-MAX_ETA, min(MAX_ETA, eta))
