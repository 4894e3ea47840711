"""The zoo's results as a table: architecture x capture route, and what the transformed model still does.

`pytest -m zoo --zoo-table docs/zoo.md` writes it. A line is the JSON-able record of one measured row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import transformers

from tests.architectures.measure import Measured, Sites

Line = Mapping[str, Any]

_COLUMNS = ("architecture", "FFNs", "native", "export", "dynamo", "fx", "dense fp64", "generate", "export =", "ONNX")

_HEADING = """\
# The zoo: architectures by capture route

Written by `pytest -m zoo --zoo-table docs/zoo.md`. Tiny random models; `tests/architectures/` holds the table of what
each has by construction. A route's cell is sites found / expected, compared by name: a wrong site fails as a missed one
does. "native" counts banks of experts that the model has of itself, which are reported and left alone.
"dense fp64" is the largest difference of the transformed model's outputs in the dense stage, relative to their largest
value; "generate" compares greedy tokens; "export =" runs the transformed model's torch.export program, "ONNX" its file
in ONNX Runtime (float32). A dash means that a check does not apply.
"""


def record(measured: Measured) -> dict[str, Any]:
    """What crosses process borders: numbers and words."""
    return {
        "name": measured.name,
        "expected": len(measured.expected),
        "native": len(measured.expected_native),
        "routes": {route: _cell(measured, sites) for route, sites in measured.routes.items()},
        "dense": measured.dense_error,
        "generates": measured.generates,
        "export": measured.export_error,
        "onnx": measured.onnx_error,
        "false": sum(len(false) for _, false in measured.wrong_routes.values()),
        "missed": sum(len(missed) for missed, _ in measured.wrong_routes.values()),
    }


def _cell(measured: Measured, sites: Sites) -> str:
    if sites.obstacle:
        return f"no: {sites.obstacle}"
    truth = measured.expected | measured.expected_native
    found = sites.ffn | sites.native
    false = f" +{len(found - truth)}" if found - truth else ""
    return f"{len(found & truth)}/{len(truth)}{false}"


def text(lines: Iterable[Line], seconds: float) -> str:
    """For the terminal: columns aligned, the reasons why fx traces nothing told once each."""
    lines = sorted(lines, key=lambda line: str(line["name"]))
    rows = [_COLUMNS, *(_row(line) for line in lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*table, "", *_summary(lines, seconds)])


def page(lines: Iterable[Line], seconds: float) -> str:
    """The same in Markdown."""
    lines = sorted(lines, key=lambda line: str(line["name"]))
    table = [_markdown(_COLUMNS), _markdown(["---"] * len(_COLUMNS)), *(_markdown(_row(line)) for line in lines)]
    return "\n".join([_HEADING, *(f"- {line}" for line in _summary(lines, seconds)), "", *table, ""])


def _markdown(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _row(line: Line) -> tuple[str, ...]:
    generates = {None: "-", True: "equal", False: "DIFFERS"}[line["generates"]]
    routes = [_short(line["routes"][route]) for route in ("export", "dynamo", "fx")]
    errors = [_error(line[key]) for key in ("dense", "export", "onnx")]
    return (line["name"], str(line["expected"]), str(line["native"]), *routes, errors[0], generates, *errors[1:])


def _short(cell: str) -> str:
    return "no" if cell.startswith("no:") else cell


def _error(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.0e}"


def _summary(lines: Sequence[Line], seconds: float) -> list[str]:
    sites = sum(line["expected"] for line in lines)
    native = sum(line["native"] for line in lines)
    missed, false = (sum(line[key] for line in lines) for key in ("missed", "false"))
    reasons = Counter(
        f"{route}: {cell.removeprefix('no: ')}"
        for line in lines
        for route, cell in line["routes"].items()
        if cell.startswith("no:")
    )
    return [
        f"{len(lines)} architectures, {sites} FFNs and {native} native expert banks; {missed} missed and {false} false "
        "sites over all open routes",
        f"torch {torch.__version__}, transformers {transformers.__version__}, {seconds:.0f} s of test time",
        *(f"no {reason} ({count})" for reason, count in reasons.most_common()),
    ]
