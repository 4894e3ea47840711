"""Training in several processes: DistributedDataParallel or FSDP2, started by torchrun or accelerate launch.

    processes = join(device)                       # or just this process
    with processes.hosting(model) as replica:      # for one phase of training
        loss = replica.backward(part, objective, is_last=True)

Every process runs the same program over the same batches and takes its share of the rows of each; losses weigh as in
the whole batch, so that gradients add up to those of one process. What is fitted or calibrated is so in every process,
and the first one's result counts.
"""

from __future__ import annotations

import atexit
import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lte_compile.routing.router import routers
from lte_compile.training.launch import PATIENCE, Launch, launched
from lte_compile.training.losses import MicroBatch

Objective = Callable[[nn.Module, MicroBatch], Tensor]


class Replica:
    """A model as it is trained during a phase: `model` is what optimizer, evaluation and checkpoints see."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def backward(self, part: MicroBatch, objective: Objective, *, is_last: bool) -> Tensor:
        """This process's part of the loss, after its backward pass; `is_last`: the optimizer's step comes next."""
        loss = objective(self.model, part)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process and those it shares every batch with. Alone, as here, nothing has to be done for that."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    @contextmanager
    def hosting(self, model: nn.Module) -> Iterator[Replica]:
        """The model, to be trained inside the block; at its end `model` has the trained weights."""
        yield Replica(model)

    def wait(self) -> None:
        """Until all processes are here."""

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """The first process runs the block before the others do: it fetches what they then find."""
        yield

    def total(self, value: Tensor) -> Tensor:
        """The sum over all processes, of a tensor without gradient."""
        return value

    def are_equal(self, value: int) -> bool:
        """Whether all processes gave the same 32-bit value."""
        return True

    def agree(self, model: nn.Module) -> None:
        """Weights, buffers and thresholds become the first process's."""

    def reseed(self, seed: int, step: int) -> None:
        """Give every process but the first random numbers of its own, that follow from seed, step and rank alone.

        Dropout then differs between processes, and a run that is resumed at `step` draws what it would have drawn.
        """

    def gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole tensors, in the first process; in others nothing."""
        return dict(tensors)

    def placed(self, value: Tensor, like: Tensor) -> Tensor:
        """What this process keeps of a whole tensor that belongs to the parameter `like`."""
        return value


@dataclass(frozen=True, kw_only=True)
class Replicas(Processes):
    """Every process has the whole model; DistributedDataParallel adds up gradients."""

    device: torch.device

    @contextmanager
    def hosting(self, model: nn.Module) -> Iterator[Replica]:
        yield _DataParallel(model)

    def wait(self) -> None:
        float(self.total(torch.zeros(())))  # on a GPU, only reading the sum waits for it

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    def total(self, value: Tensor) -> Tensor:
        summed = value.to(self.device, copy=True)
        dist.all_reduce(summed)
        return summed

    def are_equal(self, value: int) -> bool:
        given = torch.tensor([value, -value], device=self.device)
        dist.all_reduce(given, dist.ReduceOp.MAX)
        highest, negated_lowest = given.tolist()
        return bool(highest == -negated_lowest)

    @torch.no_grad()
    def agree(self, model: nn.Module) -> None:
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(self._broadcast(tensor))
        for router in routers(model):
            settings = torch.tensor([router.threshold, *router.score_quantiles], dtype=torch.float64)
            router.threshold, *quantiles = self._broadcast(settings).tolist()
            router.score_quantiles = tuple(quantiles)

    def reseed(self, seed: int, step: int) -> None:
        if not self.is_first:
            torch.manual_seed(random.Random(f"{seed}/{step}/{self.rank}").getrandbits(63))

    def gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(tensors) if self.is_first else {}

    def _broadcast(self, value: Tensor) -> Tensor:
        sent = value.detach().to(self.device).clone(memory_format=torch.contiguous_format)
        dist.broadcast(sent, src=0)
        return sent


class _DataParallel(Replica):
    """The objective is what DistributedDataParallel wraps: it has to see all that gradients come from."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        # Routers have no gradients in dense stages, and models may have parts that a task does not use.
        self._parallel = DistributedDataParallel(_Objective(model), find_unused_parameters=True)
        self._parallel.register_comm_hook(None, lambda _, bucket: _add_up(bucket.buffer()))

    def backward(self, part: MicroBatch, objective: Objective, *, is_last: bool) -> Tensor:
        with nullcontext() if is_last else self._parallel.no_sync():
            loss: Tensor = self._parallel(objective, part)
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


