"""What the processes of distributed tests run.

A batch has as many tokens in each half, none of them padding: the mean of two halves' losses is the batch's loss.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from lte_compile.routing.router import routers, set_stage
from lte_compile.running.tracing import trace_routers
from tests.integration.training_workers import in_processes

WORLD = 2
SOFT_STEPS, HARD_STEPS = 3, 2
ETA, LAMBDA = 0.3, 0.01


def run(folder: Path, model: nn.Module) -> dict[str, list[dict[str, Any]]]:
    """All workers, one after the other, in two processes joined by gloo; what each process saved, by worker.

    One pair of processes for all, because starting one takes longer than its work.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(_start, args=(port, folder, model), nprocs=WORLD)  # type: ignore[no-untyped-call]
    return {name: [torch.load(folder / name / f"{r}.pt", weights_only=True) for r in range(WORLD)] for name in WORKERS}


def _start(rank: int, port: int, folder: Path, model: nn.Module) -> None:
    torch.set_num_threads(1)
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), **rendezvous)
    dist.init_process_group("gloo")
    for name, worker in WORKERS.items():
        (folder / name).mkdir(exist_ok=True)
        seen = worker(rank, folder / name, deepcopy(model))  # what is passed to a process lies in memory all share
        torch.save(seen, folder / name / f"{rank}.pt")
    dist.barrier()  # no one leaves while another still talks to it
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads, if one is left, abort a process that ends in the usual way


