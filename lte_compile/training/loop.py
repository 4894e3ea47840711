"""The training loop: phases of steps, a controller that holds the density, checkpoints that resume exactly.

    teacher = copy.deepcopy(model)                       # optional, for distillation
    lte.transform(model, ...)
    train(model, batches, config, held_out=[...], teacher=teacher, directory=Path("runs/x"))

`train` on a directory that holds a checkpoint goes on from it; the result equals that of an uninterrupted run. Started
by torchrun or accelerate launch, all processes call it with the same arguments and train one model together.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lte_compile.calibration.density import calibrate, set_density
from lte_compile.calibration.effects import fit_to
from lte_compile.config import Stage
from lte_compile.data.epochs import Batches, endless
from lte_compile.rewriting.layouts import set_layout
from lte_compile.routing.router import routers, set_stage
from lte_compile.running.labels import are_next_tokens, without_labels
from lte_compile.running.modes import dropout_of, eval_mode
from lte_compile.training.budgets import Budgets, budgets_of, lower_logits, lowering_ends
from lte_compile.training.checkpointing import (
    latest_checkpoint,
    load_weights,
    read_progress,
    restore_optimizer,
    restore_random,
    save_checkpoint,
)
from lte_compile.training.checks import as_held_out, check_config, check_phases, check_request
from lte_compile.training.config import Phase, TrainConfig, lte_phases
from lte_compile.training.controller import DensityController, controller_of
from lte_compile.training.distributed import Processes, Replica, join, require_plain
from lte_compile.training.layer_compilation import Accelerated
from lte_compile.training.losses import Batch, LossWeights, MicroBatch, micro_batches, weighted_loss
from lte_compile.training.rows import Rows
from lte_compile.training.steering import HeldOut
from lte_compile.training.step_graphs import StepGraph

# Batches the routers are fitted on: with 32 questions of about 12 tokens this is 12,000 tokens, thirty per input
# component of the smallest model measured here.
FIT_BATCHES = 32
# Enough where batches are large: a hundred tokens per input component of a model of width 576.
PEEKED_TOKENS = 65_536
# How much rarer densities are measured where nothing is steered: a measurement costs as much as a few steps.
_REST = 5
# Devices on which torch's AdamW has a fused implementation.
_FUSED_DEVICES = frozenset({"cpu", "cuda", "mps", "xpu"})


@dataclass(frozen=True, kw_only=True)
class StepEvent:
    """One finished step: `density` is the latest held-out measurement (None before the first).

    `eta` is the price of the step; of a range of densities, whose price moves in every step, that of the measurement.
    """

    phase: str
    step: int
    steps: int
    loss: float
    density: float | None
    eta: float


OnStep = Callable[[StepEvent], None]


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What every phase of one training run shares."""

    model: nn.Module
    batches: Batches
    config: TrainConfig
    held_out: Sequence[Batch]
    teacher: nn.Module | None
    directory: Path | None
    controller: DensityController
    budgets: Budgets | None
    events: list[StepEvent]
    on_step: OnStep
    processes: Processes

    @property
    def steering(self) -> HeldOut:
        return HeldOut(batches=self.held_out, processes=self.processes, autocast=self.config.autocast)

    def draws_budgets(self, phase: Phase) -> bool:
        """Whether rows have densities of their own: where routers are LTE's and held-out batches tell the densities."""
        return self.budgets is not None and phase.stage is not None and bool(self.held_out)


def train(
    model: nn.Module,
    batches: Batches | Iterable[Batch],
    config: TrainConfig,
    *,
    held_out: Iterable[Batch] = (),
    teacher: nn.Module | None = None,
    directory: Path | None = None,
    phases: Sequence[Phase] | None = None,
    on_step: OnStep = lambda event: None,
    shard: bool | None = None,
) -> tuple[StepEvent, ...]:
    """Train in place through `phases` (by default LTE's two stages); returns every step's event.

    Args:
        model: takes batches as keyword arguments and returns `.loss` and `.logits`, as transformers models do.
        batches: a list or DataLoader of mappings, gone through again and again, or what saves its own position
            (lte_compile.data.batches).
        held_out: batches the density is measured on, in eval mode; needed by phases that train routers.
        teacher: a dense model for `config.distillation`.
        directory: where checkpoints go; one that is there already is resumed.
        on_step: called after every step, in the first process.
        shard: with several processes, FSDP2 instead of DistributedDataParallel; None does as `accelerate launch` was
            told. Every process passes whole batches and computes its share of each.

    Raises:
        ValueError: batches cannot be gone through again, held-out data or a teacher is missing, the model is not
            transformed or has nothing to train, a checkpoint is damaged, of another model or another run, or processes
            were given different batches.
        FloatingPointError: the loss became NaN or infinite; the newest checkpoint is intact.
    """
    phases = tuple(lte_phases(config) if phases is None else phases)
    batches, held_out = endless(batches, config.seed), as_held_out(held_out)
    check_request(model, config, phases, held_out, teacher)
    processes = join(next(model.parameters()).device, shard=shard)
    run = _Run(
        model=model,
        batches=batches,
        config=config,
        held_out=held_out,
        teacher=teacher,
        directory=directory,
        controller=controller_of(config),
        budgets=budgets_of(config),
        events=[],
        on_step=on_step if processes.is_first else lambda event: None,
        processes=processes,
    )
    with dropout_of(model, config.dropout), eval_mode(teacher) if teacher else nullcontext():
        _run_phases(run, phases)
    if any(phase.trains_routers for phase in phases):
        calibrate(model, held_out, densities=run.budgets.nodes if run.budgets else ())
        processes.agree(model)
    if phases and phases[-1].stage is Stage.HARD:
        set_layout(model, "neuron_major")
    return tuple(run.events)


