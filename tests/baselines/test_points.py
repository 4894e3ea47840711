"""Running points: what one method's failure costs, and what is kept."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from weakref import ReferenceType, ref

import pytest
import torch
from torch import nn

from lte_compile.baselines import METHODS, AtDensity, Granularity, Needs, Workbench, method
from lte_compile.baselines.claims import claim
from lte_compile.comparison.run import points_of, run_points
from lte_compile.evaluation.quality import Evaluation, evaluate
from tests.planted import Planted, PlantedBatches, batches, workbench


def _judge(model: nn.Module) -> tuple[float, Evaluation]:
    measured = evaluate(model, batches(3, 1))
    return measured.accuracy, measured


def test_a_method_that_diverges_costs_the_others_nothing(tmp_path: Path) -> None:
    @method("diverging", title="Diverging", granularity=Granularity.NEURON, needs=Needs.TRAINING)
    def diverging(bench: Workbench) -> AtDensity:
        raise FloatingPointError("the loss became nan")

    opened: list[int] = []

    def open_bench(seed: int) -> Workbench:
        opened.append(seed)
        return workbench(stage1=1, stage2=1)

    points = points_of(["diverging", "kla"], [0.5], [0, 1])
    try:
        with pytest.raises(FloatingPointError, match=r"diverging, seed 0: the loss .*; diverging, seed 1"):
            run_points(points, tmp_path, open_bench, _judge)
    finally:
        del METHODS["diverging"]
    assert {path.name for path in tmp_path.glob("*.json")} == {"kla-0.5-seed0.json", "kla-0.5-seed1.json"}
    assert opened == [0, 1]
    again = run_points(points_of(["kla"], [0.5], [0, 1]), tmp_path, open_bench, _judge)
    assert opened == [0, 1]  # finished seeds need no model
    assert [(result.seed, result.density) for result in again] == [(0, 0.5), (1, 0.5)]


@pytest.mark.parametrize("name", ["lte", "random", "deja-vu"])
def test_models_of_finished_points_are_dropped(name: str, tmp_path: Path) -> None:
    """Even if Python does not look for reference cycles meanwhile: other processes may need their memory."""
    judged: list[ReferenceType[nn.Module]] = []

    def judge(model: nn.Module) -> tuple[float, Evaluation]:
        assert [model() for model in judged] == [None] * len(judged)
        judged.append(ref(model))
        return _judge(model)

    bench = workbench(stage1=2, stage2=1)
    gc.disable()
    try:
        run_points(points_of([name], [0.6, 0.4, 0.2], [0]), tmp_path, lambda seed: bench, judge)
    finally:
        gc.enable()
    assert len(judged) == 3


def test_checkpoints_of_a_finished_training_are_dropped(tmp_path: Path) -> None:
    bench = workbench(stage1=2, stage2=1, directory=tmp_path / "checkpoints", checkpoint_every=1)
    run_points(points_of(["random", "ffn-free", "kla"], [0.5], [0]), tmp_path, lambda seed: bench, _judge)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()} == {"dense"}


def test_processes_share_the_points_out(tmp_path: Path) -> None:
    """Threads stand in for processes: locks are of open files, whoever opened them."""
    bench, ran, both_at_it = workbench(stage1=1, stage2=1), list[float](), Barrier(2, timeout=60)

    def at_once(bench: Workbench) -> AtDensity:
        def at(density: float) -> AbstractContextManager[nn.Module]:
            ran.append(density)
            if density > 0.4:
                both_at_it.wait()  # each of the first two points is run while the other is
            return nullcontext(bench.start)

        return at

    method("shared", title="Shared", granularity=Granularity.NEURON, needs=Needs.NOTHING, fits_each_density=True)(
        at_once
    )
    points = points_of(["shared"], [0.6, 0.5, 0.3, 0.1], [0])
    try:
        with ThreadPoolExecutor(2) as pool:
            runs = [pool.submit(run_points, points, tmp_path, lambda seed: bench, _judge) for _ in range(2)]
            results = [run.result(60) for run in runs]
    finally:
        del METHODS["shared"]
    assert sorted(ran) == [0.1, 0.3, 0.5, 0.6]
    assert results[0] == results[1]
    assert [result.target for result in results[0]] == [0.6, 0.5, 0.3, 0.1]


def test_what_others_are_at_need_not_be_waited_for(tmp_path: Path) -> None:
    bench, points = workbench(stage1=1, stage2=1), points_of(["kla", "dense"], [0.5], [0])
    with claim(tmp_path / "claims" / "kla-seed0.lock"):
        results = run_points(points, tmp_path, lambda seed: bench, _judge, wait=False)
    assert [result.method for result in results] == ["dense"]


def test_processes_find_what_another_has_trained_and_grouped(tmp_path: Path) -> None:
    first = workbench(stage1=2, stage2=1, directory=tmp_path, checkpoint_every=100)
    weights, grouped = first.dense.state_dict(), first.transformed(first.transform)
    second = replace(first, start=Planted(), new_batches=_no_batches_but_their_position)
    assert all(torch.equal(value, weights[name]) for name, value in second.dense.state_dict().items())
    assert second.tokens_of(second.dense) == first.tokens_of(first.dense)
    again = second.transformed(second.transform).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in grouped.state_dict().items() if "router" not in name)


def _no_batches_but_their_position() -> PlantedBatches:
    class Spent(PlantedBatches):
        def next_batch(self) -> dict[str, torch.Tensor]:
            raise AssertionError("trained again")

    return Spent(0)
