"""Training for a range of densities: what is drawn, what density a row then runs at, and what it is good for."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lte_compile.calibration.density import calibrate, evaluate_routers, place_thresholds, set_density
from lte_compile.calibration.fitting import fit_routers
from lte_compile.config import RouterKind, Stage, TransformConfig
from lte_compile.evaluation.quality import evaluate
from lte_compile.routing.linear_fit import logit_of
from lte_compile.routing.router import lowered, routers, set_stage
from lte_compile.training.budgets import NUM_NODES, Budgets, lower_logits
from lte_compile.training.config import BudgetDraw, TrainConfig
from lte_compile.training.controller import Multiplier
from lte_compile.training.distributed import ALONE
from lte_compile.training.loop import StepEvent, train
from lte_compile.training.losses import LossWeights, micro_batches, weighted_loss
from lte_compile.training.rows import Rows
from lte_compile.training.steering import MOST_SHIFT, HeldOut
from lte_compile.transform import transform
from tests import planted
from tests.routed import Block, routed, stack, tokens
from tests.test_layer_compilation import deep_llama

LOW, HIGH, TARGET = 0.2, 0.6, 0.3


def _budgets(draw: BudgetDraw = BudgetDraw.UNIFORM) -> Budgets:
    return Budgets(LOW, HIGH, target=TARGET, draw=draw)


@pytest.mark.parametrize("draw", list(BudgetDraw))
def test_every_batch_covers_the_range(draw: BudgetDraw) -> None:
    for step in range(20):
        drawn = sorted(_budgets(draw).densities(16, seed=0, step=step))
        assert LOW <= drawn[0] < LOW + 0.05
        assert HIGH - 0.05 < drawn[-1] <= HIGH


def test_draws_follow_from_seed_and_step_alone() -> None:
    first = _budgets().densities(8, seed=1, step=7)
    assert first == _budgets().densities(8, seed=1, step=7)
    assert first != _budgets().densities(8, seed=1, step=8)
    assert first != _budgets().densities(8, seed=2, step=7)
    assert list(first) != sorted(first)  # rows of some place in the batch are not always the sparsest


def test_half_of_the_rows_are_at_the_target_or_at_the_ends() -> None:
    half = _budgets(BudgetDraw.HALF_AT_TARGET).densities(16, seed=0, step=0)
    assert half.count(TARGET) == 8
    ends = _budgets(BudgetDraw.ENDS).densities(16, seed=0, step=0)
    assert (ends.count(LOW), ends.count(HIGH)) == (4, 4)
    log = _budgets(BudgetDraw.LOG_UNIFORM).densities(1000, seed=0, step=0)
    assert sum(density < math.sqrt(LOW * HIGH) for density in log) == 500


@pytest.mark.parametrize("draw", list(BudgetDraw))
def test_the_lowest_density_may_fall(draw: BudgetDraw) -> None:
    config = _config(budget_draw=draw, start_density=HIGH, anneal=0.5)
    lowest = [config.lowest_after(share) for share in (0.0, 0.25, 0.5, 1.0)]
    assert lowest == pytest.approx([HIGH, math.sqrt(LOW * HIGH), LOW, LOW])
    assert config.density_after(0.0) == TARGET  # what rows' numbers are relative to stays
    drawn = sorted(_budgets(draw).densities(16, seed=0, step=0, lowest=0.4))
    assert 0.4 <= drawn[0] < 0.45
    assert HIGH - 0.05 < drawn[-1] <= HIGH
    assert set(_budgets(draw).densities(4, seed=0, step=0, lowest=HIGH)) == {HIGH}


def test_shifts_between_densities_are_interpolated() -> None:
    budgets = _budgets()
    budgets.seen[:], budgets.corrections[:] = [4.0, 3.5, 2.0, 1.0, -0.5], [0.0, -0.5, 0.0, 0.0, 0.5]
    assert [budgets.shift_for(density) for density in budgets.nodes] == pytest.approx([4.0, 3.0, 2.0, 1.0, 0.0])
    assert budgets.shift_for(0.35) == pytest.approx(2.5)


@pytest.mark.parametrize("shape", [(3, 5, 7), (15, 7)])
def test_lowered_scores_are_those_of_lower_logits(shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    shift_B = torch.tensor([-1.0, 0.0, 2.5])
    per_token = shift_B.double().repeat_interleave(shape[0] // 3).view(-1, *[1] * (len(shape) - 1))
    expected = torch.sigmoid(logits - per_token)
    scores = lowered(torch.sigmoid(logits), shift_B)
    torch.testing.assert_close(scores, expected)
    [wanted] = torch.autograd.grad(expected.square().sum(), logits)
    [given] = torch.autograd.grad(scores.square().sum(), logits)
    torch.testing.assert_close(given, wanted)


def test_saturated_scores_stay_finite() -> None:
    scores = torch.tensor([[0.0, 1.0, 0.5]], requires_grad=True)
    shifted = lowered(scores, torch.tensor([30.0]))
    shifted.sum().backward()  # type: ignore[no-untyped-call]
    assert shifted[0, :2].tolist() == [0.0, 1.0]
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()


def test_rows_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="a density for each of 2 rows needs FFN inputs with rows first; got 5 tokens"):
        lowered(torch.rand(5, 3), torch.zeros(2))


def _fitted(layers: int = 3, scale: float = 1.0) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    model, data = stack(layers), [{"input": tokens(256, seed=number)[:, None]} for number in range(4)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    transform(model, TransformConfig(expert_size=4), data[0])
    fit_routers(model, data, TARGET)
    set_stage(model, Stage.SOFT, selection="straight_through")
    return model, data


def _measured(model: nn.Module, data: list[dict[str, Tensor]]) -> tuple[HeldOut, Budgets]:
    held_out, budgets = HeldOut(batches=data, processes=ALONE, autocast=False), _budgets()
    held_out.follow_all(model, budgets)
    return held_out, budgets


@pytest.mark.parametrize("density", [0.2, 0.25, 0.45, 0.6])
def test_a_row_runs_at_the_density_drawn_for_it(density: float) -> None:
    model, data = _fitted()
    _, budgets = _measured(model, data)
    lower_logits(model, torch.tensor([budgets.shift_for(density)]))
    # The same inputs that the shifts were measured on; what is left is the interpolation between NUM_NODES.
    assert evaluate_routers(model, data).density() == pytest.approx(density, abs=0.01)
    lower_logits(model, None)


def test_shifts_follow_routers_that_move() -> None:
    model, data = _fitted()
    held_out, budgets = _measured(model, data)
    before = budgets.shifts
    with torch.no_grad():
        for router in routers(model):
            assert router.bias is not None
            router.bias.add_(0.7)
    held_out.follow(model, budgets, 0)  # all of them, whichever is checked
    moved = [after - was for was, after in zip(before, budgets.shifts, strict=True)]
    assert moved == pytest.approx([0.7] * NUM_NODES, abs=0.02)  # float32 scores


def test_a_held_density_moves_all_shifts_alike() -> None:
    model, data = _fitted()
    held_out, budgets = _measured(model, data)
    before = budgets.shifts
    assert held_out.follow(model, budgets, 0, target=0.4) == pytest.approx(TARGET, abs=0.01)
    assert evaluate_routers(model, data).density() == pytest.approx(0.4, abs=0.01)
    moved = [was - after for was, after in zip(before, budgets.shifts, strict=True)]
    assert min(moved) < 0.0  # logits rose
    assert moved == pytest.approx([moved[0]] * NUM_NODES, abs=0.05)


def test_rows_are_where_they_were_drawn_while_routers_learn_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured just before shifts are measured anew, at the end of what may have gone wrong in between."""
    errors, follow = [], HeldOut.follow

    def check(self: HeldOut, model: nn.Module, budgets: Budgets, number: int, **held: float | None) -> float:
        if held:
            for density in (0.25, 0.4, 0.55):
                lower_logits(model, torch.tensor([budgets.shift_for(density)]))
                errors.append(evaluate_routers(model, self.batches).density() - density)
                lower_logits(model, None)
        return follow(self, model, budgets, number, **held)

    monkeypatch.setattr(HeldOut, "follow", check)
    config = _config(stage1_steps=60, stage2_steps=0, router_learning_rate=1e-2, measure_every=5)
    train(_planted(), planted.PlantedBatches(0), config, held_out=planted.batches(1, 2))
    assert len(errors) == 3 * 12
    assert sum(map(abs, errors)) / len(errors) < 0.03
    assert max(map(abs, errors)) < 0.15


