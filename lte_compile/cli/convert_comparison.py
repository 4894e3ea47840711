"""How much a conversion changed what a model computes: its outputs before and after, on a few tokens."""

from __future__ import annotations

import inspect as python_inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lte_compile.capture.dummies import dummy_inputs
from lte_compile.checkpoints.loading import load_model
from lte_compile.running.modes import eval_mode


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far the converted model's outputs are from the dense one's, and the largest of these."""

    difference: float
    scale: float

    @classmethod
    def of(cls, before: list[Tensor], after: list[Tensor]) -> Comparison:
        pairs = zip(before, after, strict=True)
        difference = max(float((b.double() - a.double()).abs().max()) for b, a in pairs)
        return cls(difference=difference, scale=max(float(value.abs().max()) for value in before))


def compare_directories(dense: Path, converted: Path, dtype: torch.dtype | None) -> Comparison:
    """Loads one model after the other."""
    before = run_once(load_model(dense, dtype=dtype))
    return Comparison.of(before, run_once(load_model(converted)))


@torch.no_grad()
def run_once(model: nn.Module) -> list[Tensor]:
    """The tensors a model returns first (logits, or hidden states) for example inputs."""
    inputs: dict[str, Any] = dict(dummy_inputs(model))
    if "use_cache" in python_inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    with eval_mode(model):
        result = model(**inputs)
    return [value for value in tuple(result.to_tuple()) if isinstance(value, Tensor)]
