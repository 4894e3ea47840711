"""lte-compile train and evaluate."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend

from lte_compile.calibration.density import evaluate_routers, set_density
from lte_compile.checkpoints.loading import load_model
from lte_compile.config import Stage
from lte_compile.routing.router import routers
from lte_compile.training import layer_compilation
from lte_compile.training.loop import StepEvent
from lte_compile.training.progress import TrainingProgress
from tests.cli.conftest import BERT_RUN, LLAMA_RUN, Run

RunJson = Callable[..., Any]


def test_training_leaves_a_hard_model_near_its_target(trained_bert: Path, run_json: RunJson, labelled: Path) -> None:
    assert {router.stage for router in routers(load_model(trained_bert))} == {Stage.HARD}
    rows = run_json("evaluate", trained_bert, "--task", labelled)["rows"]
    assert [row["stage"] for row in rows] == ["dense", "hard"]
    assert rows[0]["density"] == 1.0
    assert abs(rows[1]["density"] - 0.3) < 0.1  # calibrated on 16 held-out texts, measured on 16 others
    assert rows[1]["quality"] == rows[1]["accuracy"] > 0.5  # two balanced classes, one telling word
    dense, sparse = rows[0]["selection"], rows[1]["selection"]
    assert (dense["weight_share"], sparse["neuron_density"]) == (1.0, pytest.approx(rows[1]["density"]))
    assert sparse["weight_share"] == pytest.approx(sparse["flops_per_token"] / dense["flops_per_token"])
    assert sparse["neuron_density"] <= sparse["union_densities"]["2"] <= sparse["union_densities"]["64"] <= 1.0


def test_evaluate_serves_several_densities(trained_bert: Path, run_json: RunJson, labelled: Path) -> None:
    document = run_json("evaluate", trained_bert, "--task", labelled, "--density", 0.2, "--density", 0.7)
    low, high = document["rows"][1:]
    assert (low["target"], high["target"]) == (0.2, 0.7)
    assert low["density"] < 0.45 < high["density"]
    assert low["threshold"] > high["threshold"]


def test_a_model_trained_for_a_range_moves_over_it(run: Run, llama: Path, prose: Path, tmp_path: Path) -> None:
    budgets = ("--budget-range", 0.2, 0.6, "--budget-draw", "half-at-target", "--hold-density")
    result = run("train", llama, tmp_path / "out", "--task", prose, *LLAMA_RUN, *budgets)
    assert result.exit_code == 0, result.stderr
    model = load_model(tmp_path / "out")
    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(3, 90, (16, 16), generator=generator)}]
    found = [evaluate_routers(model, data).density() for density in (0.2, 0.6) if set_density(model, density)]
    assert found[0] < 0.4 < found[1]  # of other tokens than those it was calibrated on


def test_evaluate_prints_a_table(trained_bert: Path, run: Run, labelled: Path) -> None:
    result = run("evaluate", trained_bert, "--task", labelled)
    assert result.exit_code == 0
    assert "Test accuracy" in result.stdout
    assert "hard" in result.stdout


def test_compiled_training_ends_where_eager_training_does(
    run_json: RunJson, converted: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = CompileCounterWithBackend("eager")  # inductor would take a minute, and is not this project's
    monkeypatch.setattr(layer_compilation, "BACKEND", traced)
    steps = ("--finetune-steps", 0, "--stage1-steps", 4, "--stage2-steps", 2, "--window", 16, "--test-examples", 20)
    losses = []
    for number, flags in enumerate([(), ("--compile",)]):
        out = tmp_path / str(number)
        losses.append(run_json("train", converted, out, "--task", prose, *steps, *flags)["sparse"]["loss"])
    assert traced.frame_count == 2  # a stage each
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_training_a_language_model_reports_before_and_after(
    run: Run, run_json: RunJson, converted: Path, prose: Path, tmp_path: Path
) -> None:
    """From a converted directory, with distillation; then evaluated as a dense and as a sparse model."""
    steps = ("--finetune-steps", 2, "--stage1-steps", 4, "--stage2-steps", 2, "--window", 16, "--test-examples", 20)
    out = tmp_path / "out"
    document = run_json("train", converted, out, "--task", prose, *steps, "--distillation", 0.5, "--batch-size", 4)
    assert document["metric"] == "perplexity"
    assert document["dense"]["density"] == 1.0
    assert document["sparse"]["density"] < 0.6
    assert document["test_examples"] == 20
    result = run("evaluate", out, "--task", prose, "--window", 16, "--test-examples", 20)
    assert "perplexity" in result.stdout


def test_fine_tuning_has_a_rate_of_its_own(run_json: RunJson, llama: Path, prose: Path, tmp_path: Path) -> None:
    """The start that LTE's teacher is: at a vanishing rate the model as it was, at LTE's rate another one."""
    steps = ("--finetune-steps", 2, "--stage1-steps", 2, "--stage2-steps", 0, "--window", 16, "--test-examples", 8)
    common = ("--task", prose, *steps, "--learning-rate", 1e-2, "--batch-size", 4)
    before = run_json("evaluate", llama, "--task", prose, "--window", 16, "--test-examples", 8)["rows"][0]["loss"]
    still = run_json("train", llama, tmp_path / "still", *common, "--finetune-learning-rate", 1e-12)
    assert still["dense"]["loss"] == pytest.approx(before, rel=1e-6)
    assert still["sparse"]["loss"] != pytest.approx(before, rel=1e-3)
    moved = run_json("train", llama, tmp_path / "moved", *common)
    assert moved["dense"]["loss"] != pytest.approx(before, rel=1e-3)


def test_evaluating_a_dense_language_model(run: Run, run_json: RunJson, llama: Path, prose: Path) -> None:
    (row,) = run_json("evaluate", llama, "--task", prose, "--window", 16, "--test-examples", 8)["rows"]
    assert row["density"] == 1.0
    assert row["quality"] == pytest.approx(torch.tensor(row["loss"]).exp().item(), rel=1e-5)
    refused = run("evaluate", llama, "--task", prose, "--density", 0.5)
    assert refused.exit_code == 2
    assert "no routers" in refused.stderr


def test_a_killed_run_goes_on_to_the_same_weights(
    run: Run, bert: Path, trained_bert: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = ("train", bert, out, "--task", labelled, *BERT_RUN)
    show = TrainingProgress.__call__

    def killed(self: TrainingProgress, event: StepEvent) -> None:
        show(self, event)
        if (event.phase, event.step) == ("stage 1", 7):
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingProgress, "__call__", killed)
    assert run(*arguments).exit_code != 0
    assert not (out / "config.json").exists()
    monkeypatch.setattr(TrainingProgress, "__call__", show)
    resumed = run(*arguments)
    assert resumed.exit_code == 0, resumed.stderr
    assert "fine-tune" not in resumed.stderr
    weights, expected = load_file(out / "model.safetensors"), load_file(trained_bert / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_checkpoints_of_another_run_are_not_resumed(
    run: Run, bert: Path, trained_bert: Path, labelled: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(trained_bert, out)
    arguments = ("train", bert, out, "--task", labelled, *BERT_RUN, "--target-density", 0.5)
    refused = run(*arguments)
    assert refused.exit_code == 2
    assert "target_density was 0.3, now 0.5" in refused.stderr
    occupied = run(*arguments, "--no-resume")
    assert occupied.exit_code == 2
    assert "--overwrite" in occupied.stderr
    assert load_file(out / "model.safetensors").keys()
    assert run(*arguments, "--no-resume", "--overwrite").exit_code == 0


@pytest.mark.parametrize("content", [None, "{"])
def test_checkpoints_without_their_settings_are_not_resumed(
    run: Run, bert: Path, trained_bert: Path, labelled: Path, tmp_path: Path, content: str | None
) -> None:
    out = tmp_path / "out"
    shutil.copytree(trained_bert, out)
    settings = out / "checkpoints" / "settings.json"
    settings.unlink() if content is None else settings.write_text(content)
    refused = run("train", bert, out, "--task", labelled, *BERT_RUN)
    assert refused.exit_code == 2
    assert "settings.json is missing or damaged" in refused.stderr
    assert "to start over" in refused.stderr


@pytest.mark.parametrize(
    "options, says",
    [
        (("--target-density", 1.5), "target_density"),
        (("--distillation", 2), "distillation"),
        (("--batch-size", 0), "batch_size"),
        (("--finetune-steps", -1), "--finetune-steps must not be negative; got -1"),
        (("--device", "tpu"), "--device"),
        (("--device", "cuda:99"), "cuda:99"),
        (("--task-kind", "classificatoin"), "did you mean 'classification'"),
        (("--task-kind", "language-model"), "causal language model"),
        (("--expert-size", 4096), "4096"),
    ],
)
def test_train_refuses_bad_options(
    run: Run, bert: Path, labelled: Path, tmp_path: Path, options: tuple[object, ...], says: str
) -> None:
    result = run("train", bert, tmp_path / "out", "--task", labelled, "--finetune-steps", 0, *options)
    assert result.exit_code == 2
    assert says in result.stderr
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("density", [0, 1.2])
def test_evaluate_refuses_bad_densities(run: Run, trained_bert: Path, labelled: Path, density: float) -> None:
    result = run("evaluate", trained_bert, "--task", labelled, "--density", density)
    assert result.exit_code == 2
    assert "(0, 1]" in result.stderr


def test_evaluate_wants_a_classifier_of_the_tasks_labels(run: Run, bert: Path, labelled: Path) -> None:
    result = run("evaluate", bert, "--task", labelled)  # three labels; the task has two
    assert result.exit_code == 2
    assert "animal, tool" in result.stderr
