"""Running a model in another mode for a while: eval mode, or another stage; and on whatever device it is."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lte_compile.config import Stage
from lte_compile.routing.router import require_routers, set_stage
from lte_compile.running.inputs import Batch, named_inputs


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
def dropout_of(model: nn.Module, rate: float | None) -> Iterator[None]:
    """Every dropout layer with this rate inside the block; None leaves what they have."""
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout)] if rate is not None else []
    before = [layer.p for layer in layers]
    for layer in layers:
        layer.p = float(rate or 0.0)
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.p = old


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


def on_device(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The batch by name, with its tensors on the model's device."""
    device = next(model.parameters()).device
    inputs = named_inputs(model, batch).items()
    return {name: _moved(value, device) if isinstance(value, Tensor) else value for name, value in inputs}


def _moved(value: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and value.device.type == "cpu":
        return value.pin_memory().to(device, non_blocking=True)  # what runs on the GPU goes on meanwhile
    return value.to(device)


def arguments_of(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The batch for a call: by name, on the model's device, without labels that the model does not take."""
    given, known = on_device(model, batch), inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())
    if not ("labels" in known or takes_any):
        given.pop("labels", None)
    return given


def for_layers(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The batch for a call of which only the layers matter: of transformers' decoders without most of the logits,
    which may take as long as all layers."""
    given = arguments_of(model, batch)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        given.pop("labels", None)
        given["logits_to_keep"] = 1
    return given
