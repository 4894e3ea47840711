"""What a training measures on held-out batches, and how it holds a density there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lte_compile.calibration.density import evaluate_routers, logit_shift
from lte_compile.routing.router import routers
from lte_compile.training.budgets import NUM_NODES, Budgets, lower_logits, lowering_ends
from lte_compile.training.distributed import Processes
from lte_compile.training.losses import Batch

# Measurements of every budget before the first step: moving the shift changes what later layers see.
FIRST_ROUNDS = 3
# The furthest that a budget's logits are lowered or raised. Rows of every density pull at experts near their own
# threshold, so logits spread for as long as a range is trained, and scores of 1 in float32 (logits from 17 on) cannot
# be told apart. On a planted task they start within 4.1 of the threshold, and at 100 times the usual rate reach 9 in
# 600 steps; drawn together to 6 the model ends about as well at every density.
MOST_SHIFT = 6.0


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Held-out batches, and how they are run: in bfloat16 or not, by one process or shared out."""

    batches: Sequence[Batch]
    processes: Processes
    autocast: bool

    def density(self, model: nn.Module) -> float:
        """Share of active neurons over all batches, each measured by one process."""
        counted = torch.zeros(2, dtype=torch.int64)  # active neurons, and all
        for first in range(0, len(self.batches), self.processes.size):
            index = first + self.processes.rank
            is_mine = index < len(self.batches)  # else run with the others all the same: the model's shards are needed
            with self._autocast(model):
                trace = evaluate_routers(model, [self.batches[index if is_mine else 0]])
            if is_mine:
                counted += torch.tensor(list(trace.neuron_counts().values())).sum(0)
        active, neurons = self.processes.total(counted).tolist()
        return active / neurons if neurons else float("nan")

    @torch.no_grad()
    def hold(self, model: nn.Module, target: float) -> float:
        """Bring the density to its target by the routers' biases; returns what it was before.

        Not by thresholds: scores would wander off to where the sigmoid passes no gradient.
        """
        shift, density = self._shift(model, target)
        for router in routers(model):
            if router.bias is not None:
                router.bias.sub_(shift)
            router.score_quantiles = ()  # of before the shift
        return density

    @torch.no_grad()
    def follow(self, model: nn.Module, budgets: Budgets, number: int) -> None:
        """Measure anew by how much logits have to be lowered for one of the budgets' densities, one after another."""
        node = number % NUM_NODES
        device = next(model.parameters()).device
        with lowering_ends(model):
            lower_logits(model, torch.tensor([budgets.shifts[node]], device=device))
            shift, _ = self._shift(model, budgets.nodes[node])
        budgets.shifts[node] += shift
        widest = max(abs(shift) for shift in budgets.shifts)
        if widest > MOST_SHIFT:
            self._draw_together(model, budgets, MOST_SHIFT / widest)

    @torch.no_grad()
    def _draw_together(self, model: nn.Module, budgets: Budgets, factor: float) -> None:
        """Scale logits and what they are lowered by alike: every row keeps its experts."""
        for router in routers(model):
            router.scale_logits(factor)
        budgets.shifts[:] = [factor * shift for shift in budgets.shifts]

    def follow_all(self, model: nn.Module, budgets: Budgets) -> None:
        """All of them, before the first step."""
        for _ in range(FIRST_ROUNDS):
            for node in range(NUM_NODES):
                self.follow(model, budgets, node)

    def _shift(self, model: nn.Module, density: float) -> tuple[float, float]:
        """See `logit_shift`; the same in all processes."""
        with self._autocast(model):
            measured = torch.tensor(logit_shift(model, self.batches, density), dtype=torch.float64)
        shift, now = (self.processes.total(measured) / self.processes.size).tolist()
        return shift, now

    def _autocast(self, model: nn.Module) -> torch.autocast:
        return torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=self.autocast)
