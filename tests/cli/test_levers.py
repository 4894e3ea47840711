"""benchmarks.experiments: levers from one start, shared out, with a table of what is there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import experiments


def test_levers_run_from_one_start_and_are_not_run_twice(
    llama: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("--steps", 5, "--finetune-steps", 2, "--batch-size", 4, "--window", 16, "--test-examples", 8)
    names = ("base", "stairs", "two-stages", "dense-lr-1e-4", "budgets-ends")
    given = (llama, "--task", prose, "--out", tmp_path, "--levers", *names, *sizes, "--measure-every", 2)
    curve = ("--curve", 0.3, 0.6)
    monkeypatch.setattr(
        sys, "argv", ["experiments", *map(str, (*given, *curve)), "--device", "cpu", "--grouping", "random"]
    )
    assert experiments.main() == 0
    rows = {name: json.loads((tmp_path / "levers" / f"{name}-seed0.json").read_text()) for name in names}
    assert len({row["tokens"] for row in rows.values()}) == 1
    assert rows["two-stages"]["train"]["stage2_steps"] == 2
    assert rows["dense-lr-1e-4"]["density"] == 1.0
    points = rows["budgets-ends"]["curve"]
    assert [point["density"] for point in points] == pytest.approx([0.3, 0.6], abs=0.05)  # 8 windows against 16
    assert all(point["valid_quality"] > 1 for point in points)
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "levers").glob("*.json")}
    assert experiments.main() == 0
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "levers").glob("*.json")} == written
    shown = capsys.readouterr().out
    assert all(f"| {name} | 0 |" in shown for name in names)
