"""Which processes a process was started with, by what its launcher put into the environment."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lte_compile.training.distributed import ALONE, device_of_process, join
from lte_compile.training.launch import Launch, ReportedOnce, launched

TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    "environment",
    [{}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": ""}, {"SLURM_STEP_NUM_TASKS": "1"}, {"ACCELERATE_USE_CPU": "True"}],
)
def test_a_process_alone(environment: dict[str, str]) -> None:
    assert launched(environment) is None


@pytest.mark.parametrize(
    "more, shard", [({}, False), (FSDP2, True), ({**FSDP2, "ACCELERATE_USE_FSDP": "false"}, False)]
)
def test_torchrun_and_accelerate(more: dict[str, str], shard: bool) -> None:
    assert launched({**TORCHRUN, **more}) == Launch(rank=3, local_rank=1, size=4, shard=shard)


@pytest.mark.parametrize(
    "environment, says",
    [
        ({"WORLD_SIZE": "4", "RANK": "0"}, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE must be a whole number"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE is 2, but RANK and WORLD_SIZE are not set; start with"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "torchrun"),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}, "give it --multi_gpu, which works on CPUs too"),
        ({**TORCHRUN, "ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({**TORCHRUN, **FSDP2, "FSDP_VERSION": "1"}, "--fsdp_version 2"),
    ],
)
def test_other_launches_are_refused(environment: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        launched(environment)


def test_one_process_has_nothing_to_join_or_to_shard_over() -> None:
    assert join(torch.device("cpu")) is ALONE
    with pytest.raises(ValueError, match="nothing to shard over"):
        join(torch.device("cpu"), shard=True)


def test_every_process_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of_process("auto", torch.device) == torch.device("cuda", 1)
    assert device_of_process("cpu", torch.device) == torch.device("cpu")
    with pytest.raises(ValueError, match="the GPU of its own rank"):
        device_of_process("cuda:0", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="process 1 of this machine has no GPU: torch sees 1"):
        device_of_process("auto", torch.device)


def test_alone_every_error_is_reported(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), ReportedOnce():
        (tmp_path / "missing").read_text()
