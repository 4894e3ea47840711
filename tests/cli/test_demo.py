"""lte-compile demo: what it shows of a run. The run itself takes minutes and has tests of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lte_compile.demo import DemoConfig
from lte_compile.reports.results import RunResult
from tests.cli.conftest import Run
from tests.test_report import example_result


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the run was asked for; a result is made up instead of measured."""
    seen: dict[str, Any] = {}

    def run_demo(directory: Path, config: DemoConfig, **options: Any) -> RunResult:
        seen.update(directory=directory, config=config, **options)
        return example_result()

    monkeypatch.setattr("lte_compile.cli.demonstrating.run_demo", run_demo)
    return seen


def test_demo_shows_the_final_table_and_where_the_report_is(run: Run, tmp_path: Path, asked: dict[str, Any]) -> None:
    result = run("demo", "--out", tmp_path / "x", "--quick")
    assert result.exit_code == 0, result.stderr
    for part in ("Oracle neurons", "Without FFNs", "model.onnx", "22,713,216", str(tmp_path / "x" / "report.html")):
        assert part in result.stdout
    assert asked["config"] == DemoConfig.quick()
    assert callable(asked["on_step"])


def test_demo_json_is_the_result(run_json: Callable[..., Any], tmp_path: Path, asked: dict[str, Any]) -> None:
    document = run_json("demo", "--out", tmp_path / "x")
    report = document.pop("report")
    assert report == str(tmp_path / "x" / "report.html")
    assert RunResult.from_dict(document) == example_result()
    assert asked["config"] == DemoConfig()


def test_demo_refuses_an_unwritable_out(run: Run, unwritable: Path, asked: dict[str, Any]) -> None:
    assert run("demo", "--out", unwritable).exit_code == 2
    assert not asked
