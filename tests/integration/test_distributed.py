"""Training in two gloo processes: the losses are one process's, routers train in the soft stage and freeze after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lte_compile.layouts import set_layout
from lte_compile.routing import set_stage
from tests.integration import workers
from tests.routed import routed

# float32 sums over two halves of a batch instead of the whole, through five steps
TOLERANCE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-5}


def model_to_train() -> nn.Module:
    model, _ = routed("llama", torch.float32)
    return set_stage(model.train(), "soft")


@pytest.fixture(scope="module")
def expected() -> list[float]:
    return workers.losses_in_one_process(model_to_train())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return workers.run(tmp_path_factory.mktemp("processes"), model_to_train())


def assert_means(runs: list[dict[str, Any]], expected: list[float]) -> None:
    mean = torch.tensor([run["losses"] for run in runs]).mean(0)
    torch.testing.assert_close(mean, torch.tensor(expected), **TOLERANCE)
    assert expected[-1] < expected[0]


def test_ddp(runs: dict[str, list[dict[str, Any]]], expected: list[float]) -> None:
    assert_means(runs["ddp"], expected)
    all_of_them = 2 * 2  # layers, weight and bias
    for run in runs["ddp"]:
        assert run["with_gradients"] == [all_of_them] * workers.SOFT_STEPS + [0] * workers.HARD_STEPS
        assert run["frozen"]


def test_fsdp2(runs: dict[str, list[dict[str, Any]]], expected: list[float]) -> None:
    assert_means(runs["fsdp2"], expected[: workers.SOFT_STEPS + 1])
    assert all(run["restored"] for run in runs["fsdp2"])


def test_fsdp2_of_accelerate(runs: dict[str, list[dict[str, Any]]], expected: list[float]) -> None:
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


def test_lte_trainer_in_ddp(runs: dict[str, list[dict[str, Any]]]) -> None:
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
