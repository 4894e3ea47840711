"""Every method on a task whose sparse structure is known, and what is peculiar to each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from lte_compile.baselines import METHODS, AtDensity, Granularity, Needs, Workbench, find_method, method
from lte_compile.baselines.thresholds import spread_sample
from lte_compile.evaluation.meter import SelectionReport
from lte_compile.evaluation.quality import Evaluation, evaluate
from lte_compile.evaluation.selectors import Selector, installed
from lte_compile.routing.router import routers
from tests.planted import GROUP, HIDDEN, KINDS, WIDTH, Planted, batches, kinds_of, workbench

TARGETS = (0.5, 1 / KINDS)
ORACLES = ("kla", "moefication-oracle")


@dataclass(frozen=True)
class Run:
    measured: Evaluation
    tokens: int

    @property
    def selection(self) -> SelectionReport:
        assert self.measured.selection is not None
        return self.measured.selection


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return workbench()


@pytest.fixture(scope="module")
def runs(bench: Workbench) -> dict[tuple[str, float], Run]:
    """Every method at every density it can be run at, on the same test batches."""
    test, found = batches(3, 4), {}
    for name, chosen in METHODS.items():
        at = chosen.fit(bench)
        for target in TARGETS if chosen.only_density is None else (chosen.only_density,):
            with at(target) as model:
                found[name, target] = Run(evaluate(model, test), bench.tokens_of(model))
    return found


def test_all_train_on_the_same_number_of_tokens(runs: dict[tuple[str, float], Run]) -> None:
    assert {run.tokens for run in runs.values()} == {runs["dense", 1.0].tokens}
    assert runs["dense", 1.0].tokens > 0


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["lte", "kla", "moefication-oracle", "moefication", "deja-vu", "noisy-topk", "random"])
def test_measured_density_is_the_target(runs: dict[tuple[str, float], Run], name: str, target: float) -> None:
    # +-0.03 is what LTE promises for a small training; methods with a fixed number of experts per token are exact.
    assert runs[name, target].measured.density == pytest.approx(target, abs=0.03 if name == "lte" else 1e-9)


def test_thresholds_leave_out_what_is_zero_anyway(runs: dict[tuple[str, float], Run]) -> None:
    """A ReLU model's silent neurons never exceed a threshold, so the density may be below the target, not above."""
    for name in ("teal", "cats"):
        for target in TARGETS:
            assert 0 < runs[name, target].measured.density < target + 0.03  # placed on other batches than measured


def test_at_the_planted_density_lte_keeps_what_dense_has_and_the_control_cannot(
    runs: dict[tuple[str, float], Run],
) -> None:
    dense, free = runs["dense", 1.0].measured.accuracy, runs["ffn-free", 0.0].measured.accuracy
    learned = runs["lte", 1 / KINDS].measured.accuracy
    # 512 test examples: a standard error of about a point. Groups leak a little across kinds, which experts cut off.
    assert dense > 0.97
    assert learned > dense - 0.05
    assert free < dense - 0.3
    assert runs["kla", 1 / KINDS].measured.accuracy > dense - 0.02
    for name in ("random", "noisy-topk", "moefication", "deja-vu", "teal"):
        assert runs[name, 1 / KINDS].measured.accuracy < learned, name


def test_lte_recovers_the_planted_kinds(bench: Workbench) -> None:
    [batch] = batches(4, 1, size=512)
    kinds_T = kinds_of(batch)
    with find_method("lte").fit(bench)(1 / KINDS) as model, torch.no_grad():
        [router] = routers(model)
        gates_TE = router(batch["inputs"][batch["attention_mask"].bool()])
    share_KE = torch.stack([gates_TE[kinds_T == kind].mean(0) for kind in range(KINDS)])
    own_K = share_KE.argmax(1)
    assert sorted(own_K.tolist()) == list(range(KINDS))  # each kind has an expert of its own
    # A token's experts are exactly its kind's. The router is linear, and so is telling kinds apart: few may be missed.
    assert float((gates_TE == torch.eye(KINDS)[own_K[kinds_T]]).all(1).double().mean()) > 0.95


def test_costs_count_what_chooses(runs: dict[tuple[str, float], Run]) -> None:
    weights = 2 * WIDTH * HIDDEN
    linear, mlp = KINDS * WIDTH, KINDS * WIDTH + KINDS * KINDS
    rank = WIDTH // 8
    own = {"lte": linear, "random": linear, "noisy-topk": linear, "moefication": mlp, "kla": 0, "moefication-oracle": 0}
    own["deja-vu"] = rank * WIDTH + HIDDEN * rank
    for name, entries in own.items():
        run = runs[name, 0.5]
        assert run.selection.weight_share == pytest.approx(run.measured.density + entries / weights), name
    cats, teal = runs["cats", 0.5], runs["teal", 0.5]
    assert cats.selection.weight_share == pytest.approx((1 + cats.measured.density) / 2)  # up is read whole
    inputs = teal.selection.input_density
    assert inputs == pytest.approx(0.5, abs=0.03)  # placed on other batches than measured
    assert teal.selection.weight_share == pytest.approx((inputs + teal.measured.density) / 2)


