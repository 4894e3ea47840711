"""A run's report: one self-contained HTML page, the figures beside it, and the numbers as JSON."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

from lte_compile.reports.plots import histogram_plot, layer_plot, quality_plot, training_plot
from lte_compile.reports.results import Metric, RunResult, save_result, write_atomically
from lte_compile.reports.table import (
    ResultRow,
    RowKind,
    cells,
    flops_text,
    headings,
    percent,
    quality_text,
    render_table,
    result_rows,
    table_note,
)

__all__ = ["render_table", "write_report"]

CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 4rem; max-width: 60rem; background: #fff; color: #22262b;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
header { border-bottom: 3px solid #1f5fae; margin-bottom: 1.4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .4rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
p { max-width: 46rem; margin: .5rem 0; }
.lead { font-size: 1.1rem; }
.note, figcaption { color: #59626d; font-size: .88rem; text-align: left; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .8rem; border-bottom: 1px solid #dfe5ec; text-align: right; white-space: nowrap; }
thead th { vertical-align: bottom; white-space: normal; border-bottom: 2px solid #7a828c; font-size: .9rem; }
th:first-child, td:first-child { text-align: left; padding-left: .5rem; }
thead th + th { min-width: 5.2rem; }
tbody th { font-weight: 400; }
tbody.lte { background: #f2f6fb; font-weight: 600; }
tbody.lte th { font-weight: 600; }
figure { margin: 1rem 0; }
img { display: block; width: 100%; max-width: 46rem; height: auto; }
.figures img { min-width: 34rem; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .25rem 1.2rem; margin: .5rem 0; }
dt { color: #59626d; } dd { margin: 0; overflow-wrap: anywhere; }
code { font: .92em ui-monospace, "DejaVu Sans Mono", monospace; }
@media (max-width: 40rem) { body { font-size: 15px; } th, td { padding: .35rem .5rem; } h1 { font-size: 1.3rem; } }
"""


def write_report(result: RunResult, directory: Path) -> Path:
    """Write report.html, result.json and the figures (PNG) into a directory, made when missing.

    The page needs no other file and no network. Returns its path.
    """
    directory.mkdir(parents=True, exist_ok=True)
    figures = _figures(result)
    for name, png in figures.items():
        write_atomically(directory / f"{name}.png", png)
    save_result(result, directory / "result.json")
    page = directory / "report.html"
    write_atomically(page, _page(result, figures).encode())
    return page


def plot_data(result: RunResult) -> dict[str, object]:
    """The numbers that the quality plot draws, by line."""
    lines: dict[str, list[dict[str, float]]] = {kind.value: [] for kind in RowKind}
    for row in result_rows(result):
        lines[row.kind].append({"density": row.density, "quality": row.quality})
    return {"metric": result.metric.value, **lines}


def _figures(result: RunResult) -> dict[str, bytes]:
    figures = {"quality": quality_plot(result)}
    if result.budgets:
        figures["layers"] = layer_plot(result)
    if result.histograms:
        figures["scores"] = histogram_plot(result)
    if result.curve:
        figures["training"] = training_plot(result)
    return figures


def _page(result: RunResult, figures: Mapping[str, bytes]) -> str:
    title = escape(f"{result.name}: learned FFN sparsity")
    # A "<" inside the JSON could close the script element.
    data = json.dumps(plot_data(result), allow_nan=False).replace("<", "\\u003c")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title>",
            '<link rel="icon" href="data:,">',
            f"<style>{CSS}</style></head><body>",
            f"<header><h1>{escape(result.name)}</h1>{_lead(result)}</header>",
            _results_section(result, figures["quality"]),
            _cost_section(result),
            *_figure_sections(figures),
            _onnx_section(result),
            _about_section(result),
            f'<script type="application/json" id="plot-data">{data}</script>',
            "</body></html>",
        ]
    )


def _lead(result: RunResult) -> str:
    subject = f"<code>{escape(result.provenance.model)}</code> on <code>{escape(result.task)}</code>"
    dense = quality_text(result.metric, result.dense_quality)
    sentence = f"{subject}: test {result.metric} {dense} dense"
    if result.budgets:
        low = min(result.budgets, key=lambda row: row.density)
        sentence += f", {quality_text(result.metric, low.quality)} with {percent(low.density)} of the experts active"
    free = quality_text(result.metric, result.ffn_free_quality)
    return f'<p class="lead">{sentence}; {free} without any FFN.</p>'


