"""How this process was started: alone, or by torchrun or accelerate launch as one of several."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # there are builds of torch without it
    from torch.distributed.distributed_c10d import Store

# What torchrun tells each process, and accelerate launch through it.
_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Numbers of processes as other launchers give them: Open MPI, MPICH and Intel MPI, MVAPICH, Slurm's srun.
_OTHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_UNSUPPORTED = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}
# The others wait while the first process fetches weights. The launcher itself ends all when one dies.
PATIENCE = timedelta(hours=1)
_HOW = "start with `torchrun --nproc-per-node N -m lte_compile.cli train ...` or `accelerate launch` (docs/training.md)"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One of several processes. `shard`: accelerate launch was told to use FSDP."""

    rank: int
    local_rank: int
    size: int
    shard: bool

    def store(self, name: str) -> Store:
        """Keys and values that all processes of this launch share."""
        from torch.distributed.distributed_c10d import PrefixStore

        return PrefixStore(f"lte/{name}", _store(self.rank, self.size))


def launched(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """What the launcher says of this process; None for one that runs alone.

    Raises:
        ValueError: several processes were started by something else, or in a way that is not supported.
    """
    size = _number(environment, "WORLD_SIZE")
    if size is None:
        _refuse_others(environment)
        return None
    if size == 1:
        return None
    if missing := [name for name in _TORCHRUN if not environment.get(name)]:
        raise ValueError(f"WORLD_SIZE is {size}, but {', '.join(missing)} not set; {_HOW}")
    rank, local_rank = _number(environment, "RANK"), _number(environment, "LOCAL_RANK")
    assert rank is not None
    assert local_rank is not None
    return Launch(rank=rank, local_rank=local_rank, size=size, shard=_accelerate_shards(environment))


def _refuse_others(environment: Mapping[str, str]) -> None:
    """A process that does not know of its siblings would overwrite what they write."""
    for name in _OTHERS:
        if (_number(environment, name) or 1) > 1:
            raise ValueError(f"{name} is {environment[name]}, but RANK and WORLD_SIZE are not set; {_HOW}")
    if "ACCELERATE_USE_CPU" in environment and "MASTER_ADDR" in environment:
        raise ValueError(
            "accelerate launch has started one process instead of several, as it does on CPUs; "
            "give it --multi_gpu, which works on CPUs too, or use torchrun"
        )


def _accelerate_shards(environment: Mapping[str, str]) -> bool:
    for name, what in _UNSUPPORTED.items():
        if environment.get(name, "").lower() in ("1", "true"):
            raise ValueError(f"accelerate launch was told to use {what}, which is not supported; use FSDP2 or DDP")
    if environment.get("ACCELERATE_USE_FSDP", "").lower() not in ("1", "true"):
        return False
    if environment.get("FSDP_VERSION", "1") != "2":
        raise ValueError("accelerate launch was told to use FSDP of version 1; give it --fsdp_version 2")
    return True


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    if not text:
        return None
    if not text.isdecimal():
        raise ValueError(f"the environment variable {name} must be a whole number; got {text!r}")
    return int(text)


@cache
def _store(rank: int, size: int) -> Store:
    from torch.distributed.rendezvous import rendezvous

    store: Store
    store, _, _ = next(rendezvous("env://", rank, size, timeout=PATIENCE))
    return store


class ReportedOnce(AbstractContextManager[None]):
    """Of the errors that leave this block in several processes, the first one goes on; later ones end quietly.

    Bad input is an error in all of them, and where one fails the others soon miss it: neither needs saying twice.
    """

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or not issubclass(kind, Exception):
            return
        launch = launched()
        if launch and not _is_first_failure(launch):
            raise SystemExit(1) from None


def _is_first_failure(launch: Launch) -> bool:
    try:
        return bool(launch.store("failures").add("count", 1) == 1)
    except RuntimeError:  # the process that keeps the store is gone: it has failed before
        return False