def _add_up(gradients: Tensor) -> torch.futures.Future[Tensor]:
    """Sums where DistributedDataParallel alone would average: losses are shares of the batch's.

    Scaling the loss instead is rounded inside the model, unless there are 2, 4 or 8 processes.
    """
    work: Any = dist.all_reduce(gradients, async_op=True)
    added: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return added


class _Objective(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # DistributedDataParallel told to look for unused parameters warns, in every process, when it finds none.
        self.unused = nn.Parameter(next(model.parameters()).detach().new_zeros(1))

    def forward(self, objective: Objective, part: MicroBatch) -> Tensor:
        return objective(self.model, part)


@dataclass(frozen=True, kw_only=True)
class Shards(Replicas):
    """Weights, gradients and the optimizer's state are spread over all processes by FSDP2 while a phase trains."""

    @contextmanager
    def hosting(self, model: nn.Module) -> Iterator[Replica]:
        from lte_compile.training.sharding import shard, whole

        home = next(model.parameters()).device
        # Layers go to the device one by one, sharded; the whole model waits in the host's memory.
        sharded = shard(deepcopy(model.cpu()), self.device, self.size)
        yield Replica(sharded)
        trained = sharded.state_dict()
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(whole(trained[name]))
        model.to(home)

    def gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from lte_compile.training.sharding import whole

        kept: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            full = whole(tensor)  # of all processes, one tensor at a time
            if self.is_first:
                kept[name] = full.cpu()
        return kept

    def placed(self, value: Tensor, like: Tensor) -> Tensor:
        from lte_compile.training.sharding import sharded_like

        return sharded_like(value, like)


ALONE = Processes()


def join(device: torch.device, *, shard: bool | None = None) -> Processes:
    """The processes that this one was launched with, joined over nccl on GPUs and gloo on CPUs; alone: itself.

    Args:
        device: where this process computes: with GPUs, one of its own.
        shard: FSDP2 instead of DistributedDataParallel; None does as `accelerate launch` was told.

    Raises:
        ValueError: a launcher that is not known, or nothing to shard over.
    """
    launch = launched()
    rank, size = (launch.rank, launch.size) if launch else (0, 1)
    if dist.is_available() and dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
    elif launch:
        _initialise(launch, device)
    if size == 1:
        if shard:
            raise ValueError("there is nothing to shard over in one process; start several with torchrun")
        return ALONE
    kind = Shards if (launch is not None and launch.shard if shard is None else shard) else Replicas
    return kind(rank=rank, size=size, device=device)


def _initialise(launch: Launch, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Told to shard, transformers would load weights in the first process only; here all of them transform and measure.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=launch.store("training"),
        rank=launch.rank,
        world_size=launch.size,
        timeout=PATIENCE,
    )
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def require_plain(model: nn.Module) -> None:
    """A ValueError for a model that is wrapped or sharded already."""
    if isinstance(model, DistributedDataParallel) or any(hasattr(p, "full_tensor") for p in model.parameters()):
        raise ValueError("this model is distributed already; pass the model itself, it is distributed for training")


def device_of_process(name: str, otherwise: Callable[[str], torch.device]) -> torch.device:
    """The device for a --device option: under a launcher one GPU for each process of a machine.

    Args:
        otherwise: finds the device of a process that is alone, or not on a GPU.

    Raises:
        ValueError: a GPU by its number, or fewer GPUs than processes.
    """
    launch = launched()
    if launch is None or name == "cpu" or not torch.cuda.is_available():
        return otherwise(name)
    if name not in ("auto", "cuda"):
        raise ValueError(f"every process takes the GPU of its own rank; give --device auto or cpu, not {name!r}")
    if launch.local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"process {launch.local_rank} of this machine has no GPU: torch sees {torch.cuda.device_count()}; "
            "start one process per GPU, or give --device cpu"
        )
    return torch.device("cuda", launch.local_rank)
