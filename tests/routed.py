"""Transformed tiny models for tests: tracing one takes seconds, copying one milliseconds, so each is traced once."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lte_compile.config import TransformConfig
from lte_compile.routing.router import routers
from lte_compile.transform import transform
from tests import zoo

EXPERT_SIZE = 24  # does not divide the 128 neurons of the zoo's models: the last of six experts has 8


def routed(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, dict[str, Any]]:
    """A fresh copy of the family's transformed model, in stage "dense", and its inputs."""
    model, inputs = _routed(name)
    cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    return deepcopy(model).to(dtype), cast


@cache
def _routed(name: str) -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = zoo.build(name, torch.float64)
    transform(model, TransformConfig(expert_size=EXPERT_SIZE))
    for number, router in enumerate(routers(model)):  # scores on both sides of the threshold, another in each layer
        generator = torch.Generator().manual_seed(number)
        router.load_initial(torch.randn(router.weight.shape, generator=generator), torch.zeros(router.num_experts))
    return model, inputs


class Block(nn.Module):
    """The smallest model with an FFN: x + down(relu(up(x)))."""

    def __init__(self, width: int = 16, hidden: int = 40, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, dtype=dtype)
        self.down = nn.Linear(hidden, width, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(torch.relu(self.up(x)))
        return result


def stack(blocks: int = 2, width: int = 16, hidden: int = 40, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Blocks of fixed random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(*(Block(width, hidden, dtype) for _ in range(blocks)))


def routed_stack(expert_size: int = 8, router_bias: bool = True) -> nn.Module:
    """A fresh copy of the transformed stack, in stage "dense"."""
    return deepcopy(_routed_stack(expert_size, router_bias))


@cache
def _routed_stack(expert_size: int, router_bias: bool) -> nn.Module:
    return transform(stack(), TransformConfig(expert_size=expert_size, router_bias=router_bias), tokens(3))


def tokens(*shape: int, width: int = 16, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Random inputs [*shape, width]."""
    return torch.randn(*shape, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_same_outputs(found: Tensor, expected: Tensor) -> None:
    """Of one model before and after saving.

    Weights come back neuron-major, and products on some processors (an AMD EPYC, not Xeons) sum another layout in an
    order of its own: last bits differ. Room for 64 of them, of the largest value.
    """
    room = 64 * torch.finfo(expected.dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0.0, atol=room)
