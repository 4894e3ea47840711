"""The eta controller: it brings a model-like plant to the target and survives a round trip."""

import json

import pytest
import torch
from torch import Tensor

from lte_compile.training.budgets import NUM_NODES, Budgets
from lte_compile.training.controller import MAX_ETA, DensityController, Multiplier
from lte_compile.training.rows import Rows


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


def _rows(gained_B: Tensor, share_BN: Tensor) -> Rows:
    """Rows whose loss falls by `gained_B` where their logits rise by one."""
    rows = Rows(shift_B=torch.zeros(len(share_BN)), share_BN=share_BN, weight_B=torch.ones(len(share_BN)))
    rows.shift_B.grad = gained_B
    return rows


def _alone(value: Tensor) -> Tensor:
    return value


@pytest.mark.parametrize("parts", [1, 3])
def test_a_multiplier_settles_where_no_row_gains_by_higher_logits(parts: int) -> None:
    """A task that gains by higher logits of low densities, against prices that take a tenth of themselves for it."""
    multiplier, budgets = Multiplier(target=0.3), Budgets(0.2, 0.6, target=0.3)
    wanted_N = torch.tensor([0.9, 0.5, 0.3, 0.1, -0.2])
    for step in range(300):
        share_BN = budgets.rows_of(15, seed=0, step=step).share_BN
        rows = _rows(share_BN @ (0.1 * wanted_N - 0.1 * multiplier.price) / len(share_BN), share_BN)
        pieces = [_rows(rows.shift_B.grad[piece], share_BN[piece]) for piece in torch.arange(15).chunk(parts)]  # type: ignore[index]
        multiplier.observe(pieces, _alone)
    torch.testing.assert_close(multiplier.price, wanted_N, rtol=0, atol=0.02)  # of nodes that rows are seldom near
    assert multiplier.eta == 0.0  # until a measurement, which waits for the device anyway
    multiplier.measure(0.31)
    assert multiplier.eta == pytest.approx(float(wanted_N.mean()), abs=0.02)
    assert multiplier.integral > 0.0  # the density has risen: a little more than that from now on
    restored = Multiplier(target=0.3)
    restored.load_state_dict(json.loads(json.dumps(multiplier.state_dict())))
    assert restored.state_dict() == multiplier.state_dict()


def test_a_multiplier_is_bounded_and_ignores_rows_without_gradients() -> None:
    multiplier, share_BN = Multiplier(target=0.3), torch.eye(NUM_NODES)
    rows = _rows(torch.full((NUM_NODES,), 1e6), share_BN)
    rows.shift_B.grad = None  # frozen routers
    multiplier.observe([rows], _alone)
    assert not multiplier.price.any()
    multiplier.observe([_rows(torch.full((NUM_NODES,), 1e6), share_BN)], _alone)
    assert multiplier.price.tolist() == [MAX_ETA] * NUM_NODES


def test_a_multiplier_adds_up_what_all_processes_saw() -> None:
    multiplier, twice = Multiplier(target=0.3), Multiplier(target=0.3)
    share_BN = torch.eye(NUM_NODES)
    multiplier.observe([_rows(torch.full((NUM_NODES,), 2e-3), share_BN)], _alone)
    twice.observe([_rows(torch.full((NUM_NODES,), 1e-3), share_BN)], lambda value: 2 * value)
    torch.testing.assert_close(multiplier.price, twice.price)