def batches(count: int) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        ids = torch.randint(3, 96, (2 * WORLD, 10), generator=generator)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def half(batch: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    return {name: value.chunk(WORLD)[rank] for name, value in batch.items()}


def optimizer_of(model: nn.Module) -> SGD:
    """Not Adam: where gradients are zero but for rounding, it makes steps of full size out of the rounding."""
    return SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    if next(routers(model)).stage != "soft":
        hard: Tensor = model(**batch).loss
        return hard
    with trace_routers(model) as trace:
        task = model(**batch).loss
    loss: Tensor = task + ETA * trace.efficiency_loss() + LAMBDA * trace.separability_loss()
    return loss


def take_step(
    model: Any, optimizer: Any, batch: dict[str, Tensor], backward: Callable[[Tensor], Any] = Tensor.backward
) -> float:
    loss = loss_of(model, batch)
    backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def losses_in_one_process(model: nn.Module) -> list[float]:
    """Three steps in the soft stage, two in the hard one."""
    model = deepcopy(model)
    optimizer = optimizer_of(model)
    losses = []
    for number, batch in enumerate(batches(SOFT_STEPS + HARD_STEPS)):
        if number == SOFT_STEPS:
            set_stage(model, "hard")
        losses.append(take_step(model, optimizer, batch))
    return losses


def ddp(rank: int, folder: Path, model: nn.Module) -> dict[str, Any]:
    """DistributedDataParallel, wrapped again when routers freeze: it waits for gradients of what trained before."""
    wrapped = DistributedDataParallel(model)
    optimizer = optimizer_of(model)
    losses, with_gradients, before = [], [], []
    for number, batch in enumerate(batches(SOFT_STEPS + HARD_STEPS)):
        if number == SOFT_STEPS:
            before = router_weights(model)
            wrapped = DistributedDataParallel(set_stage(model, "hard"))
        loss = loss_of(wrapped, half(batch, rank))
        loss.backward()  # type: ignore[no-untyped-call]
        with_gradients.append(sum(p.grad is not None for router in routers(model) for p in router.parameters()))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return {"losses": losses, "with_gradients": with_gradients, "frozen": unchanged(before, model)}


def router_weights(model: nn.Module) -> list[Tensor]:
    return [_whole(parameter).detach().clone() for router in routers(model) for parameter in router.parameters()]


def unchanged(before: list[Tensor], model: nn.Module) -> bool:
    return all(torch.equal(old, new) for old, new in zip(before, router_weights(model), strict=True))


def _whole(parameter: Any) -> Tensor:
    whole: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return whole


def fsdp2(rank: int, folder: Path, model: Any) -> dict[str, Any]:
    """torch's own: every layer sharded, then the rest. A checkpoint is read back, and its steps are made again."""
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = optimizer_of(model)
    losses = [take_step(model, optimizer, half(batch, rank)) for batch in batches(SOFT_STEPS)]
    state_dict_saver.save(get_model_state_dict(model), checkpoint_id=folder / "dcp")
    at_checkpoint = router_weights(model)
    take_step(model, optimizer, half(next(batches(1)), rank))
    state = get_model_state_dict(model)
    state_dict_loader.load(state, checkpoint_id=folder / "dcp")
    set_model_state_dict(model, state)
    restored = unchanged(at_checkpoint, model)
    set_stage(model, "hard")
    rest = list(batches(SOFT_STEPS + HARD_STEPS))[SOFT_STEPS:]
    losses.append(float(loss_of(model, half(rest[0], rank)).detach()))
    return {"losses": losses, "restored": restored}


def fsdp2_of_accelerate(rank: int, folder: Path, model: nn.Module) -> dict[str, Any]:
    """Soft steps, a checkpoint, hard steps, and those again from the checkpoint."""
    accelerator = _accelerator("LlamaDecoderLayer")
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    sharded = {type(parameter.data).__name__ for parameter in model.parameters()}
    losses = [take_step(model, optimizer, half(batch, rank), accelerator.backward) for batch in batches(SOFT_STEPS)]
    accelerator.save_state(str(folder / "checkpoint"))
    rest = list(batches(SOFT_STEPS + HARD_STEPS))[SOFT_STEPS:]
    runs, frozen = [], True
    for _ in range(2):
        before = router_weights(set_stage(model, "hard"))
        runs.append([take_step(model, optimizer, half(batch, rank), accelerator.backward) for batch in rest])
        frozen = frozen and unchanged(before, model)
        accelerator.load_state(str(folder / "checkpoint"))
    state = accelerator.get_state_dict(model)
    seen = {"losses": losses + runs[0], "again": runs[1], "frozen": frozen, "sharded": sorted(sharded)}
    return {**seen, "state": state if rank == 0 else {}}


def lte_trainer(rank: int, folder: Path, model: nn.Module) -> dict[str, Any]:
    """LteTrainer in DistributedDataParallel, with checkpointing, through the change of stage."""
    from transformers import TrainingArguments

    from lte_compile.huggingface.trainer import LteTrainer
    from lte_compile.training.config import TrainConfig

    arguments = TrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_checkpointing=True,
        learning_rate=1e-3,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    every = list(batches(4))
    examples = [{name: rows[i] for name, rows in batch.items()} for batch in every for i in range(2 * WORLD)]
    lte = TrainConfig(target_density=0.5, stage1_steps=1, stage2_steps=1, measure_every=1)
    trainer = LteTrainer(model=model, args=arguments, train_dataset=examples, lte=lte, held_out=every[:1])
    result = trainer.train()
    return {
        "loss": result.training_loss,
        "parallel": trainer.args.world_size,
        "stages": sorted({router.stage.value for router in routers(model)}),
        "thresholds": [router.threshold for router in routers(model)],
        "weights": router_weights(model),
        "density": trainer.controller.latest,
    }


def _accelerator(layer: str) -> Any:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[layer],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # accelerate chooses FSDP for accelerators only and takes DDP on CPUs; what it runs then works on CPUs too.
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator


WORKERS: dict[str, Callable[[int, Path, nn.Module], dict[str, Any]]] = {
    "ddp": ddp,
    "fsdp2": fsdp2,
    "lte_trainer": lte_trainer,
    "train": in_processes,
    "accelerate": fsdp2_of_accelerate,  # last: accelerate's state is the process's
}
