"""Training in two gloo processes: the losses are one process's, routers train in the soft stage and freeze after it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lte_compile.rewriting.layouts import set_layout
from lte_compile.routing.router import set_stage
from tests.integration import training_workers, workers
from tests.routed import routed

# float32 sums over two halves of a batch instead of the whole, through five steps
TOLERANCE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-5}

Runs = dict[str, list[dict[str, Any]]]  # what each process saw, by worker
Alone = dict[str, dict[str, Any]]  # what one process sees, by case


def model_to_train() -> nn.Module:
    model, _ = routed("llama", torch.float32)
    return set_stage(model.train(), "soft")


@pytest.fixture(scope="module")
def expected() -> list[float]:
    return workers.losses_in_one_process(model_to_train())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where workers write, each into a folder of its name."""
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Alone:
    """`lte_compile.train` in this process."""
    return training_workers.in_one_process(folder / "train", model_to_train())


@pytest.fixture(scope="module")
def runs(folder: Path, alone: Alone) -> Runs:
    return workers.run(folder, model_to_train())


def assert_means(runs: list[dict[str, Any]], expected: list[float]) -> None:
    mean = torch.tensor([run["losses"] for run in runs]).mean(0)
    torch.testing.assert_close(mean, torch.tensor(expected), **TOLERANCE)
    assert expected[-1] < expected[0]


def test_ddp(runs: Runs, expected: list[float]) -> None:
    assert_means(runs["ddp"], expected)
    all_of_them = 2 * 2  # layers, weight and bias
    for run in runs["ddp"]:
        assert run["with_gradients"] == [all_of_them] * workers.SOFT_STEPS + [0] * workers.HARD_STEPS
        assert run["frozen"]


def test_fsdp2(runs: Runs, expected: list[float]) -> None:
    assert_means(runs["fsdp2"], expected[: workers.SOFT_STEPS + 1])
    assert all(run["restored"] for run in runs["fsdp2"])


def test_fsdp2_of_accelerate(runs: Runs, expected: list[float]) -> None:
    assert_means(runs["accelerate"], expected)
    for run in runs["accelerate"]:
        assert run["sharded"] == ["DTensor"]
        assert run["again"] == run["losses"][workers.SOFT_STEPS :]
        assert run["frozen"]
    model = model_to_train()
    model.load_state_dict(runs["accelerate"][0]["state"], strict=True)
    with torch.no_grad():
        loss = set_stage(model, "hard")(**list(workers.batches(workers.SOFT_STEPS + 1))[-1]).loss
    torch.testing.assert_close(loss, torch.tensor(expected[workers.SOFT_STEPS]), **TOLERANCE)


def test_lte_trainer_in_ddp(runs: Runs) -> None:
    first, second = runs["lte_trainer"]
    assert first["parallel"] == 2
    assert first["stages"] == ["hard"]
    assert first["density"] is not None
    assert torch.isfinite(torch.tensor(first["loss"]))
    assert first["thresholds"] == second["thresholds"]
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))


def test_fsdp_wants_contiguous_weights_which_set_layout_gives() -> None:
    model = set_layout(model_to_train(), "neuron_major")
    down = model.get_parameter("model.layers.0.mlp.down_proj.weight")
    values = down.detach().clone()
    assert not down.is_contiguous()
    set_layout(model, "contiguous")
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    assert torch.equal(down, values)
    with pytest.raises(ValueError, match=r"layout must be neuron_major or contiguous; got 'rows'"):
        set_layout(model, "rows")


# float64 sums over shares of a batch; AdamW's steps of 3e-3 show what gradients differ by, relative to their size
EXACT: dict[str, Any] = {"rtol": 0.0, "atol": 1e-9}
CURVE: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-7}  # losses are reported in float32


def assert_same_training(run: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert run["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(run["weights"][name], weight, **EXACT, msg=name)
    for key, tolerance in (("thresholds", EXACT), ("curve", CURVE)):
        given, wanted = (torch.tensor(seen[key], dtype=torch.float64) for seen in (run, expected))
        torch.testing.assert_close(given, wanted, **tolerance)


def assert_identical(run: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert all(torch.equal(run["weights"][name], weight) for name, weight in expected["weights"].items())
    assert (run["thresholds"], run["curve"]) == (expected["thresholds"], expected["curve"])


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", ["classifier", "language model"])
def test_training_equals_one_process(runs: Runs, alone: Alone, name: str, kind: str) -> None:
    first, second = runs["train"]
    assert_same_training(first[f"{name} {kind}"], alone[name])
    assert_identical(second[f"{name} {kind}"], first[f"{name} {kind}"])


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_rows_run_at_the_densities_and_prices_that_one_process_has(runs: Runs, alone: Alone, kind: str) -> None:
    first, second = runs["train"]
    assert_same_training(first[f"many budgets {kind}"], alone["many budgets"])
    assert_identical(second[f"many budgets {kind}"], first[f"many budgets {kind}"])


def test_only_the_first_process_reports_steps(runs: Runs, alone: Alone) -> None:
    first, second = (run["classifier ddp"] for run in runs["train"])
    assert (first["steps"], second["steps"]) == (alone["classifier"]["steps"], 0)


@pytest.mark.parametrize("name", ["language model fsdp2", "with dropout ddp"])
def test_a_resumed_run_is_bit_identical(runs: Runs, name: str) -> None:
    for run in runs["train"]:
        assert len(run[f"{name} resumed"]["curve"]) == len(run[name]["curve"])
        assert_identical(run[f"{name} resumed"], run[name])


def test_processes_draw_different_random_numbers(runs: Runs, alone: Alone) -> None:
    dropout, expected = runs["train"][0]["with dropout ddp"]["curve"], alone["with dropout"]["curve"]
    assert dropout != expected


def test_runs_go_on_in_another_number_of_processes(runs: Runs, alone: Alone, folder: Path) -> None:
    expected = alone["language model"]
    assert_same_training(runs["train"][0]["language model fsdp2 after one"], expected)
    killed = folder / "train" / "language model fsdp2 killed for one"
    resumed = training_workers.trained(training_workers.CASES["language model"], model_to_train(), killed)
    assert_same_training(resumed, expected)


def test_checkpoints_are_those_of_one_process(runs: Runs, folder: Path) -> None:
    ours, theirs = (
        max((folder / "train" / name).glob("step-*")) for name in ("language model fsdp2", "language model")
    )
    assert ours.name == theirs.name
    for file in ("model.safetensors", "optimizer.safetensors"):
        tensors, expected = load_file(ours / file), load_file(theirs / file)
        assert tensors.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(tensors[key], tensor, **EXACT, msg=key)
    assert (ours / "progress.json").is_file()
    assert not list(ours.parent.glob(".*partial"))


@pytest.mark.parametrize(
    "what, says", [("own batches", "were given different batches"), ("own directories", "find different checkpoints")]
)
def test_processes_that_do_not_belong_together_say_so(runs: Runs, what: str, says: str) -> None:
    assert all(says in run[what] for run in runs["train"])
