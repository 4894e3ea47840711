"""lte-compile compare: a grid of points, resumed point by point, and what is drawn from it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lte_compile.comparison.plot import density_plot, tradeoff_plot
from lte_compile.comparison.run import PointResult, points_of, read_point
from lte_compile.comparison.table import Spread, comparison_rows, markdown
from lte_compile.reports.results import Metric
from tests.cli.conftest import Run

RunJson = Callable[..., Any]
BERT = ("--finetune-steps", 8, "--stage1-steps", 6, "--stage2-steps", 2, "--batch-size", 16, "--expert-size", 8)
LLAMA = ("--stage1-steps", 3, "--stage2-steps", 1, "--window", 16, "--batch-size", 4, "--expert-size", 8)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compared")


def test_an_encoder_is_compared_point_by_point(out: Path, bert: Path, labelled: Path, run_json: RunJson) -> None:
    grid = ("--task", labelled, "--methods", "lte,kla,teal,dense", "--densities", "0.5,.25", "--seeds", 2)
    document = run_json("compare", bert, "--out", out, *grid, *BERT)
    assert [(row["method"], row["target"], row["seeds"]) for row in document["rows"]] == [
        ("dense", 1.0, 2),
        *(("lte", 0.5, 2), ("lte", 0.25, 2), ("kla", 0.5, 2), ("kla", 0.25, 2), ("teal", 0.5, 2), ("teal", 0.25, 2)),
    ]
    assert len({point["training_tokens"] for point in document["points"] if point["seed"] == 0}) == 1
    names = {path.name for path in out.iterdir()}
    assert names >= {"comparison.json", "comparison.md", "weight_share.png", "density.png", "points", "settings.json"}
    assert json.loads((out / "comparison.json").read_text())["rows"] == document["rows"]
    kept = {path.name for path in (out / "checkpoints" / "seed0").iterdir() if path.is_dir()}
    assert kept == {"finetune", "dense"}  # what further methods start from; a finished point needs none


def test_a_second_run_does_only_what_is_missing(out: Path, bert: Path, labelled: Path, run: Run) -> None:
    first = {path.name: path.stat().st_mtime_ns for path in (out / "points").glob("*.json")}
    gone = out / "points" / "kla-0.25-seed1.json"
    before = read_point(gone)
    gone.unlink()
    grid = ("--task", labelled, "--methods", "kla,ffn-free,dense,lte", "--densities", "0.5,.25", "--seeds", 2)
    result = run("compare", bert, "--out", out, *grid, *BERT)
    assert result.exit_code == 0, result.stderr
    assert "9 of 12 points are there already" in result.stderr
    again = {path.name: path.stat().st_mtime_ns for path in (out / "points").glob("*.json")}
    assert {name for name in again if again[name] != first.get(name)} == {
        gone.name,
        "ffn-free-0-seed0.json",
        "ffn-free-0-seed1.json",
    }
    resumed = read_point(gone)  # from the checkpoint of the dense model: the same weights, bit for bit
    assert (resumed.quality, resumed.loss, resumed.selection) == (before.quality, before.loss, before.selection)


def test_other_settings_do_not_mix(out: Path, bert: Path, labelled: Path, run: Run) -> None:
    result = run("compare", bert, "--out", out, "--task", labelled, "--methods", "kla", *BERT, "--learning-rate", 1e-2)
    assert result.exit_code == 2
    assert "holds another comparison (learning_rate was 0.0001, now 0.01)" in result.stderr


def test_settings_that_did_not_exist_yet_had_their_defaults(out: Path, bert: Path, labelled: Path, run: Run) -> None:
    recorded = json.loads((out / "settings.json").read_text())
    for newer in ("budget_range", "budget_draw", "teacher", "fit_target"):
        del recorded[newer]
    (out / "settings.json").write_text(json.dumps(recorded))
    given = ("compare", bert, "--out", out, "--task", labelled, "--methods", "kla", *BERT, "--teacher", "start")
    assert run(*given).exit_code == 0
    result = run(*given, "--budget-range", 0.2, 0.6)
    assert result.exit_code == 2
    assert "holds another comparison (budget_range was None, now [0.2, 0.6])" in result.stderr


def test_points_say_how_they_validate(out: Path, bert: Path, labelled: Path, run: Run) -> None:
    [written, *_] = sorted((out / "points").glob("lte-*.json"))
    point = read_point(written)
    assert 0.0 <= point.valid_quality <= 1.0  # type: ignore[operator]
    assert point.valid_density == pytest.approx(point.target, abs=0.1)  # thresholds are placed there; few, short texts
    record = json.loads(written.read_text())
    del record["valid_quality"], record["valid_density"]
    older = out / "older.json"
    older.write_text(json.dumps(record))
    assert read_point(older).valid_quality is None
    older.write_text(json.dumps(record | {"colour": 1}))
    with pytest.raises(ValueError, match="is no result of a comparison: fields \\['colour'\\] differ"):
        read_point(older)
    older.unlink()


def test_seeds_may_begin_elsewhere(tmp_path: Path, bert: Path, labelled: Path, run_json: RunJson) -> None:
    grid = ("--task", labelled, "--methods", "ffn-free", *BERT, "--seeds", 1, "--first-seed", 2)
    document = run_json("compare", bert, "--out", tmp_path, *grid)
    assert [point["seed"] for point in document["points"]] == [2]


def test_the_dense_model_may_train_for_fewer_steps(
    tmp_path: Path, bert: Path, labelled: Path, run_json: RunJson
) -> None:
    grid = ("--task", labelled, "--methods", "dense,ffn-free", *BERT, "--dense-steps", 2)
    document = run_json("compare", bert, "--out", tmp_path, *grid)
    tokens = {point["method"]: point["training_tokens"] for point in document["points"]}
    assert tokens["dense"] < tokens["ffn-free"] / 2  # 2 of 8 steps; texts differ in length


def test_levers_of_an_encoders_recipe(tmp_path: Path, bert: Path, labelled: Path, run_json: RunJson) -> None:
    recipe = ("--distillation", 0.9, "--temperature", 2, "--teacher", "dense", "--fit-target", "effect", "--dropout", 0)
    steering = ("--hold-density", "--eta", 0.1, "--start-density", 0.8, "--anneal", 0.5, "--measure-every", 2)
    grid = ("--task", labelled, "--methods", "dense,lte,moefication", "--densities", "0.5", "--step-graphs")
    document = run_json("compare", bert, "--out", tmp_path, *grid, *BERT, *recipe, *steering)
    rows = {row["method"]: row for row in document["rows"]}
    assert rows["lte"]["density"]["mean"] == pytest.approx(0.5, abs=0.05)
    settings = document["settings"]
    assert (settings["teacher"], settings["fit_target"], settings["dropout"]) == ("dense", "effect", 0)
    assert "step_graphs" not in settings  # a matter of speed


def test_a_language_model_is_compared(tmp_path: Path, llama: Path, prose: Path, run_json: RunJson) -> None:
    grid = ("--task", prose, "--densities", "0.5", "--methods", "noisy-topk,moefication,deja-vu,cats,ffn-free")
    routers = ("--router", "two-layer", "--router-rank", 4)  # LTE's; the others have their own
    document = run_json("compare", llama, "--out", tmp_path, *grid, *LLAMA, "--grouping", "coactivation", *routers)
    assert document["metric"] == "perplexity"
    rows = {row["method"]: row for row in document["rows"]}
    for name in ("noisy-topk", "moefication", "deja-vu"):
        assert rows[name]["density"]["mean"] == pytest.approx(0.5)
    # a quantile of 16 calibration batches against the test windows
    assert rows["cats"]["density"]["mean"] == pytest.approx(0.5, abs=0.05)
    assert rows["cats"]["weight_share"]["mean"] == pytest.approx((1 + 2 * rows["cats"]["density"]["mean"]) / 3)
    assert rows["ffn-free"]["weight_share"]["mean"] == rows["ffn-free"]["density"]["mean"] == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--methods", "moe"), "no method 'moe'"),
        (("--densities", "0.5,x"), "takes numbers separated by commas"),
        (("--densities", "0.5,1"), "densities must lie between 0 and 1"),
        (("--densities", ""), "nothing to compare"),
        (("--seeds", "0"), "--seeds must be at least 1"),
        (("--dense-steps", "0"), "--dense-steps must be at least 1"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    tmp_path: Path, bert: Path, labelled: Path, run: Run, options: tuple[str, str], message: str
) -> None:
    grid = ("--methods", "kla", *options)
    result = run("compare", bert, "--task", labelled, "--out", tmp_path / "new", *grid)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "new").exists()


def test_a_model_with_routers_is_refused(converted: Path, prose: Path, tmp_path: Path, run: Run) -> None:
    result = run("compare", converted, "--task", prose, "--out", tmp_path / "new")
    assert result.exit_code == 2
    assert "compared from a dense model" in result.stderr


def _result(method: str, target: float, seed: int, quality: float) -> PointResult:
    return PointResult(
        method=method,
        target=target,
        seed=seed,
        quality=quality,
        loss=1.0,
        density=target,
        weight_share=target + 0.01 * seed,
        weight_bytes_per_token=1e6,
        flops_per_token=2e6,
        training_tokens=1000,
        seconds=1.0,
        selection=None,
    )


def test_rows_hold_means_and_deviations_over_seeds_and_losses_against_the_same_seeds_dense() -> None:
    results = [_result("lte", 0.5, 0, 22.0), _result("lte", 0.5, 1, 33.0)]
    results += [_result("dense", 1.0, 0, 20.0), _result("dense", 1.0, 1, 30.0)]
    dense, learned = comparison_rows(results, Metric.PERPLEXITY)
    assert (dense.method.name, learned.method.name) == ("dense", "lte")
    assert learned.quality.mean == 27.5
    assert learned.quality.deviation == pytest.approx(60.5**0.5)  # ((22 - 27.5)^2 + (33 - 27.5)^2) / (2 - 1)
    assert learned.weight_share.mean == pytest.approx(0.505)
    assert learned.against_dense is not None
    assert learned.against_dense.mean == pytest.approx(0.1)  # 10 % worse with either seed
    assert learned.against_dense.deviation == pytest.approx(0.0, abs=1e-12)
    page = markdown([dense, learned], Metric.PERPLEXITY, "title")
    assert "| LTE | 50 % | 50.0 % ± 0.0 | 50.5 % ± 0.7 | 27.50 ± 7.78 | +10.0 ± 0.0 % | 2 M | 2 |" in page


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("seeds", [1, 2])
def test_plots_are_drawn_with_and_without_bars(metric: Metric, seeds: int) -> None:
    values = {"dense": (1.0,), "lte": (0.5, 0.3), "kla": (0.5, 0.3), "ffn-free": (0.0,)}
    results = [
        _result(name, target, seed, 0.5 + target / 10 + seed / 100)
        for name, targets in values.items()
        for target in targets
        for seed in range(seeds)
    ]
    rows = comparison_rows(results, metric)
    for png in (tradeoff_plot(rows, metric), density_plot(rows, metric)):
        assert png.startswith(b"\x89PNG")
        assert len(png) > 10_000


def test_a_method_of_one_density_has_one_point_and_repeats_count_once() -> None:
    points = points_of(["dense", "kla", "kla"], [0.3, 0.3, 0.5], range(2))
    assert [(p.seed, p.method, p.target) for p in points] == [
        (seed, *rest) for seed in range(2) for rest in (("dense", 1.0), ("kla", 0.5), ("kla", 0.3))
    ]


def test_a_quality_that_is_infinite_has_no_deviation() -> None:
    spread = Spread.of([1.0, float("inf")])
    assert math.isinf(spread.mean)
    assert spread.deviation is not None
    assert math.isnan(spread.deviation)


def test_a_file_of_something_else_is_no_result(tmp_path: Path) -> None:
    path = tmp_path / "kla-0.5-seed0.json"
    path.write_text('{"method": "kla"}')
    with pytest.raises(ValueError, match="is no result of a comparison"):
        read_point(path)