def _run_phases(run: _Run, phases: Sequence[Phase]) -> None:
    """From the newest checkpoint on, if there is one."""
    checkpoint = latest_checkpoint(run.directory) if run.directory else None
    first_phase, first_step = _resume(run, phases, checkpoint) if checkpoint else (0, 0)
    _start_together(run, checkpoint)
    if not checkpoint:
        torch.manual_seed(run.config.seed)
        run.processes.reseed(run.config.seed, 0)
    for index in range(first_phase, len(phases)):
        resumed = checkpoint if index == first_phase else None
        _run_phase(run, phases, index, first_step if index == first_phase else 0, resumed)


def _start_together(run: _Run, checkpoint: Path | None) -> None:
    """Processes start from the first one's weights; a ValueError where their data or checkpoints differ."""
    if run.processes.size == 1:
        return
    require_plain(run.model)
    if not run.processes.are_equal(crc32(checkpoint.name.encode()) if checkpoint else 0):
        raise ValueError(f"processes find different checkpoints in {run.directory}; it must be one that all share")
    [batch] = peek_batches(run.model, run.batches, 1)
    content = b"".join(value.cpu().flatten().view(torch.uint8).numpy().tobytes() for value in batch.values())
    if not run.processes.are_equal(crc32(content)):
        raise ValueError("processes were given different batches; give all the same, each takes its share of every one")
    run.processes.agree(run.model)
    if run.teacher is not None:
        run.processes.agree(run.teacher)


def _run_phase(run: _Run, phases: Sequence[Phase], index: int, first_step: int, checkpoint: Path | None) -> None:
    phase, processes = phases[index], run.processes
    _enter(run, phase, fresh=first_step == 0)
    number = sum(earlier.steps for earlier in phases[:index])
    with processes.hosting(run.model) as replica:
        optimizer = build_optimizer(replica.model, run.config)
        if checkpoint and first_step:
            restore_optimizer(checkpoint, optimizer, processes)
        if checkpoint:
            restore_random(checkpoint)
            processes.reseed(run.config.seed, number + first_step)
        accelerated = Accelerated(replica.model, run.teacher, enabled=run.config.compile, coarse=run.config.autocast)
        graph = _step_graph(run, replica)
        unread: list[tuple[int, Tensor]] = []
        for step in range(first_step, phase.steps):
            _set_rates(optimizer, run.config, step, phase.steps)
            unread.append((step, _step(run, phase, replica, accelerated, graph, optimizer, step)))
            done = step + 1
            every = run.config.checkpoint_every
            saves = every and ((number + done) % every == 0 or done == phase.steps)
            # On a GPU a loss is read while the next step runs, unless something waits for it.
            at_once = unread[-1][1].device.type == "cpu" or saves or _measures(run, phase, step) or done == phase.steps
            while len(unread) > (0 if at_once else 1):
                _report(run, phase, replica.model, *unread.pop(0))
            if saves and run.directory:
                progress = _progress(run, phases, index, done)
                save_checkpoint(run.directory, number + done, replica.model, optimizer, progress, processes)
                processes.reseed(run.config.seed, number + done)
        if graph is not None:
            graph.release()


