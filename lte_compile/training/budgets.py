"""Training one model for many budgets: every row of a batch runs at a density of its own, drawn from a range.

A row's density is set by lowering the logits of all routers by one number. Which number gives which density is measured
on held-out batches for a few densities of the range, and interpolated in between. What scores are like where nothing is
lowered says it for all densities at once; layers whose inputs change with the number make it a little wrong, and by how
much is measured for one density at a time.

Shapes: B rows of a batch, N densities that are measured.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from operator import add, mul

import torch
from torch import Tensor, nn

from lte_compile.routing.router import routers
from lte_compile.training.config import BudgetDraw, TrainConfig
from lte_compile.training.rows import Rows

# Densities of the range whose shifts are measured: at the ends and evenly between them.
NUM_NODES = 5


@dataclass
class Budgets:
    """Draws densities in [low, high], and knows the shift of the logits for each.

    Args:
        weight: a row's loss counts as its density to this power.
        seen: the shifts of `nodes` by the scores of unshifted logits.
        corrections: how much more it takes once a shift is in force.
    """

    low: float
    high: float
    target: float
    draw: BudgetDraw = BudgetDraw.UNIFORM
    weight: float = 0.0
    seen: list[float] = field(default_factory=lambda: [0.0] * NUM_NODES)
    corrections: list[float] = field(default_factory=lambda: [0.0] * NUM_NODES)

    @property
    def shifts(self) -> tuple[float, ...]:
        """What logits are lowered by for the densities of `nodes`."""
        return tuple(map(add, self.seen, self.corrections))

    @property
    def nodes(self) -> tuple[float, ...]:
        """The densities whose shifts are measured."""
        return tuple(self.low + (self.high - self.low) * k / (NUM_NODES - 1) for k in range(NUM_NODES))

    def densities(self, rows: int, *, seed: int, step: object, lowest: float | None = None) -> tuple[float, ...]:
        """One density a row, spread evenly over the distribution; the same for the same seed and name of the step.

        Args:
            lowest: where the range begins for now, if not at `low`.
        """
        generator = random.Random(f"budgets/{seed}/{step}")
        levels = [(row + generator.random()) / rows for row in range(rows)]
        generator.shuffle(levels)
        drawn = self if lowest is None else replace(self, low=min(max(lowest, self.low), self.high))
        return tuple(drawn._at_level(level) for level in levels)

    def rows_of(self, rows: int, *, seed: int, step: object, lowest: float | None = None) -> Rows:
        """What each row runs at, in float32."""
        drawn = self.densities(rows, seed=seed, step=step, lowest=lowest)
        weight_B = torch.tensor(drawn).pow(self.weight)
        return Rows(
            shift_B=torch.tensor([self.shift_for(density) for density in drawn]),
            share_BN=torch.tensor([self._shares_of(density) for density in drawn]),
            weight_B=weight_B / weight_B.mean(),
        )

    def shift_for(self, density: float) -> float:
        """Linear between the nodes."""
        return sum(map(mul, self._shares_of(density), self.shifts), start=0.0)

    def _shares_of(self, density: float) -> list[float]:
        """Of the nodes in a density: those on its two sides, by how near they are."""
        nodes, shares = self.nodes, [0.0] * NUM_NODES
        right = min(max(bisect_left(nodes, density), 1), NUM_NODES - 1)
        shares[right] = (density - nodes[right - 1]) / (nodes[right] - nodes[right - 1])
        shares[right - 1] = 1 - shares[right]
        return shares

    def _at_level(self, level: float) -> float:
        """The density below which this share of the draws lies."""
        if self.draw is BudgetDraw.LOG_UNIFORM:
            return float(self.low * (self.high / self.low) ** level)
        if self.draw is BudgetDraw.HALF_AT_TARGET:
            level = 2 * level
            return (
                self.low + (self.high - self.low) * level if level < 1 else min(max(self.target, self.low), self.high)
            )
        if self.draw is BudgetDraw.ENDS:
            level = min(max(2 * level - 0.5, 0.0), 1.0)
        return self.low + (self.high - self.low) * level


def budgets_of(config: TrainConfig) -> Budgets | None:
    """The range of densities to train at, if there is one."""
    if config.budget_range is None:
        return None
    low, high = config.budget_range
    draw, weight = config.budget_draw, config.budget_weight
    return Budgets(low, high, target=config.target_density, draw=draw, weight=weight)


def lower_logits(model: nn.Module, shift_B: Tensor | None) -> None:
    """Have all routers lower the logits of row b by shift_B[b] (one number: of all rows) from now on; None ends it."""
    for router in routers(model):
        router.shift_B = shift_B


@contextmanager
def lowering_ends(model: nn.Module) -> Iterator[None]:
    """With the block, however it ends."""
    try:
        yield
    finally:
        lower_logits(model, None)