def test_the_price_of_a_held_density_keeps_it_from_drifting_between_measurements() -> None:
    held_out, drifts = planted.batches(1, 2), {}
    rates = {"learning_rate": 1e-3, "router_learning_rate": 3e-2}
    for eta in (None, 0.0):
        config = _config(stage1_steps=80, stage2_steps=0, measure_every=10, eta=eta, **rates)
        events = train(_planted(), planted.PlantedBatches(0), config, held_out=held_out)
        measured = [event for event in events if event.step % config.measure_every == 0]
        drifts[eta] = sum(abs((event.density or 0.0) - TARGET) for event in measured)  # before it is held again
        assert (measured[-1].eta > 0.0) == (eta is None)  # the task wants more experts
    assert drifts[None] < 0.7 * drifts[0.0]  # .18 to .51 of it with four seeds


def test_slices_of_a_batch_keep_their_rows() -> None:
    batch, number_B = {"input_ids": torch.arange(10).view(5, 2)}, torch.arange(5.0)
    rows = Rows(shift_B=number_B, share_BN=number_B[:, None], weight_B=number_B)
    parts = [part for rank in range(2) for part in micro_batches(batch, 2, rank=rank, processes=2, rows=rows)]
    for part in parts:
        assert part.rows is not None
        first = part.inputs["input_ids"][:, 0].tolist()
        for values in (part.rows.shift_B, part.rows.share_BN[:, 0], part.rows.weight_B):
            assert first == [2 * value for value in values.tolist()]
    assert sum(len(part.rows) for part in parts if part.rows is not None) == 5


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_rows_have_shares_of_the_measured_densities_and_count_by_their_own(weight: float) -> None:
    budgets = replace(_budgets(), weight=weight)
    budgets.seen[:] = [4.0, 3.0, 2.0, 1.0, 0.0]
    drawn = torch.tensor(budgets.densities(8, seed=0, step=1))
    rows = budgets.rows_of(8, seed=0, step=1)
    torch.testing.assert_close(rows.share_BN @ torch.tensor(budgets.nodes), drawn)
    torch.testing.assert_close(rows.share_BN @ torch.tensor(budgets.shifts), rows.shift_B)
    torch.testing.assert_close(rows.share_BN.sum(1), torch.ones(8))
    assert (rows.share_BN >= 0).all()
    assert rows.weight_B.mean() == pytest.approx(1.0)
    torch.testing.assert_close(rows.weight_B / rows.weight_B[0], (drawn / drawn[0]) ** weight)


