"""The zoo's table in the terminal summary, and `--zoo-table PATH` that writes it as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--zoo-table", metavar="PATH", help="with -m zoo: write the table of architectures to this page")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Lines travel in the tests' user_properties, which pytest-xdist brings back from its workers."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)]
    lines = [value for report in reports for key, value in report.user_properties if key == "zoo"]
    if not lines:
        return
    from tests.architectures.table import page, text  # only a run of the zoo needs it

    seconds = sum(report.duration for report in reports if any(key == "zoo" for key, _ in report.user_properties))
    terminalreporter.section("architecture x capture route")
    terminalreporter.write_line(text(lines, seconds))
    if path := config.getoption("--zoo-table"):
        Path(path).write_text(page(lines, seconds), encoding="utf-8")
