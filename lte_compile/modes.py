"""Running a model in another mode for a while: eval mode, or another stage; and on whatever device it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lte_compile.config import Stage
from lte_compile.routing import require_routers, set_stage


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode inside the block."""
    training = {module: module.training for module in model.modules()}
    for module in training:  # model.eval() does this, but exported modules refuse it
        module.training = False
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def in_stage(model: nn.Module, stage: Stage) -> Iterator[None]:
    """Every routed FFN in `stage` inside the block."""
    before = [(r, r.stage, r.rule, r.weight.requires_grad) for r in require_routers(model)]
    set_stage(model, stage)
    try:
        yield
    finally:
        for router, old_stage, old_rule, trains in before:
            router.stage, router.rule = old_stage, old_rule
            router.requires_grad_(trains)


def on_device(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with its tensors on the model's device."""
    device = next(model.parameters()).device
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