def _classifier() -> tuple[nn.Module, dict[str, Tensor]]:
    return _planted(), planted.batches(1, 1)[0]


def _language_model() -> tuple[nn.Module, dict[str, Tensor]]:
    model, inputs = deep_llama()
    return model, {**inputs, "labels": inputs["input_ids"]}


@pytest.mark.parametrize("made", [_classifier, _language_model])
def test_weights_scale_what_rows_outputs_learn_and_not_the_loss(
    made: Callable[[], tuple[nn.Module, dict[str, Tensor]]],
) -> None:
    model, batch = made()
    set_stage(model, Stage.SOFT)
    teacher = set_stage(copy.deepcopy(model), Stage.DENSE)
    count = len(batch["labels"])
    weight_B = torch.linspace(0.0, 2.0, count)
    gradients, losses = {}, set()
    for weights in (torch.ones(count), weight_B):
        rows = Rows(shift_B=torch.zeros(count), share_BN=torch.eye(count), weight_B=weights).moved_to(model)
        [part] = micro_batches(batch, 1, rows=rows)
        lower_logits(model, part.rows.shift_B if part.rows else None)
        loss = weighted_loss(model, part, LossWeights(distillation=0.5), teacher)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.add(float(loss.detach()))
        pull_B = rows.pulls()
        assert pull_B is not None
        gradients[float(weights[0])] = pull_B
    assert len(losses) == 1
    # Rows do not see each other, so each one's derivative is scaled by its own weight: a product's rounding.
    torch.testing.assert_close(gradients[0.0], gradients[1.0] * weight_B, rtol=1e-5, atol=1e-9)


