"""Fitting routers to data and the density knob: what was asked for is what is measured."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lte_compile.calibration.density import calibrate, evaluate_routers, set_density
from lte_compile.calibration.fitting import fit_routers
from lte_compile.calibration.watching import collect_activations
from lte_compile.config import Grouping, Stage, TransformConfig
from lte_compile.inspection.graphs import graph
from lte_compile.inspection.sites import inspect
from lte_compile.routing.router import routers, set_stage
from lte_compile.running.tracing import site_names, trace_routers
from lte_compile.transform import transform
from tests import zoo
from tests.routed import routed, routed_stack, stack, tokens

# Between them the batches hold about 300 real tokens: 1,800 scores per layer, so that a density of half has a
# sampling error near 0.01.
CLOSE = 0.02


def batches(name: str = "bert", count: int = 8) -> list[dict[str, Any]]:
    _, inputs = zoo.build(name)
    generator = torch.Generator().manual_seed(0)

    def batch() -> dict[str, Tensor]:
        ids = torch.randint(3, zoo.VOCAB, (4, zoo.TOKENS), generator=generator)
        mask = torch.ones_like(ids)
        mask[::2, -3:] = 0
        extra = {"decoder_input_ids": ids[:, :7]} if "decoder_input_ids" in inputs else {}
        return {"input_ids": ids, "attention_mask": mask, **extra}

    return [batch() for _ in range(count)]


def test_one_round_fits_routers_to_the_dense_model() -> None:
    model, _ = routed("llama")
    data = batches("llama")
    fit_routers(model, data, 0.5, rounds=1)
    with torch.no_grad(), trace_routers(model) as trace:
        for batch in data:
            model(**batch)
    for site, router in zip(trace.sites, routers(model), strict=True):
        assert (trace.scores(site) > router.threshold).double().mean().item() == pytest.approx(0.5, abs=CLOSE)
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        fit_routers(model, data, 0.5, rounds=0)


@pytest.mark.parametrize("name", ["bert", "llama", "opt"])
@pytest.mark.parametrize("density", [0.25, 0.7])
def test_fitted_routers_select_the_share_asked_for(name: str, density: float) -> None:
    model, _ = routed(name)
    data = batches(name)
    before = {key: value.clone() for key, value in model.state_dict().items() if "router" not in key}
    # One round per layer and one more: a layer's inputs settle once those below it have.
    assert fit_routers(model, data, density, rounds=3) is model
    trace = evaluate_routers(model, data)
    for site, router in zip(trace.sites, routers(model), strict=True):
        selected = (trace.scores(site) > router.threshold).double().mean().item()
        assert selected == pytest.approx(density, abs=CLOSE)
        assert router.stage is Stage.DENSE
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_fitted_routers_know_which_experts_matter() -> None:
    """Running the half that the routers choose must lose less of the output than running the other half."""
    model, x = stack(1), tokens(512)
    expected = model(x)
    transform(model, TransformConfig(expert_size=4), x)
    fit_routers(model, [{"input": x}], 0.5)
    made = next(routers(model))
    made.stage, made.rule = Stage.HARD, "threshold"
    chosen = (model(x) - expected).square().sum()
    assert made.bias is not None
    made.load_initial(-made.weight, -made.bias)
    others = (model(x) - expected).square().sum()
    assert chosen < 0.5 * others


@pytest.mark.parametrize("density", [0.3, 0.5, 0.8])
def test_set_density_moves_the_measured_density_there(density: float) -> None:
    model, _ = routed("llama")
    data = batches("llama")
    assert calibrate(model, data) is model
    threshold = set_density(model, density)
    assert evaluate_routers(model, data).density() == pytest.approx(density, abs=CLOSE)
    assert {router.threshold for router in routers(model)} == {threshold}


@pytest.mark.parametrize("floor, ceiling", [(0.2, 1.0), (0.0, 0.45), (0.4, 0.4), (0.3, 0.5)])
def test_sites_stay_within_their_bounds_under_one_budget(floor: float, ceiling: float) -> None:
    model, data = _uneven(), batches("llama")
    set_density(calibrate(model, data), 0.4)
    free = evaluate_routers(model, data).densities().values()
    assert min(free) < 0.2
    assert max(free) > 0.5
    calibrate(model, data)
    set_density(model, 0.4, floor=floor, ceiling=ceiling)
    trace = evaluate_routers(model, data)
    assert trace.density() == pytest.approx(0.4, abs=CLOSE)
    assert all(floor - CLOSE <= density <= ceiling + CLOSE for density in trace.densities().values())


def _uneven() -> nn.Module:
    """One layer's routers want nearly everything, the other's nearly nothing."""
    model, _ = routed("llama")
    with torch.no_grad():
        for router, shift in zip(routers(model), (8.0, -8.0), strict=True):
            assert router.bias is not None
            router.bias.add_(shift)
    return model


def test_full_density_is_the_dense_model() -> None:
    model, inputs = routed("llama")
    set_density(calibrate(model, batches("llama")), 1.0)
    trace = evaluate_routers(model, [inputs])
    assert trace.density() == 1.0


def test_calibration_is_monotonic() -> None:
    model, _ = routed("llama")
    calibrate(model, batches("llama"))
    thresholds = [set_density(model, density) for density in (0.1, 0.3, 0.5, 0.7, 0.9)]
    assert thresholds == sorted(thresholds, reverse=True)


def test_measuring_leaves_model_and_modes_alone() -> None:
    model, inputs = routed("bert")
    model.train()
    before = deepcopy(model.state_dict())
    calibrate(model, [inputs])
    assert model.training
    assert all(router.stage is Stage.DENSE and router.weight.requires_grad for router in routers(model))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_activations_are_the_hidden_values_of_real_tokens(name: str) -> None:
    model, _ = zoo.build(name)
    data = batches(name, 2)
    sites = inspect(model).sites
    activations = collect_activations(model, sites, data)
    real = int(sum(batch["attention_mask"].sum() for batch in data))
    assert set(activations) == {site.name for site in sites}
    for site in sites:
        count = real if "decoder" not in site.name else 2 * 4 * 7
        assert activations[site.name].shape == (count, zoo.HIDDEN)


def test_activations_are_those_of_the_ffn() -> None:
    model: Any = stack(1)
    x = tokens(2, 3)
    activations = collect_activations(model, inspect(model, x).sites, [{"input": x}, {"input": -x}], max_tokens=8)
    hidden = torch.relu(model[0].up(torch.cat([x.flatten(0, 1), -x.flatten(0, 1)])))[:8]
    torch.testing.assert_close(activations["0"], hidden.detach(), rtol=1e-12, atol=1e-12)


def test_traced_activations_group_neurons_that_fire_together() -> None:
    """Neurons 0, 2, 4 ... copy one direction and 1, 3, 5 ... its opposite: two groups that never fire at once."""
    model: Any = stack(1, hidden=40)
    x = tokens(256)
    with torch.no_grad():
        model[0].up.weight.copy_(torch.tensor([1.0, -1.0] * 20)[:, None] * tokens(1))
        model[0].up.bias.zero_()
    activations = collect_activations(model, inspect(model, x).sites, [{"input": x}])
    config = TransformConfig(expert_size=20, grouping=Grouping.COACTIVATION)
    transform(model, config, x, activations=activations)
    signs = (model[0].up.weight @ tokens(1).T).sign().reshape(2, 20)
    assert set(signs.sum(1).tolist()) == {20.0, -20.0}


def test_errors() -> None:
    data = [{"input": tokens(5)}]
    with pytest.raises(ValueError, match="has no routers"):
        fit_routers(stack(), data, 0.5)
    with pytest.raises(ValueError, match="router_bias=True"):
        fit_routers(routed_stack(router_bias=False), data, 0.5)
    with pytest.raises(ValueError, match="density must lie strictly between 0 and 1"):
        fit_routers(routed_stack(), data, 1.5)
    with pytest.raises(ValueError, match="no batches were given"):
        fit_routers(routed_stack(), [], 0.5)
    with pytest.raises(ValueError, match=r"NaN|finite"):
        fit_routers(routed_stack(), [{"input": tokens(5) * float("nan")}], 0.5)
    with pytest.raises(ValueError, match="no batches were given"):
        calibrate(routed_stack(), [])
    with pytest.raises(ValueError, match="no batches were given"):
        collect_activations(stack(), inspect(stack(), tokens(3)).sites, [])
    with pytest.raises(ValueError, match=r"not calibrated|no calibrated scores; call lte_compile\.calibrate"):
        set_density(routed_stack(), 0.5)
    for density in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"density must lie in \(0, 1\]"):
            set_density(calibrate(routed_stack(), data), density)
    for floor, ceiling in ((0.6, 1.0), (0.0, 0.4), (-0.1, 1.0), (0.0, 1.1)):
        with pytest.raises(ValueError, match="floor <= density <= ceiling must hold"):
            set_density(calibrate(routed_stack(), data), 0.5, floor=floor, ceiling=ceiling)


def test_calibrated_routers_say_what_density_to_expect() -> None:
    """Kernels are chosen by it, so it follows the thresholds and is silent where nothing was measured."""
    model, inputs = routed("llama")
    set_stage(model, "hard")
    assert {router.expected_density for router in routers(model)} == {None}
    set_density(calibrate(model, batches("llama")), 0.4)
    measured = evaluate_routers(model, batches("llama")).densities()
    for router, name in site_names(model).items():
        assert router.expected_density == pytest.approx(measured[name], abs=CLOSE)
    assert "density=0." in str(graph(model, inputs))
    set_stage(model, "dense")
    assert {router.expected_density for router in routers(model)} == {None}
