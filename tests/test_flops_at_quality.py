"""The least FLOPs at a given quality, between the densities that were run."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.flops_at_quality import Curve, least_flops, table


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ([(10.0, 1.0), (5.0, 0.9), (2.0, 0.5)], 7.5),
        ([(2.0, 0.5), (10.0, 1.0), (5.0, 0.95)], 5.0),
        ([(10.0, 1.0), (5.0, 0.9), (2.0, 0.99)], 7.5),  # better again further down does not count
        ([(10.0, 1.0)], 10.0),
        ([(10.0, 0.9), (5.0, 0.8)], None),
    ],
)
def test_lines_between_points_are_followed_from_above(curve: Curve, expected: float | None) -> None:
    assert least_flops(curve, 0.95) == (None if expected is None else pytest.approx(expected))


def _row(method: str, flops: float, quality: float) -> dict[str, Any]:
    return {"method": method, "flops_per_token": flops, "quality": {"mean": quality}}


def test_a_perplexity_is_the_better_the_smaller_and_the_rest_of_the_model_counts() -> None:
    rows = [_row("dense", 4e9, 10.0), _row("lte", 2e9, 10.5), _row("lte", 1e9, 12.0), _row("bad", 3e9, 11.0)]
    lines = table({"metric": "perplexity", "rows": rows}, 0.05, 500_000_000).splitlines()
    assert lines[2] == "| dense | 4.000 | 5.000 | |"
    assert lines[3] == "| lte | 2.000 | 3.000 | 1.67 x |"
    assert lines[4] == "| bad | 3.500 | 4.500 | 1.11 x |"


def test_where_the_lowest_point_is_good_enough_the_least_is_a_bound() -> None:
    rows = [_row("dense", 4e9, 0.5), _row("lte", 2e9, 0.49), _row("lte", 1e9, 0.48)]
    lines = table({"metric": "ROUGE-L", "rows": rows}, 0.05, 500_000_000).splitlines()
    assert lines[3] == "| lte | at most 1.000 | at most 2.000 | 2.50 x |"
