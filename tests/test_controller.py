"""The eta controller: it brings a model-like plant to the target and survives a round trip."""

import json

import pytest
import torch

from lte_compile.routing.router import Router, routers
from lte_compile.training.controller import MAX_ETA, DensityController, Multiplier
from tests.routed import routed_stack


def _plant(target: float, start: float, *, steps: int = 200, push: float = 0.3) -> list[float]:
    """Density follows eta with a lag, and drifts up by itself, as a task loss that likes open experts makes it."""
    controller, density, seen = DensityController(target=target), start, []
    for _ in range(steps):
        eta = controller.measure(density)
        density += 0.1 * (push - eta) * density * (1 - density)
        seen.append(density)
    return seen


@pytest.mark.parametrize("target", [0.1, 0.3, 0.7])
@pytest.mark.parametrize("start", [0.05, 0.5, 0.99])
def test_density_settles_at_the_target(target: float, start: float) -> None:
    # 0.02 is what the product promises on held-out data.
    tail = _plant(target, start, steps=600)[-100:]
    assert max(abs(density - target) for density in tail) < 0.02


def test_eta_is_negative_below_the_target_and_bounded() -> None:
    controller = DensityController(target=0.5)
    etas = [controller.measure(0.0) for _ in range(1000)]
    assert etas[0] < 0
    assert min(etas) == -MAX_ETA
    # The integral did not wind up past the bound, so it turns round as soon as the error does.
    assert controller.integral >= -MAX_ETA


def test_state_survives_json() -> None:
    controller = DensityController(target=0.3)
    controller.measure(0.9)
    restored = DensityController(target=0.3)
    restored.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    assert restored == controller
    assert restored.measure(0.5) == controller.measure(0.5)


@pytest.mark.parametrize("target", [0.0, -0.1, 1.5])
def test_impossible_targets_are_refused(target: float) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        DensityController(target=target)


def test_a_fixed_eta_stays_whatever_is_measured() -> None:
    controller = DensityController(target=0.3, eta=0.7, is_fixed=True)
    assert [controller.measure(density) for density in (0.9, 0.1, 0.3)] == [0.7] * 3
    assert controller.latest == 0.3


def _two_routers() -> list[Router]:
    return list(routers(routed_stack()))


@pytest.mark.parametrize("push", [-0.05, 0.0, 0.02, 0.1])
def test_a_multiplier_settles_where_a_common_shift_gains_nothing(push: float) -> None:
    """A task that gains `push` by raising all logits, against a price that takes a tenth of itself for it."""
    multiplier, found = Multiplier(target=0.3), _two_routers()
    for _ in range(40):
        for router in found:
            assert router.bias is not None
            gained = (push - 0.1 * float(multiplier.price)) / len(found) / router.num_experts
            router.bias.grad = torch.full_like(router.bias, -gained)
        multiplier.observe(found)
    assert float(multiplier.price) == pytest.approx(push / 0.1, abs=1e-4)
    assert multiplier.eta == 0.0  # until a measurement, which waits for the device anyway
    multiplier.measure(0.31)
    assert multiplier.eta == pytest.approx(push / 0.1, abs=1e-4)
    assert multiplier.integral > 0.0  # the density has risen: a little more than that from now on
    restored = Multiplier(target=0.3)
    restored.load_state_dict(json.loads(json.dumps(multiplier.state_dict())))
    assert float(restored.price) == pytest.approx(float(multiplier.price), rel=1e-6)  # routers of float64 here
    assert restored.state_dict() | {"price": 0} == multiplier.state_dict() | {"price": 0}


def test_a_multiplier_is_bounded_and_needs_biases() -> None:
    multiplier, found = Multiplier(target=0.3), _two_routers()
    multiplier.observe(found)  # no gradients: frozen routers
    assert multiplier.price == 0.0
    for router in found:
        assert router.bias is not None
        router.bias.grad = torch.full_like(router.bias, -1e6)
    multiplier.observe(found)
    assert float(multiplier.price) == MAX_ETA