def _results_section(result: RunResult, figure: bytes) -> str:
    better = "lower" if result.metric is Metric.PERPLEXITY else "higher"
    bars = " Bars: one standard error." if result.metric is Metric.ACCURACY else ""
    caption = f"Test {result.metric} ({better} is better) against the share of active experts.{bars}"
    rows = result_rows(result)
    bodies = "".join(_table_body(result, kind, [row for row in rows if row.kind is kind]) for kind in RowKind)
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings(result))
    return (
        '<section id="outcome"><h2>Outcome</h2><div class="scroll"><table id="results" aria-describedby="results-note">'
        f"<thead><tr>{head}</tr></thead>{bodies}</table></div>"
        f'<p class="note" id="results-note">{escape(table_note(result))}.</p>'
        f"{_image('quality', figure, caption)}</section>"
    )


def _table_body(result: RunResult, kind: RowKind, rows: Iterable[ResultRow]) -> str:
    lines = "".join(_table_line(result, row) for row in rows)
    return f'<tbody class="{kind}">{lines}</tbody>' if lines else ""


def _table_line(result: RunResult, row: ResultRow) -> str:
    label, density, quality, *rest = (escape(cell) for cell in cells(result, row))
    # data-value holds the number in full, so that the page can be checked against its own plot.
    return (
        f'<tr><th scope="row">{label}</th>'
        f'<td class="density" data-value="{row.density!r}">{density}</td>'
        f'<td class="quality" data-value="{row.quality!r}">{quality}</td>'
        + "".join(f"<td>{cell}</td>" for cell in rest)
        + "</tr>"
    )


def _cost_section(result: RunResult) -> str:
    share = result.router_parameters / result.dense_parameters
    text = (
        f"<p>The dense model has {result.dense_parameters:,} parameters and spends "
        f"{flops_text(result.dense_ffn_flops_per_token)} FFN FLOPs on a token. "
        f"The routers add {result.router_parameters:,} parameters ({percent(share, 2)}).</p>"
    )
    if result.latency:
        rows = [
            (percent(row.density), f"{row.dense_us:.0f}", f"{row.sparse_us:.0f}", f"{row.dense_us / row.sparse_us:.2f}")
            for row in result.latency
        ]
        titles = ("Density", "Dense (µs)", "Sparse (µs)", "Dense / sparse")
        caption = f"One FFN on the CPU, batch 1, {result.environment.threads} threads: median time."
        text += _plain_table("latency", titles, rows, caption)
    return f'<section id="cost"><h2>Cost</h2>{text}</section>'


def _figure_sections(figures: Mapping[str, bytes]) -> list[str]:
    captions = {
        "layers": ("Where the experts are active", "Density of each layer; dashed: the mean over layers."),
        "scores": (
            "Router scores",
            "Scores of each layer's router on the test split; an expert runs above the threshold.",
        ),
        "training": (
            "Training",
            "Loss, density and eta, the weight of the efficiency loss, over the steps of all stages.",
        ),
    }
    return [
        f'<section><h2>{heading}</h2><div class="scroll figures">{_image(name, figures[name], caption)}</div></section>'
        for name, (heading, caption) in captions.items()
        if name in figures
    ]


def _onnx_section(result: RunResult) -> str:
    if not result.onnx:
        return ""
    rows = [(check.file, check.runtime, str(check)) for check in result.onnx]
    titles = ("File", "Runtime", "Largest difference")
    table = _plain_table("onnx", titles, rows, "Largest absolute difference between torch's logits and the file's.")
    return f"<section><h2>ONNX Runtime</h2>{table}</section>"


def _about_section(result: RunResult) -> str:
    weights, environment = result.provenance, result.environment
    phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in result.wall_seconds.items())
    entries = {
        "Weights": f"{weights.model} from {weights.source}: {weights.detail}",
        "Weights' note": weights.note,
        "Licence": weights.licence,
        "Command": environment.command,
        "Date": environment.date,
        "CPU": f"{environment.cpu}, {environment.threads} threads",
        "Versions": ", ".join(f"{name} {version}" for name, version in environment.versions.items()),
        "Seeds": ", ".join(f"{name} {seed}" for name, seed in result.seeds.items()),
        "Wall time": phases,
    }
    lines = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in entries.items() if value)
    return f'<section id="about"><h2>How this was made</h2><dl>{lines}</dl></section>'


def _plain_table(name: str, titles: Iterable[str], rows: Iterable[tuple[str, ...]], caption: str) -> str:
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table id="{name}" aria-describedby="{name}-note">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        f'<p class="note" id="{name}-note">{escape(caption)}</p>'
    )


def _image(name: str, png: bytes, caption: str) -> str:
    source = b64encode(png).decode()
    alt = escape(caption)
    return (
        f'<figure><img id="plot-{name}" alt="{alt}" src="data:image/png;base64,{source}">'
        f"<figcaption>{alt}</figcaption></figure>"
    )
