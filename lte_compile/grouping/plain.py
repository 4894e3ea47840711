"""Groupings that look at nothing: the order neurons already have, and a random one (the ablation's floor)."""

from __future__ import annotations

import torch
from torch import Tensor

from lte_compile.config import Grouping
from lte_compile.grouping.registry import GroupingRequest, grouping_method


@grouping_method(Grouping.CONTIGUOUS)
def contiguous(request: GroupingRequest) -> Tensor:
    """Neurons stay where they are."""
    return torch.arange(request.weights_FD.shape[0], device=request.weights_FD.device)


@grouping_method(Grouping.RANDOM)
def random(request: GroupingRequest) -> Tensor:
    """A seeded random order, the same on every device."""
    generator = torch.Generator().manual_seed(request.seed)
    return torch.randperm(request.weights_FD.shape[0], generator=generator).to(request.weights_FD.device)
