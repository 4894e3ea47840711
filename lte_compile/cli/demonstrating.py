"""lte-compile demo: the main job on real weights, with its report."""

from __future__ import annotations

from pathlib import Path

from rich.console import RenderableType
from rich.table import Table

from lte_compile.cli.output import Outcome
from lte_compile.cli.preparing import check_output
from lte_compile.demo import DemoConfig, run_demo
from lte_compile.reports.results import RunResult
from lte_compile.reports.table import percent, render_table
from lte_compile.training.progress import TrainingProgress


def demonstrate(out: Path, *, quick: bool) -> Outcome:
    """Run it; the report is in `out`.

    Raises:
        ValueError: `out` cannot be written.
    """
    check_output(out, Path(), overwrite=True)
    with TrainingProgress() as progress:
        result = run_demo(out, DemoConfig.quick() if quick else DemoConfig(), on_step=progress)
    report = out / "report.html"
    shown: list[RenderableType] = [render_table(result), _costs(result), f"report: {report}"]
    return Outcome({"report": str(report), **result.to_dict()}, shown)


def _costs(result: RunResult) -> Table:
    """Parameters, ONNX equality and latency: what the quality table has no columns for."""
    table = Table("", "", title="Cost and equality", title_justify="left", show_header=False)
    added = result.router_parameters / result.dense_parameters
    table.add_row("parameters", f"{result.dense_parameters:,}")
    table.add_row("added by routers", f"{result.router_parameters:,} ({added:.2%})")
    for check in result.onnx:
        table.add_row(f"{check.file} in {check.runtime}", f"largest difference to torch {check}")
    for row in result.latency:
        speed = f"{row.sparse_us:.0f} us, dense {row.dense_us:.0f} us ({row.dense_us / row.sparse_us:.2f}x)"
        table.add_row(f"one FFN, one token, density {percent(row.density)}", speed)
    table.add_row("took", f"{sum(result.wall_seconds.values()):.0f} s")
    return table
