"""Selectors in models: what they keep is what is computed, wherever the FFN is written."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from lte_compile.baselines.kla import TopNeurons
from lte_compile.baselines.teal import InputThresholds
from lte_compile.calibration.watching import locate_sites
from lte_compile.evaluation.selectors import Selector, installed, selectors
from lte_compile.inspection.sites import inspect
from lte_compile.passes.ir import FfnSite
from tests import zoo

FAMILIES = ("bert", "llama", "phi3", "gpt2", "opt")  # modules, gated, fused gate_up, Conv1D, inlined


Built = tuple[nn.Module, dict[str, Tensor], tuple[FfnSite, ...]]


def _built(name: str) -> Built:
    model, inputs, sites = _found(name)
    return deepcopy(model), inputs, sites


@cache
def _found(name: str) -> Built:
    model, inputs = zoo.build(name, torch.float64)
    return model, inputs, locate_sites(model, inspect(model, inputs).ffn_sites, inputs)


def _logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits
    return logits


@pytest.mark.parametrize("name", FAMILIES)
def test_keeping_everything_changes_nothing_and_leaves_nothing_behind(name: str) -> None:
    model, inputs, sites = _built(name)
    expected, hooks = _logits(model, inputs), _hooks(model)
    with installed(model, [Selector(site) for site in sites]):
        assert len(list(selectors(model))) == zoo.LAYERS
        assert torch.equal(_logits(model, inputs), expected)
    assert (_hooks(model), list(selectors(model))) == (hooks, [])
    assert torch.equal(_logits(model, inputs), expected)


def _hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


class OnlyEven(Selector):
    """Neurons 0, 2, 4 ... of every token."""

    def gates(self, x_TD: Tensor, hidden_TF: Tensor) -> Tensor:
        return torch.ones_like(hidden_TF) * (torch.arange(hidden_TF.shape[-1]) % 2 == 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_neuron_that_is_not_kept_does_not_reach_the_output(name: str) -> None:
    model, inputs, sites = _built(name)
    with installed(model, [OnlyEven(site) for site in sites]):
        kept = _logits(model, inputs)
    with torch.no_grad():
        for site in sites:
            weight = model.get_parameter(site.down)
            neurons_first = weight if weight.shape[0] == site.hidden else weight.t()
            neurons_first[1::2] = 0.0
    # float64: the same sums with zeros in them
    torch.testing.assert_close(_logits(model, inputs), kept, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", FAMILIES)
def test_dropped_inputs_reach_neither_gate_nor_up(name: str) -> None:
    model, inputs, sites = _built(name)
    chosen = [InputThresholds(site) for site in sites]
    for selector in chosen:
        selector.thresholds = [float("inf"), -1.0]  # no input, every neuron
    with installed(model, chosen):
        dropped = _logits(model, inputs)
    with torch.no_grad():
        for site in sites:
            model.get_parameter(site.up).zero_()
            model.get_parameter(site.gate or site.up).zero_()
    torch.testing.assert_close(_logits(model, inputs), dropped, rtol=1e-12, atol=1e-14)


class RawWeights(nn.Module):
    """Multiplies by its parameters itself."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Parameter(torch.randn(24, 8, dtype=torch.float64)) for _ in range(2))
        self.down = nn.Parameter(torch.randn(8, 24, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + (nn.functional.silu(x @ self.gate.T) * (x @ self.up.T)) @ self.down.T
        return result


class PointwiseConvolutions(nn.Module):
    """Width is axis 1."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Conv1d(8, 24, 1, dtype=torch.float64)
        self.down = nn.Conv1d(24, 8, 1, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(torch.relu(self.up(x.movedim(-1, 1)))).movedim(1, -1)
        return result


@pytest.mark.parametrize("model", [RawWeights(), PointwiseConvolutions()], ids=lambda model: type(model).__name__)
@pytest.mark.parametrize("part", ["neurons", "inputs"])
def test_ffns_without_linear_modules(model: nn.Module, part: str) -> None:
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    [site] = locate_sites(model, inspect(model, {"x": x}).ffn_sites, {"x": x})
    selector = InputThresholds(site)
    selector.thresholds = [-1.0, float("inf")] if part == "neurons" else [float("inf"), -1.0]
    with torch.no_grad(), installed(model, [selector]):
        selected = model(x)
    silent = {site.down} if part == "neurons" else {site.up, site.gate}
    zeroed = {name: torch.zeros_like(p) for name, p in model.named_parameters() if name in silent}
    with torch.no_grad():
        expected = torch.func.functional_call(model, zeroed, (x,))
    torch.testing.assert_close(selected, expected, rtol=1e-12, atol=1e-14)


def test_selections_cannot_be_nested() -> None:
    model, _, sites = _built("llama")
    chosen = [TopNeurons(site, 0.5) for site in sites]
    with installed(model, chosen), pytest.raises(ValueError, match="has selectors already"), installed(model, chosen):
        pass
    assert not list(selectors(model))
