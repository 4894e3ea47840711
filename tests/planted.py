"""A task and a model with known sparse structure: tokens of K kinds, each of which needs its own group of neurons.

A token is its kind's direction plus noise. The planted FFN has one group of ReLU neurons per kind; a group is silent on
tokens of other kinds and computes features of the noise on its own. Labels are what the planted model says, so it has
accuracy 1; a model without the FFN, linear in the tokens' mean, cannot have it. Neurons are shuffled. A density of 1/K,
experts of a group's size and the right router lose nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lte_compile.baselines import Workbench
from lte_compile.config import TransformConfig
from lte_compile.training.config import TrainConfig

KINDS, GROUP, WIDTH, CLASSES, LENGTH = 4, 8, 20, 3, 5
HIDDEN = KINDS * GROUP
SHUFFLED = torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(5))


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


class Planted(nn.Module):
    """x + down(relu(up(x))), averaged over tokens that count, then a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        self._plant()

    def forward(self, inputs: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Output:
        x = inputs + self.down(torch.relu(self.up(inputs)))
        pooled = (x * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        logits = self.head(pooled)
        return Output(None if labels is None else nn.functional.cross_entropy(logits, labels), logits)

    @torch.no_grad()
    def _plant(self) -> None:
        """The first KINDS coordinates say the kind. A group idles at 5 - 4 on its own kind, else at -4."""
        draw = torch.Generator().manual_seed(0)
        self.up.weight[:, :KINDS] = 5.0 * torch.eye(KINDS).repeat_interleave(GROUP, 0)
        self.up.weight[:, KINDS:] = 0.4 * torch.randn(HIDDEN, WIDTH - KINDS, generator=draw)
        self.up.bias.fill_(-4.0)
        self.down.weight.copy_(torch.randn(WIDTH, HIDDEN, generator=draw))
        self.down.bias.zero_()
        self.head.weight.copy_(torch.randn(CLASSES, WIDTH, generator=draw))
        self.head.bias.zero_()
        for tensor in (self.up.weight, self.up.bias):
            tensor.copy_(tensor[SHUFFLED].clone())
        self.down.weight.copy_(self.down.weight[:, SHUFFLED].clone())


class PlantedBatches:
    """Endless batches; the i-th of a seed is always the same."""

    def __init__(self, seed: int, size: int = 32) -> None:
        self.seed, self.size, self.index = seed, size, 0
        self.teacher = Planted()

    def next_batch(self) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(1_000_003 * self.seed + self.index)
        self.index += 1
        kinds = torch.randint(KINDS, (self.size, LENGTH), generator=draw)
        noise = torch.randn(self.size, LENGTH, WIDTH - KINDS, generator=draw)
        inputs = torch.cat([nn.functional.one_hot(kinds, KINDS).float(), noise], dim=-1)
        lengths = torch.randint(1, LENGTH + 1, (self.size, 1), generator=draw)
        mask = (torch.arange(LENGTH) < lengths).long()
        with torch.no_grad():
            labels = self.teacher(inputs, mask).logits.argmax(-1)
        return {"inputs": inputs, "attention_mask": mask, "labels": labels}

    def state_dict(self) -> Mapping[str, Any]:
        return {"index": self.index}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.index = state["index"]


def batches(seed: int, count: int, size: int = 128) -> list[dict[str, Tensor]]:
    source = PlantedBatches(seed, size)
    return [source.next_batch() for _ in range(count)]


def kinds_of(batch: Mapping[str, Tensor]) -> Tensor:
    """The kind of every token that counts."""
    return batch["inputs"][..., :KINDS].argmax(-1)[batch["attention_mask"].bool()]


def example() -> dict[str, Tensor]:
    [batch] = batches(9, 1, size=4)
    return {name: value for name, value in batch.items() if name != "labels"}


def workbench(
    *, stage1: int = 30, stage2: int = 10, directory: Path | None = None, checkpoint_every: int = 0
) -> Workbench:
    """All that methods need, of a size that trains in a second."""
    return Workbench(
        start=Planted(),
        new_batches=lambda: PlantedBatches(0),
        steering=batches(1, 2),
        calibration=batches(2, 4),
        config=TrainConfig(
            target_density=1 / KINDS,
            stage1_steps=stage1,
            stage2_steps=stage2,
            learning_rate=1e-3,
            router_learning_rate=1e-3,
            checkpoint_every=checkpoint_every,
        ),
        transform=TransformConfig(expert_size=GROUP),
        example=example(),
        directory=directory,
    )