def _enter(run: _Run, phase: Phase, *, fresh: bool) -> None:
    """Put the model into the phase's stage; on a fresh start also fit routers, or place the threshold they ended at."""
    model, config = run.model, run.config
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    if phase.stage is None:
        model.train()
        return
    if fresh and phase.trains_routers and config.fit_router:
        seen = peek_batches(model, run.batches, FIT_BATCHES)
        fit_to(config.fit_target, model, seen, config.density_after(0.0))
    steered = config.is_steered and phase.selection is None and bool(run.held_out)
    if fresh and phase.stage is Stage.HARD and steered:
        calibrate(model, run.held_out)
        set_density(model, config.target_density)
    if fresh:
        run.processes.agree(model)
    set_stage(model, phase.stage, selection=phase.selection)
    if fresh and run.budgets and run.draws_budgets(phase):
        run.steering.follow_all(model, run.budgets)
    model.train()


def peek_batches(model: nn.Module, batches: Batches, count: int) -> list[Batch]:
    """The next batches, without moving on: `count`, or fewer that hold PEEKED_TOKENS together.

    Labels are left out, if the model does not read them (`without_labels`): routers are fitted to inputs.
    """
    position, seen, tokens = batches.state_dict(), list[Batch](), 0
    while len(seen) < count and tokens < PEEKED_TOKENS:
        seen.append(without_labels(model, batches.next_batch()))
        tokens += next(iter(seen[-1].values())).shape[:2].numel()
    batches.load_state_dict(position)
    return seen


def build_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """AdamW with the routers in a group of their own; frozen parameters are left out."""
    router_ids = {id(p) for router in routers(model) for p in router.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in trained if id(p) not in router_ids],
            "lr": config.learning_rate,
            "weight_decay": config.weight_decay,
        },
        {
            "params": [p for p in trained if id(p) in router_ids],
            "lr": config.router_learning_rate,
            "weight_decay": config.router_weight_decay,
        },
    ]
    kept = [{**group, "peak": group["lr"]} for group in groups if group["params"]]
    # One fused loop over all parameters: on two CPU cores it takes a MiniLM step from 0.42 s to 0.24 s.
    fused = all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in trained)
    return AdamW(kept, betas=(0.9, 0.999), fused=fused)


def _set_rates(optimizer: Optimizer, config: TrainConfig, step: int, steps: int) -> None:
    rising = max(round(config.warmup * steps), 1)
    share = min((step + 1) / rising, (steps - step) / max(steps - rising, 1))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


def _step_graph(run: _Run, replica: Replica) -> StepGraph | None:
    """Where a step is one backward pass of one process on a CUDA device."""
    is_one = run.processes.size == 1 and run.config.accumulation == 1
    if not run.config.records_steps or not is_one or next(replica.model.parameters()).device.type != "cuda":
        return None
    return StepGraph(replica.model, lambda part, weights: _objective(run, replica.model, part, weights))


def _objective(run: _Run, model: nn.Module, part: MicroBatch, weights: LossWeights) -> Tensor:
    device = next(model.parameters()).device
    # Until the step is over: its backward pass may run layers again.
    lower_logits(model, part.rows.shift_B if part.rows else None)
    with torch.autocast(device.type, torch.bfloat16, enabled=run.config.autocast):
        return weighted_loss(model, part, weights, run.teacher)


def _step(
    run: _Run,
    phase: Phase,
    replica: Replica,
    accelerated: Accelerated,
    graph: StepGraph | None,
    optimizer: Optimizer,
    step: int,
) -> Tensor:
    """One optimizer step; returns its loss, on the device."""
    config, processes, model = run.config, run.processes, replica.model
    weights = _loss_weights(run, phase, step)
    total, ran_at = torch.zeros((), device=next(model.parameters()).device), list[Rows]()
    # Cut where the batch is, usually the host: counting its tokens on a GPU would wait for all that runs there.
    batch = run.batches.next_batch()
    rows = _drawn_rows(run, phase, batch, step)
    rank, size = processes.rank, processes.size
    shifted = "labels" in batch and are_next_tokens(run.model, batch["labels"])
    parts = list(micro_batches(batch, config.accumulation, rank=rank, processes=size, rows=rows, shifted=shifted))
    with accelerated.step(_fixed_shape(parts)), lowering_ends(model):
        for number, part in enumerate(parts, start=1):
            moved = part.moved_to(model)
            ran_at += [moved.rows] if moved.rows else []
            if graph is not None:
                total += graph.backward(moved, weights)
                continue
            is_last = number == len(parts)
            total += replica.backward(moved, lambda m, p: _objective(run, m, p, weights), is_last=is_last)
    total = processes.total(total)
    run.controller.observe(ran_at, processes.total)
    nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def _drawn_rows(run: _Run, phase: Phase, batch: Batch, step: int) -> Rows | None:
    """What each row runs at, on the host; None where all run at one density."""
    if run.budgets is None or not run.draws_budgets(phase):
        return None
    rows, share = len(next(iter(batch.values()))), (step + 1) / phase.steps if phase.trains_routers else 1.0
    lowest = run.config.lowest_after(share)
    return run.budgets.rows_of(rows, seed=run.config.seed, step=f"{phase.name}/{step}", lowest=lowest)


