"""What a training refuses before its first step, each with what to do about it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lte_compile.routing.router import require_routers, routers
from lte_compile.training.config import Phase, TrainConfig
from lte_compile.training.layer_compilation import repeated_layers
from lte_compile.training.losses import Batch

# A run may go on with others of these: how it is computed and saved, and for how long it goes on.
_FREE = ("checkpoint_every", "compile", "step_graphs", "gradient_checkpointing", "stage1_steps", "stage2_steps")


def check_request(
    model: nn.Module,
    config: TrainConfig,
    phases: Sequence[Phase],
    held_out: Sequence[Batch],
    teacher: nn.Module | None,
) -> None:
    """A ValueError for what `lte_compile.train` cannot do."""
    has_routers = any(phase.stage is not None for phase in phases)
    if has_routers:
        require_routers(model)
    if any(phase.trains_routers for phase in phases) and not held_out:
        raise ValueError("held_out is empty: the density is steered by held-out batches; pass a few")
    if has_routers and config.needs_teacher:
        _check_distillation(model, config, teacher)
    if config.gradient_checkpointing and not hasattr(model, "gradient_checkpointing_enable"):
        name = type(model).__name__
        raise ValueError(f"gradient_checkpointing is for transformers models; {name} cannot enable it, so leave it out")
    _check_weights(model, phases)


def as_held_out(batches: Iterable[Batch]) -> tuple[Batch, ...]:
    """Held-out batches, to be run again and again; a ValueError for a single one."""
    if isinstance(batches, Mapping):
        raise ValueError("held_out are several batches, in a list or a DataLoader; got one: put it into a list")
    return tuple(batches)


def _check_distillation(model: nn.Module, config: TrainConfig, teacher: nn.Module | None) -> None:
    if teacher is None:
        raise ValueError("distillation needs a teacher: pass teacher=copy.deepcopy(model) taken before transform")
    if config.layer_distillation and repeated_layers(model) == (model,):
        name = type(model).__name__
        raise ValueError(f"layer_distillation compares layers in an nn.ModuleList; {name} has none, so leave it out")


def _check_weights(model: nn.Module, phases: Sequence[Phase]) -> None:
    """Something has to train in every phase; only where routers do may all else be frozen."""
    router_ids = {id(p) for router in routers(model) for p in router.parameters()}
    if any(p.requires_grad and id(p) not in router_ids for p in model.parameters()):
        return
    if idle := [phase.name for phase in phases if phase.steps and not phase.trains_routers]:
        raise ValueError(f"nothing would train in {idle[0]}: all weights but the routers' are frozen; give it no steps")


def check_phases(checkpoint: Path, progress: Mapping[str, Any], phases: Sequence[Phase]) -> None:
    """A ValueError if the checkpoint's place is none in these phases; older checkpoints do not say."""
    index, done = progress["phase"], progress["step"]
    before, now = [tuple(phase) for phase in progress.get("phases", [])], [(p.name, p.steps) for p in phases]
    is_there = index < len(now) and now[:index] == before[:index] and now[index][0] == before[index][0]
    if before and not (is_there and done <= now[index][1]):
        listed, name = ", ".join(f"{name} of {steps} steps" for name, steps in before), before[index][0]
        raise ValueError(
            f"{checkpoint} is at step {done} of {name} in a run of {listed}; give phases that are the same up to "
            "there, or another directory"
        )


def check_config(checkpoint: Path, recorded: Mapping[str, Any], config: TrainConfig) -> None:
    """A ValueError if the checkpoint is of a run with other settings; older checkpoints do not say."""
    now = json.loads(json.dumps(config.to_dict()))
    differing = [name for name in now if name in recorded and name not in _FREE and recorded[name] != now[name]]
    if differing:
        changes = ", ".join(f"{name} was {recorded[name]!r}, now {now[name]!r}" for name in differing)
        raise ValueError(f"{checkpoint} is of another run ({changes}); give another directory, or delete it")
