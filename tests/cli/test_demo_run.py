"""The demo's chain from end to end, on a tiny random model and a task of eight words."""

from __future__ import annotations

from pathlib import Path

import pytest

from lte_compile.checkpoints.persistence import load_pretrained
from lte_compile.demo import DemoConfig, run_demo
from lte_compile.reports.results import load_result
from lte_compile.routing.router import routers
from lte_compile.training.loop import StepEvent


def test_the_whole_chain(bert: Path, labelled: Path, tmp_path: Path) -> None:
    config = DemoConfig(
        model=str(bert),
        task=str(labelled),
        target_density=0.3,
        budgets=(0.3, 0.6),
        finetune_steps=150,
        finetune_rate=3e-3,
        stage1_steps=30,
        stage2_steps=10,
        learning_rate=3e-3,
        expert_size=8,
    )
    events: list[StepEvent] = []
    result = run_demo(tmp_path / "run", config, on_step=events.append)
    assert load_result(tmp_path / "run" / "result.json") == result
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"report.html", "quality.png", "model.onnx", "model"}
    assert result.dense_quality > 0.75  # one word of the text decides; chance is a half
    assert [row.target for row in result.budgets] == [0.3, 0.6]
    assert [point.density for point in result.oracle] == [row.density for row in result.budgets]
    # Thresholds are placed on 16 validation texts and measured on 16 others.
    assert all(abs(row.density - row.target) < 0.15 for row in result.budgets)
    assert result.onnx[0].max_abs_diff < 1e-4
    assert [event.phase for event in events] == (
        ["fine-tune"] * 150 + ["stage 1"] * 30 + ["stage 2"] * 10 + ["FFN-free control"] * 40
    )
    assert {router.stage for router in routers(load_pretrained(tmp_path / "run" / "model"))} == {"hard"}


def test_the_quick_demo_runs_every_part() -> None:
    quick, full = DemoConfig.quick(), DemoConfig()
    assert 0 < quick.finetune_steps < full.finetune_steps
    assert quick.target_density in quick.budgets


def test_a_place_that_cannot_be_written_fails_before_the_work(unwritable: Path) -> None:
    with pytest.raises(OSError):
        run_demo(unwritable, DemoConfig())