def _fixed_shape(parts: Sequence[MicroBatch]) -> Hashable:
    """Of all inputs; None where what is computed depends on where padding is."""
    if not all(part.is_unpadded for part in parts):
        return None
    return tuple((name, value.shape) for part in parts for name, value in part.inputs.items())


def _loss_weights(run: _Run, phase: Phase, step: int) -> LossWeights:
    distillation = run.config.distillation if run.teacher is not None else 0.0
    layers = run.config.layer_distillation if run.teacher is not None else 0.0
    if not phase.trains_routers:
        return LossWeights(distillation=distillation, layers=layers, temperature=run.config.temperature)
    ramp = (step + 1) / phase.steps
    separability = run.config.separability * ramp
    return LossWeights(
        efficiency=run.controller.price if run.draws_budgets(phase) else run.controller.eta,
        separability=separability,
        distillation=distillation,
        layers=layers,
        temperature=run.config.temperature,
        watched=run.config.records_steps,
    )


def _report(run: _Run, phase: Phase, model: nn.Module, step: int, total: Tensor) -> None:
    loss = float(total)
    if not isfinite(loss):
        raise FloatingPointError(f"the loss became {loss} in {phase.name}, step {step + 1}; lower the rates")
    if _measures(run, phase, step):
        if phase.trains_routers:
            run.controller.target = run.config.density_after((step + 1) / phase.steps)
        density = _measure(run, phase, model, step)
        run.controller.latest = density
        if phase.trains_routers:
            run.controller.measure(density)
    event = StepEvent(
        phase=phase.name,
        step=step + 1,
        steps=phase.steps,
        loss=loss,
        density=run.controller.latest if phase.stage is not None else None,
        eta=run.controller.eta if phase.trains_routers else 0.0,
    )
    run.events.append(event)
    run.on_step(event)


def _measure(run: _Run, phase: Phase, model: nn.Module, step: int) -> float:
    """The held-out density; then it is held, and rows' shifts follow, where that was asked for."""
    held = run.controller.target if phase.trains_routers and run.config.holds else None
    if run.budgets and run.draws_budgets(phase):
        return run.steering.follow(model, run.budgets, (step + 1) // _interval(run, phase), target=held)
    return run.steering.density(model) if held is None else run.steering.hold(model, held)


def _measures(run: _Run, phase: Phase, step: int) -> bool:
    if phase.stage is None or not run.held_out:
        return False
    return (step + 1) % _interval(run, phase) == 0 or step + 1 == phase.steps


def _interval(run: _Run, phase: Phase) -> int:
    """Steps between measurements: few while routers train, to steer; many in stage 2, to show."""
    return run.config.measure_every * (1 if phase.trains_routers else _REST)


def _progress(run: _Run, phases: Sequence[Phase], phase: int, step: int) -> dict[str, Any]:
    return {
        "phases": [[phase.name, phase.steps] for phase in phases],
        "phase": phase,
        "step": step,
        "config": run.config.to_dict(),
        "batches": dict(run.batches.state_dict()),
        "controller": run.controller.state_dict(),
        "budgets": [run.budgets.seen, run.budgets.corrections] if run.budgets else [],
        "thresholds": [router.threshold for router in routers(run.model)],
        "quantiles": [router.score_quantiles for router in routers(run.model)],
        "events": [asdict(event) for event in run.events],
    }


def _resume(run: _Run, phases: Sequence[Phase], checkpoint: Path) -> tuple[int, int]:
    """Restore everything but optimizer and random state; returns the phase and step to go on with."""
    progress = read_progress(checkpoint)
    check_config(checkpoint, progress.get("config", {}), run.config)
    check_phases(checkpoint, progress, phases)
    load_weights(checkpoint, run.model)
    run.batches.load_state_dict(progress["batches"])
    run.controller.load_state_dict(progress["controller"])
    if run.budgets and progress.get("budgets"):
        run.budgets.seen[:], run.budgets.corrections[:] = progress["budgets"]
    for router, threshold, quantiles in zip(
        routers(run.model), progress["thresholds"], progress["quantiles"], strict=True
    ):
        router.threshold, router.score_quantiles = threshold, tuple(quantiles)
    run.events.extend(StepEvent(**event) for event in progress["events"])
    return progress["phase"], progress["step"]
