"""Saving and loading transformed models: safetensors and JSON only, no code and no pickles.

A transformers model becomes an ordinary checkpoint whose config.json carries the plan
(lte_compile.huggingface.plugin). Any other module becomes model.safetensors and lte_plan.json. Saving writes everything
under a temporary name first and then renames; a save that is interrupted leaves a directory that refuses to load rather
than one that loads a mixture.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import nn

from lte_compile.huggingface.registration import is_transformers_model, register_with_transformers, remember_plan
from lte_compile.rewriting.plan import finish_restoring, parse_plan, plan_of, restore_routers

PLAN_FILE = "lte_plan.json"
CONFIG_FILE = "config.json"
_WEIGHTS = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MARKERS = (CONFIG_FILE, PLAN_FILE)  # without one of these a directory cannot be loaded


class Tokenizer(Protocol):
    """Anything with transformers' save_pretrained: a tokenizer, a processor."""

    def save_pretrained(self, save_directory: str) -> Any: ...


def save_pretrained(model: nn.Module, directory: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Save a transformed model, its plan, thresholds and stage. Other files in `directory` are kept.

    Args:
        tokenizer: saved beside a model, if given.

    Raises:
        ValueError: the model has no routers, another method has quantized it, or the directory cannot be written;
            all of them before anything is written.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    plan = plan_of(model)
    directory = Path(directory)
    with staging(directory) as staged:
        if is_transformers_model(model):
            _save_transformers(model, staged)
        else:
            save_model(model, str(staged / _WEIGHTS), metadata={"format": "pt"})
            (staged / PLAN_FILE).write_text(json.dumps(plan, indent=1, allow_nan=False), encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(str(staged))
        move_into_place(staged, directory)


def load_pretrained(
    directory: str | Path,
    *,
    model: nn.Module | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Load what `save_pretrained` wrote, in the stage it was saved in; transformers models come in eval mode.

    Args:
        model: for modules that are not from transformers: a dense instance of the same architecture, which is
            transformed and filled in place, and returned. After an error it is of no further use.
        dtype: of the parameters. By default a transformers model's as saved, another module's as `model` has it.
        device: where to put the model. By default the CPU, or where `model` is.

    Raises:
        ValueError: no checkpoint, one that is incomplete, corrupt, pickled, or from a newer version, or a `model` that
            does not match it.
    """
    directory = Path(directory)
    _check_files(directory)
    if (directory / PLAN_FILE).exists():
        loaded = _load_module(directory, model, dtype)
    elif model is None:
        loaded = _load_transformers(directory, dtype)
    else:
        raise ValueError(f"{directory} holds a transformers model, which is built from its config; leave out model=")
    return loaded if device is None else loaded.to(device)


def _save_transformers(model: Any, staged: Path) -> None:
    remember_plan(model)
    method = getattr(model.config.quantization_config, "quant_method", None)
    if method != "lte":
        raise ValueError(f"this model is quantized ({method}); save the sparse model before quantizing it")
    model.save_pretrained(str(staged))


def _load_transformers(directory: Path, dtype: torch.dtype | None) -> nn.Module:
    register_with_transformers()
    import transformers

    config = read_json(directory / CONFIG_FILE)
    record = config.get("quantization_config") or {}
    if record.get("quant_method") != "lte":
        raise ValueError(f"{directory} holds a model that lte_compile did not transform; load it with from_pretrained")
    parse_plan({key: value for key, value in record.items() if key != "quant_method"})
    architecture = (config.get("architectures") or ["none"])[0]
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise ValueError(
            f"transformers {transformers.__version__} has no class {architecture!r}; load {directory} with the class "
            "it was saved from: its own from_pretrained restores routers too"
        )
    model, info = model_class.from_pretrained(
        directory, dtype=dtype or "auto", use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    if wrong := {kind: sorted(map(str, info[kind])) for kind in _MISMATCHES if info.get(kind)}:
        raise ValueError(f"the weights in {directory} do not fit its config: {wrong}; save the model again")
    loaded: nn.Module = model
    return loaded


_MISMATCHES = ("missing_keys", "unexpected_keys", "mismatched_keys")


def _load_module(directory: Path, model: nn.Module | None, dtype: torch.dtype | None) -> nn.Module:
    if model is None:
        raise ValueError(
            f"{directory} holds a module that is not from transformers; pass model=, a dense instance of it"
        )
    plans = parse_plan(read_json(directory / PLAN_FILE))
    if dtype is not None:
        model.to(dtype)
    restore_routers(model, plans)
    try:
        load_model(model, directory / _WEIGHTS)
    except RuntimeError as error:  # what load_state_dict raises for keys and shapes that differ
        raise ValueError(f"the weights in {directory} do not fit this {type(model).__name__}: {error}") from None
    finish_restoring(model)
    return model


def _check_files(directory: Path) -> None:
    """Everything that can be known to be wrong before any model is built."""
    if not directory.is_dir():
        raise ValueError(f"there is no directory {directory}")
    shards = weight_files(directory)
    if not shards or not any((directory / marker).exists() for marker in _MARKERS):
        raise ValueError(f"{directory} is no complete checkpoint: it needs {_WEIGHTS} and {' or '.join(_MARKERS)}")
    for shard in shards:
        if not shard.exists():
            raise ValueError(f"{directory} lacks {shard.name}, one of its {len(shards)} weight files; copy it again")
        try:
            with safe_open(shard, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{shard} is cut short or corrupt ({error}); copy or save the checkpoint again") from None


def refuse_pickles(directory: Path) -> None:
    """A ValueError for a directory whose weights are pickles."""
    if pickles := sorted(directory.glob("*.bin")):
        raise ValueError(
            f"{directory} has pickled weights ({pickles[0].name}), which can run code when loaded; only safetensors "
            "are read: load the dense model with transformers and save it again"
        )


def weight_files(directory: Path) -> tuple[Path, ...]:
    """The weight files a directory has, or says that it has."""
    if (directory / _WEIGHTS).exists():
        return (directory / _WEIGHTS,)
    if not (directory / INDEX_FILE).exists():
        refuse_pickles(directory)
        return ()
    weight_map = read_json(directory / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, Mapping):
        raise ValueError(f"{directory / INDEX_FILE} has no weight_map; copy or save the checkpoint again")
    return tuple(directory / name for name in sorted(set(weight_map.values())))


def read_json(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # broken JSON or UTF-8
        raise ValueError(f"{path} is cut short or corrupt ({error}); copy or save the checkpoint again") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path} holds no JSON object; copy or save the checkpoint again")
    return record


@contextmanager
def staging(directory: Path) -> Iterator[Path]:
    """An empty directory on the target's file system, removed at the end. Its creation proves the target writable.

    What safetensors cannot write to it, mostly because the disk is full, is an OSError.
    """
    beside = directory if directory.is_dir() else directory.parent
    staged = beside / f".{directory.name}.{uuid4().hex}.partial"
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"cannot save to {directory}: it is a file; choose a directory")
    try:
        staged.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"cannot save to {directory}: {error.strerror}; choose another directory") from error
    try:
        yield staged
    except SafetensorError as error:
        raise OSError(f"cannot save to {directory}: {error}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def move_into_place(staged: Path, directory: Path) -> None:
    """Renames only. An existing directory loses its markers first and gets the new ones last."""
    if not directory.exists():
        staged.rename(directory)
        return
    for old in sorted(filter(_is_ours, directory.iterdir()), key=lambda path: path.name not in _MARKERS):
        old.unlink()
    for new in sorted(staged.iterdir(), key=lambda path: path.name in _MARKERS):
        target = directory / new.name
        if target.is_dir():  # a tokenizer's folder of chat templates: a rename cannot replace it
            shutil.rmtree(target)
        new.replace(target)


def _is_ours(path: Path) -> bool:
    name = path.name
    return name in (*_MARKERS, INDEX_FILE) or (name.startswith("model") and name.endswith(".safetensors"))
