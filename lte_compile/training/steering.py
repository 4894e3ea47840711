"""What a training measures on held-out batches, and how it holds a density there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lte_compile.calibration.density import evaluate_routers, logit_shifts
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
        [shift], density = self._shifts(model, [target])
        _lower_biases(model, shift)
        return density

    @torch.no_grad()
    def follow(self, model: nn.Module, budgets: Budgets, number: int, *, target: float | None = None) -> float:
        """Measure anew by how much logits have to be lowered for the budgets' densities.

        All by the scores as they are, and of one of them, another each time, what that misses.

        Args:
            target: the density to hold, as `hold` does; None holds none.

        Returns:
            the density before.
        """
        (held, *seen), density = self._shifts(model, [target or budgets.target, *budgets.nodes])
        if target is not None and all(router.bias is not None for router in routers(model)):
            _lower_biases(model, held)
            seen = [shift - held for shift in seen]
        budgets.seen[:] = seen
        node = number % NUM_NODES
        device = next(model.parameters()).device
        with lowering_ends(model):
            lower_logits(model, torch.tensor([budgets.shifts[node]], device=device))
            [missed], _ = self._shifts(model, [budgets.nodes[node]])
        budgets.corrections[node] += missed
        self._keep_together(model, budgets)
        return density

    def _keep_together(self, model: nn.Module, budgets: Budgets) -> None:
        """Scale logits and what they are lowered by alike, where they have spread: every row keeps its experts."""
        widest = max(abs(shift) for shift in budgets.shifts)
        if widest <= MOST_SHIFT:
            return
        factor = MOST_SHIFT / widest
        for router in routers(model):
            router.scale_logits(factor)
        budgets.seen[:] = [factor * shift for shift in budgets.seen]
        budgets.corrections[:] = [factor * shift for shift in budgets.corrections]

    def follow_all(self, model: nn.Module, budgets: Budgets) -> None:
        """All of them, before the first step."""
        for _ in range(FIRST_ROUNDS):
            for node in range(NUM_NODES):
                self.follow(model, budgets, node)

    def _shifts(self, model: nn.Module, densities: Sequence[float]) -> tuple[list[float], float]:
        """See `logit_shifts`; the same in all processes."""
        with self._autocast(model):
            shifts, density = logit_shifts(model, self.batches, densities)
        measured = torch.tensor([*shifts, density], dtype=torch.float64)
        *shifts_of_all, now = (self.processes.total(measured) / self.processes.size).tolist()
        return shifts_of_all, now

    def _autocast(self, model: nn.Module) -> torch.autocast:
        return torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=self.autocast)


def _lower_biases(model: nn.Module, shift: float) -> None:
    for router in routers(model):
        if router.bias is not None:
            router.bias.sub_(shift)
        router.score_quantiles = ()  # of before the shift
