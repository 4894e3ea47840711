"""Training checkpoints that resume exactly: weights, optimizer, controller, random state and data position.

A checkpoint is a directory `step-00000120` of safetensors and JSON (never pickle), written under a temporary name and
then renamed: one that exists is whole. Several processes write the one that a single one would, and any number of them
can go on from it.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from lte_compile.training.distributed import ALONE, Processes

_KEEP = 2  # the newest, and the one before it in case a disk fills up while the newest is written


def save_checkpoint(
    directory: Path,
    number: int,
    model: nn.Module,
    optimizer: Optimizer,
    progress: Mapping[str, Any],
    processes: Processes = ALONE,
) -> Path:
    """Write `directory/step-<number>`. `progress` is JSON-able: where training, data and controller stand.

    All processes have to call it; the first one writes.

    Raises:
        OSError: the directory cannot be written; an older checkpoint stays as it was.
    """
    target = directory / f"step-{number:08d}"
    packed, scalars = _pack_optimizer(optimizer)
    weights, tensors = processes.gathered(_owned_state(model)), processes.gathered(packed)
    if not processes.is_first:
        return target
    partial = directory / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write_tensors(_contiguous(weights), partial / "model.safetensors")
        write_tensors(_contiguous(tensors), partial / "optimizer.safetensors")
        write_tensors(_random_state(), partial / "random.safetensors")
        record = {**progress, "optimizer": scalars, "python_random": _python_random()}
        (partial / "progress.json").write_text(json.dumps(record))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # half a checkpoint would keep a full disk full
        raise
    _take_over(partial, target)
    return target


def _take_over(partial: Path, target: Path) -> None:
    """A whole checkpoint gets its name, and the oldest ones go."""
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    for old in _checkpoints(target.parent)[:-_KEEP]:
        shutil.rmtree(old)


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """As safetensors. Raises OSError where they cannot be written."""
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest whole checkpoint below `directory`, if there is one."""
    found = _checkpoints(directory)
    return found[-1] if found else None


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Copy a checkpoint's weights into the model. A file that was cut short gives a ValueError."""
    state = _read(checkpoint / "model.safetensors")
    own = _owned_state(model)
    if set(state) != set(own):
        differing = sorted(set(state) ^ set(own))
        raise ValueError(f"{checkpoint} is of another model: {len(differing)} names differ, such as {differing[0]!r}")
    if differing := [name for name in state if state[name].shape != own[name].shape]:
        name, has, needs = differing[0], *(list(tensors[differing[0]].shape) for tensors in (state, own))
        raise ValueError(f"{checkpoint} is of another model: {name!r} is {has} there and {needs} here")
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given as progress, and the optimizer's scalars."""
    try:
        record: dict[str, Any] = json.loads((checkpoint / "progress.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{checkpoint} is damaged ({error}); delete it to resume from the one before") from error
    return record


def restore_optimizer(checkpoint: Path, optimizer: Optimizer, processes: Processes = ALONE) -> None:
    """Load moments and step counts into an optimizer built over the same parameters in the same order."""
    scalars = read_progress(checkpoint)["optimizer"]
    tensors = _read(checkpoint / "optimizer.safetensors")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *scalars["state"].items()]:
        index, _, name = key.partition(".")
        kept = processes.placed(value, parameters[int(index)]) if isinstance(value, Tensor) else value
        state.setdefault(int(index), {})[name] = kept
    optimizer.load_state_dict({"state": state, "param_groups": scalars["groups"]})


def restore_random(checkpoint: Path) -> None:
    """Put torch's, CUDA's and Python's generators back to where they were."""
    states = _read(checkpoint / "random.safetensors")
    torch.set_rng_state(states.pop("cpu"))
    for name, state in states.items():
        index = int(name.removeprefix("cuda."))
        if index < torch.cuda.device_count():  # the checkpoint may be of a machine with more GPUs
            torch.cuda.set_rng_state(state, index)
    version, internal, gauss = read_progress(checkpoint)["python_random"]
    random.setstate((version, tuple(internal), gauss))


def _checkpoints(directory: Path) -> list[Path]:
    return sorted(directory.glob("step-*")) if directory.is_dir() else []


def _read(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete its folder to resume from the one before") from error
    return tensors


def _owned_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, tied tensors once."""
    seen: set[int] = set()
    state = model.state_dict(keep_vars=True)
    return {name: t for name, t in state.items() if not (id(t) in seen or seen.add(id(t)))}  # type: ignore[func-returns-value]


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _pack_optimizer(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    packed = optimizer.state_dict()
    flat = {f"{index}.{name}": value for index, entry in packed["state"].items() for name, value in entry.items()}
    tensors = {key: value for key, value in flat.items() if isinstance(value, Tensor)}
    scalars = {key: value for key, value in flat.items() if not isinstance(value, Tensor)}
    return tensors, {"state": scalars, "groups": packed["param_groups"]}


def _random_state() -> dict[str, Tensor]:
    cuda = {f"cuda.{i}": torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())}
    return {"cpu": torch.get_rng_state(), **cuda}


def _python_random() -> list[Any]:
    version, internal, gauss = random.getstate()
    return [version, list(internal), gauss]
