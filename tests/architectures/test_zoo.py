"""The zoo: exact sites on every capture route, and a transformed model that still does what the model did.

`pytest -m zoo` runs all rows, the default run those that are marked for it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.architectures import audio, decoders, encoders, experts, modules, seq2seq, vision
from tests.architectures.measure import Measured, measure
from tests.architectures.row import Row
from tests.architectures.table import record

# Tracing these for coverage takes half of their time again; other tests run the same lines.
pytestmark = pytest.mark.no_cover

ROWS: tuple[Row, ...] = (
    *decoders.ROWS,
    *encoders.ROWS,
    *seq2seq.ROWS,
    *experts.ROWS,
    *vision.ROWS,
    *audio.ROWS,
    *modules.ROWS,
)

# Float64 sums in another order differ by about 1e-16 each. Where a model itself rounds to float32 on the way (norms,
# rotary embeddings), a sum that was next to a rounding border moves by 6e-8 of its size there.
# Sums in float32 differ by about 1e-7 each.
DENSE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
# An exported program runs the same operations.
EXPORT_TOLERANCE = 1e-9
# ONNX Runtime in float32, outputs of size about 1.
ONNX_TOLERANCE = 1e-4


def _parameters() -> list[Any]:
    return [pytest.param(row, id=row.name, marks=[pytest.mark.zoo, *_subset(row)]) for row in ROWS]


def _subset(row: Row) -> list[pytest.MarkDecorator]:
    return [pytest.mark.zoo_subset] if row.in_default_run else []


@pytest.mark.parametrize("row", _parameters())
def test_architecture(row: Row, record_property: pytest.FixtureRequest) -> None:
    measured = measure(row)
    record_property("zoo", record(measured))  # type: ignore[operator]

    assert not measured.wrong_routes, f"(missed, false) sites by route: {measured.wrong_routes}"
    assert (measured.dense_error or 0) <= DENSE_TOLERANCE[row.dtype]
    assert measured.generates is not False
    assert (measured.export_error or 0) <= EXPORT_TOLERANCE
    assert (measured.onnx_error or 0) <= ONNX_TOLERANCE


def test_the_zoo_is_wide() -> None:
    """At least 60 transformers architectures, each row with its own name, and a subset of 12 for every run."""
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    assert len(ROWS) - len(modules.ROWS) >= 60
    assert sum(row.in_default_run for row in ROWS) == 12
    assert sum(row.onnx for row in ROWS) >= 12


def test_a_missed_and_a_false_site_are_both_wrong() -> None:
    from tests.architectures.measure import Sites

    line = Measured("one", frozenset({"a"}), frozenset(), {"export": Sites(ffn=frozenset({"b"}))})
    assert line.wrong_routes == {"export": ({"a"}, {"b"})}