def test_prices_go_where_the_rows_are() -> None:
    """They start on the host. The meta device refuses tensors of others, as a GPU does."""
    model = _planted().to("meta")
    set_stage(model, Stage.SOFT, selection="straight_through")
    multiplier, batch = Multiplier(target=TARGET), planted.batches(1, 1)[0]
    for _ in range(2):
        [part] = micro_batches(batch, 1, rows=_budgets().rows_of(len(batch["labels"]), seed=0, step=0))
        moved = part.moved_to(model)
        assert moved.rows is not None
        lower_logits(model, moved.rows.shift_B)
        weights = LossWeights(efficiency=multiplier.price)
        weighted_loss(model, moved, weights, None).backward()  # type: ignore[no-untyped-call]
        multiplier.observe([moved.rows], lambda value: value)
        assert multiplier.price.device.type == "meta"


def _config(**changes: object) -> TrainConfig:
    settings = {"target_density": TARGET, "stage1_steps": 9, "stage2_steps": 6, "budget_range": (LOW, HIGH)}
    return TrainConfig(**{**settings, "checkpoint_every": 4, "measure_every": 2, **changes})  # type: ignore[arg-type]


def _planted() -> nn.Module:
    torch.manual_seed(0)
    return transform(planted.Planted(), TransformConfig(expert_size=4), planted.example())


@pytest.mark.parametrize("kill_at", [3, 6, 11])
@pytest.mark.parametrize("hold", [False, True])
def test_resumed_training_is_bit_identical(tmp_path: Path, kill_at: int, hold: bool) -> None:
    held_out, config = planted.batches(1, 2), _config(hold_density=hold)
    whole = _planted()
    expected = train(whole, planted.PlantedBatches(0), config, held_out=held_out, directory=tmp_path / "a")

    def stop(event: StepEvent) -> None:
        if event.step + (9 if event.phase == "stage 2" else 0) == kill_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(_planted(), planted.PlantedBatches(0), config, held_out=held_out, directory=tmp_path / "b", on_step=stop)
    resumed = _planted()
    events = train(resumed, planted.PlantedBatches(0), config, held_out=held_out, directory=tmp_path / "b")
    assert events == expected
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    assert all(router.shift_B is None for router in routers(resumed))


def test_a_step_that_fails_leaves_the_routers_as_they_were() -> None:
    model, held_out = _planted(), planted.batches(1, 2)

    class Broken(planted.PlantedBatches):
        def next_batch(self) -> dict[str, Tensor]:
            batch = super().next_batch()
            return batch if self.index < 12 else {**batch, "labels": batch["labels"] + 99}

    with pytest.raises(IndexError, match="Target"):
        train(model, Broken(0), _config(fit_router=False), held_out=held_out)
    assert all(router.shift_B is None for router in routers(model))


def test_one_model_serves_the_range_better_than_one_of_a_single_budget() -> None:
    """Kinds need a quarter of the neurons each: a model trained at .75 has not learned to choose among them."""
    held_out, test = planted.batches(1, 4), planted.batches(3, 4)
    losses = {}
    for name, budgets in (("single", None), ("range", (0.15, 0.75))):
        config = _config(
            target_density=0.75,
            stage1_steps=150,
            stage2_steps=0,
            budget_range=budgets,
            hold_density=True,
            measure_every=10,
            learning_rate=1e-3,
            router_learning_rate=3e-3,
        )
        model = _planted()
        train(model, planted.PlantedBatches(0), config, held_out=held_out, teacher=copy.deepcopy(model))
        set_stage(model, Stage.HARD)
        place_thresholds(model, held_out, 0.2)
        measured = evaluate(model, test)
        losses[name] = measured.loss
        assert measured.density == pytest.approx(0.2, abs=0.02)
    assert losses["range"] < 0.9 * losses["single"]


