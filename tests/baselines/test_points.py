"""Running points: what one method's failure costs, and what is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from lte_compile.baselines import METHODS, AtDensity, Granularity, Needs, Workbench, method
from lte_compile.comparison import points_of, run_points
from lte_compile.evaluation import Evaluation, evaluate
from tests.planted import batches, workbench


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
    assert {path.name for path in tmp_path.iterdir()} == {"kla-0.5-seed0.json", "kla-0.5-seed1.json"}
    assert opened == [0, 1]
    again = run_points(points_of(["kla"], [0.5], [0, 1]), tmp_path, open_bench, _judge)
    assert opened == [0, 1]  # finished seeds need no model
    assert [(result.seed, result.density) for result in again] == [(0, 0.5), (1, 0.5)]


def test_checkpoints_of_a_finished_training_are_dropped(tmp_path: Path) -> None:
    bench = workbench(stage1=2, stage2=1, directory=tmp_path / "checkpoints", checkpoint_every=1)
    run_points(points_of(["random", "ffn-free", "kla"], [0.5], [0]), tmp_path, lambda seed: bench, _judge)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"dense"}
