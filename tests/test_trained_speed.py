"""benchmarks.trained_speed moves densities without new constants in the code; its biases do what `set_density` does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lte_compile as lte
from benchmarks.trained_speed import Knob
from lte_compile.config import RouterKind
from tests.zoo import build


def active(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad(), lte.trace_routers(model) as trace:
        model(**batch)
    thresholds = [router.threshold for router in lte.routers(model)]
    return [trace.scores(site) > tau for site, tau in zip(trace.sites, thresholds, strict=True)]


@pytest.mark.parametrize("density", [None, 0.2, 0.6, 1.0])
def test_biases_select_what_thresholds_select(density: float | None) -> None:
    torch.manual_seed(0)
    model, batch = build("llama", torch.float64)  # else a score on a threshold may fall on either side
    lte.transform(model, lte.TransformConfig(expert_size=4, router=RouterKind.TWO_LAYER))
    for router in lte.routers(model):
        torch.nn.init.normal_(router.weight)
    lte.set_stage(model, "hard")
    lte.calibrate(model, [batch])
    lte.set_density(model, 0.4)
    told = [router.expected_density for router in lte.routers(model)]
    knob = Knob(model)
    if density is not None:
        lte.set_density(model, density)
    expected = active(model, batch)
    for turned in (0.3, density):
        knob.turn(turned)
    assert all(router.threshold == 0.5 for router in lte.routers(model))
    assert [router.expected_density for router in lte.routers(model)] == told
    for after, before in zip(active(model, batch), expected, strict=True):
        assert torch.equal(after, before)