@pytest.mark.parametrize("density", [0.15, 0.3, 0.5, 0.8])
def test_thresholds_are_placed_to_half_a_percent(density: float) -> None:
    model, data = _fitted()
    set_stage(model, Stage.HARD)
    place_thresholds(model, data, 0.4)
    place_thresholds(model, data, density)
    assert evaluate_routers(model, data).density() == pytest.approx(density, rel=0.006)


def test_calibration_at_several_densities_says_where_thresholds_belong_between_them() -> None:
    """Layers that change what later ones see by so much that one measurement misses."""
    model, data = _fitted(layers=6, scale=2.0)
    set_stage(model, Stage.HARD)
    misses: dict[bool, list[float]] = {False: [], True: []}
    for several, missed in misses.items():
        threshold = place_thresholds(model, data, TARGET)
        calibrate(model, data, densities=(0.2, 0.3, 0.4, 0.5, 0.6) if several else ())
        assert {router.threshold for router in routers(model)} == {threshold}
        for density in (0.2, 0.25, 0.3, 0.4, 0.5, 0.6):
            set_density(model, density)
            missed.append(abs(evaluate_routers(model, data).density() - density))
    assert max(misses[True]) < 0.01 < 0.05 < max(misses[False])


def test_thresholds_are_found_where_the_next_guess_always_overshoots() -> None:
    model, data = _fitted(layers=6, scale=4.0)
    set_stage(model, Stage.HARD)
    for density in (0.2, 0.5):
        place_thresholds(model, data, density)
        assert evaluate_routers(model, data).density() == pytest.approx(density, abs=0.01)


@pytest.mark.parametrize("threshold", [0.5, 0.2])
@pytest.mark.parametrize("kind", list(RouterKind))
def test_scaled_logits_select_the_same_experts(kind: RouterKind, threshold: float) -> None:
    model, data = stack(2), [{"input": tokens(64, seed=1)[:, None]}]
    transform(model, TransformConfig(expert_size=4, router=kind), data[0])
    fit_routers(model, data, TARGET)
    x_TD = tokens(64, seed=1)
    for router in routers(model):
        router.threshold = threshold
        before_TE = router.scores(x_TD)
        router.scale_logits(0.25)
        after_TE = router.scores(x_TD)
        clear_TE = (before_TE - threshold).abs() > 1e-5
        assert torch.equal((before_TE > threshold)[clear_TE], (after_TE > threshold)[clear_TE])
        assert not clear_TE.all() or 0 < (before_TE > threshold).float().mean() < 1
        torch.testing.assert_close(
            after_TE.logit() - logit_of(threshold),
            0.25 * (before_TE.logit() - logit_of(threshold)),
            rtol=1e-3,
            atol=1e-4,
        )


@pytest.mark.parametrize("spread", [2.0, 50.0])
def test_logits_that_have_spread_are_drawn_together(spread: float) -> None:
    """Scores of 1 cannot be told apart in float32, and beyond e^88 it has no number to lower them by."""
    model, data = _fitted()
    for router in routers(model):
        router.scale_logits(spread)
    _, budgets = _measured(model, data)
    assert max(abs(shift) for shift in budgets.shifts) <= MOST_SHIFT
    for density in (LOW, 0.4, HIGH):
        lower_logits(model, torch.tensor([budgets.shift_for(density)]))
        assert evaluate_routers(model, data).density() == pytest.approx(density, abs=0.01)
    lower_logits(model, None)


def test_a_density_that_thresholds_cannot_reach_is_said() -> None:
    model, data = _fitted()
    with torch.no_grad():
        for router in routers(model):
            assert router.bias is not None
            router.weight.mul_(0.0)
            router.bias.copy_(torch.where(torch.arange(len(router.bias)) % 2 == 0, 40.0, -40.0))  # scores of 1 and 0
    with pytest.warns(UserWarning, match="asked for a density of 0.2, thresholds reach (0.0|0.[456])"):
        place_thresholds(model, data, 0.2)