def test_the_methods_say_what_they_are() -> None:
    assert {name for name, m in METHODS.items() if m.is_oracle} == set(ORACLES)
    assert METHODS["teal"].granularity is Granularity.INPUT
    trained = {name for name, m in METHODS.items() if m.needs is Needs.TRAINING}
    assert trained == {"dense", "ffn-free", "lte", "lte-range", "noisy-topk", "random"}


def test_a_frozen_router_stays_as_it_was_drawn(bench: Workbench) -> None:
    weights = []
    for _ in range(2):
        with find_method("random").fit(bench)(0.5) as model:
            weights.append(next(routers(model)).weight.detach().clone())
    assert torch.equal(*weights)
    assert float(weights[0].norm(dim=1).mean()) == pytest.approx(1.0, abs=0.3)  # rows of expected length 1


def test_the_start_is_never_changed(bench: Workbench, runs: dict[tuple[str, float], Run]) -> None:
    for name, tensor in Planted().state_dict().items():
        assert torch.equal(bench.start.state_dict()[name], tensor)


def test_a_dense_model_that_learns_from_the_start_alone_stays_close_to_it(bench: Workbench) -> None:
    taught, [batch, *_] = replace(bench, dense_distillation=1.0, directory=None), batches(3, 4)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    models = (bench.start, bench.dense, taught.dense)
    start, learned, stayed = (model(**inputs).logits.softmax(-1).detach() for model in models)
    # Adam's steps are as long as ever, whatever the gradients: it does not stay where it was.
    assert (stayed - start).abs().mean() < 0.6 * (learned - start).abs().mean()


@pytest.mark.parametrize("name", ["moefication", "deja-vu", "noisy-topk", "random"])
def test_a_method_does_not_depend_on_what_ran_before(bench: Workbench, name: str) -> None:
    [first, second] = [_drawn(bench, name, seed) for seed in (1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _drawn(bench: Workbench, name: str, seed: int) -> list[Tensor]:
    torch.manual_seed(seed)  # of whatever went before
    with find_method(name).fit(bench)(0.5) as model:
        return [p.detach().clone() for router in routers(model) for p in router.parameters()]


def test_a_ranges_point_does_not_depend_on_the_points_before(bench: Workbench) -> None:
    at, found = find_method("lte-range").fit(bench), []
    for density in (0.5, 0.3, 0.5):
        with at(density) as model:
            found.append([router.threshold for router in routers(model)])
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("tokens", [64, 4096])
def test_the_sample_for_thresholds_is_of_all_neurons(tokens: int) -> None:
    """4096 tokens of 1536 neurons: every k-th value would be of 16 neurons."""
    scale_F = torch.linspace(0.1, 2, 1536)
    draw = torch.Generator().manual_seed(0)
    values_TF = torch.randn(tokens, 1536, generator=draw).abs() * scale_F
    for share in (0.1, 0.3, 0.5):
        threshold = spread_sample(values_TF.flatten()).quantile(1 - share)
        # the deviation of a share of 65,536 draws is below .002
        assert (values_TF > threshold).float().mean() == pytest.approx(share, abs=0.01)


def test_noise_is_for_training_only(bench: Workbench) -> None:
    x_TD = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(0))
    with find_method("noisy-topk").fit(bench)(0.5) as model:
        [router] = routers(model)
        model.eval()
        assert torch.equal(router(x_TD), router(x_TD))
        assert torch.allclose(router(x_TD).sum(-1), torch.tensor(2.0))  # two experts kept, mean gate 1
        model.train()
        torch.manual_seed(0)
        assert not torch.equal(router(x_TD), router(x_TD))


def test_unknown_and_doubled_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no method 'moefcation'; known are .*did you mean 'moefication'"):
        find_method("moefcation")
    again = method("kla", title="", granularity=Granularity.NEURON, needs=Needs.NOTHING)
    with pytest.raises(ValueError, match="registered already"):
        again(METHODS["kla"].fit)


class Silent(Selector):
    def gates(self, x_TD: Tensor, hidden_TF: Tensor) -> Tensor:
        return torch.zeros_like(hidden_TF)


def test_a_new_method_costs_one_function() -> None:
    @method("silent", title="Silent", granularity=Granularity.NEURON, needs=Needs.NOTHING)
    def silent(bench: Workbench) -> AtDensity:
        return lambda density: installed(bench.dense, [Silent(site) for site in bench.sites])

    try:
        with METHODS["silent"].fit(workbench(stage1=0, stage2=1))(0.5) as model:
            assert evaluate(model, batches(3, 1)).density == 0.0
    finally:
        del METHODS["silent"]


def test_groups_are_whole_experts() -> None:
    assert HIDDEN == KINDS * GROUP  # what the tests above rest on