class Starving(nn.Module):
    """Where the first FFN gives a token less than LEAST of its neurons, the second FFN's router wants all experts."""

    LEAST = 0.26

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(hidden=400), Block(hidden=400)
        with torch.no_grad():
            for parameter in self.first.parameters():
                parameter.zero_()
            self.first.up.bias.fill_(1.0)
            self.first.down.weight[0] = 1 / 400  # every neuron adds its share to the first channel

    def forward(self, x: Tensor) -> Tensor:
        fed = self.first(torch.cat([torch.zeros_like(x[..., :1]), x[..., 1:]], -1))
        lacks = (fed[..., :1] < self.LEAST).to(fed.dtype)
        result: Tensor = self.second(torch.cat([fed[..., :-1], 100 * lacks], -1))
        return result


def _starving() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """At the thresholds of now the first FFN runs at .3 and the second at .17."""
    model, data = Starving(), [{"x": tokens(64, seed=number)[:, None]} for number in range(4)]
    transform(model, TransformConfig(expert_size=4), data[0])
    first, second = routers(model)
    experts = first.num_experts
    with torch.no_grad():
        first.load_initial(torch.zeros_like(first.weight), torch.linspace(3, -7, experts, dtype=torch.float64))
        drawn = torch.randn(second.weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        drawn[..., 0], drawn[..., -1] = 0.0, 1.0
        second.load_initial(drawn, torch.full((experts,), -3.5, dtype=torch.float64))
    return set_stage(model, Stage.HARD), data


def test_a_threshold_behind_which_later_layers_want_everything_is_not_taken() -> None:
    """.185 lies, by the scores of now, where the first FFN runs below LEAST; there the second one runs at 1."""
    model, data = _starving()
    before = evaluate_routers(model, data).density()
    threshold = place_thresholds(model, data, 0.185)
    after = evaluate_routers(model, data)
    active, neurons = after.neuron_counts()["first"]
    assert active / neurons == pytest.approx(Starving.LEAST, abs=0.011)  # as far as it goes, to one expert of 100
    assert after.density() < before - 0.02
    assert {router.threshold for router in routers(model)} == {threshold}
    set_density(model, after.density())  # what is kept was measured where the threshold ended
    assert evaluate_routers(model, data).density() == pytest.approx(after.density(), abs=0.01)


@pytest.mark.filterwarnings("ignore:asked for a density")
@pytest.mark.parametrize("wish", [0.02, 0.1, 0.19, 0.21, 0.25, 0.4, 0.55, 0.7, 0.95])
def test_placing_never_ends_further_off_than_it_began(wish: float) -> None:
    model, data = _starving()
    before = evaluate_routers(model, data).density()
    place_thresholds(model, data, wish)
    after = evaluate_routers(model, data).density()
    assert abs(after - wish) < abs(before - wish)


def test_a_density_that_later_layers_forbid_is_said() -> None:
    model, data = _starving()
    with pytest.warns(UserWarning, match="asked for a density of 0.1, thresholds reach (0.2|0.19).*later layers"):
        place_thresholds(model, data, 0.1)


def test_a_calibrated_model_moves_over_the_range() -> None:
    model, _ = routed("llama")
    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(3, 90, (8, 9), generator=generator)} for _ in range(6)]
    calibrate(set_stage(model, Stage.HARD), data)
    for density in (0.2, 0.3, 0.4, 0.5, 0.6):
        set_density(model, density)
        assert evaluate_routers(model, data).density() == pytest.approx(density, abs=0.02)


@pytest.mark.parametrize(
    "given, says",
    [
        ({"budget_range": (0.6, 0.2)}, "two densities between 0 and 1, the lower first"),
        ({"budget_range": (0.2, 1.0)}, "two densities between 0 and 1, the lower first"),
        ({"budget_weight": -0.5}, "budget_weight must be 0 or more; got -0.5"),
        ({"budget_weight": math.inf}, "budget_weight must be 0 or more; got inf"),
    ],
)
def test_bad_ranges_are_refused(given: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        _config(**given)
