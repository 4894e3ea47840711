"""What commands do before their work: check where results go, find device and weights, open the task."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from lte_compile.checkpoints.loading import labels_in_order, load_causal_lm, load_classifier
from lte_compile.cli.options import TaskOptions
from lte_compile.config import TransformConfig
from lte_compile.data.models import resolve_model
from lte_compile.data.provenance import read_provenance
from lte_compile.data.tasks import LabelledTask, Task
from lte_compile.data.user_files import is_user_file
from lte_compile.evaluation.tasks import DEFAULT_SIZES, EncodedTask, TaskKind, TaskSize, kind_of, open_task
from lte_compile.serving.ort_library import ort_library_path
from lte_compile.training.config import TrainConfig
from lte_compile.training.progress import TrainingProgress

# What architectures call their table of position embeddings: embed_positions, position_embeddings, wpe.
_POSITIONS = re.compile(r"position|wpe")


def find_model(name: str, progress: TrainingProgress) -> Path:
    """Directory of a model, fetched if need be; says where weights that stand in for the hub's come from."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with progress.working(f"finding {name}"):
        path = resolve_model(name)
    provenance = read_provenance(path)
    if provenance.source == "package":
        note = f"; {provenance.note}" if provenance.note else ""
        progress.say(f"the hub cannot be reached: weights out of {provenance.detail.split(' (')[0]}{note}")
    return path


def read_settings(path: Path) -> dict[str, Any]:
    """What an OUT was made with; a ValueError if the file is gone or cut short."""
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}); delete {path.parent} to start over") from None
    return record


def changed_settings(recorded: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """How settings differ from those that an OUT was made with, in words; settings that it did not have yet count as
    their defaults."""
    defaults = {f.name: f.default for kind in (TrainConfig, TransformConfig) for f in fields(kind)}
    known = {name: value for name, value in defaults.items() if value is not MISSING}
    before, now = known | dict(recorded), known | dict(asked)
    differing = sorted(name for name in recorded.keys() | asked.keys() if before.get(name) != now.get(name))
    return ", ".join(f"{name} was {before.get(name)!r}, now {now.get(name)!r}" for name in differing)


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Hold the directory inside the block, made if it is missing; a ValueError if another process does."""
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is writing to {out}; wait for it, or choose another directory") from None
        yield
    finally:
        os.close(handle)


def content_of(options: TaskOptions) -> dict[str, str]:
    """What a file of the user's holds, for settings: a run must not go on with other texts."""
    path = Path(options.name)
    return (
        {"task_sha256": sha256(path.read_bytes()).hexdigest()} if is_user_file(options.name) and path.is_file() else {}
    )


def check_output(out: Path, source: Path, *, overwrite: bool) -> None:
    """A ValueError if a model cannot, or should not, be written to the directory `out`; nothing is left behind.

    Called before the work, so that hours of it do not end in an error.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"cannot write to {out}: it is a file; choose a directory")
    if out.exists() and out.resolve() == source.resolve():
        raise ValueError(f"{out} is the model to read; choose another directory to write to")
    if (out / "config.json").exists() and not overwrite:
        raise ValueError(f"{out} holds a model already; choose another directory, or give --overwrite")
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"cannot write to {out}: {nearest} is a file; choose another directory")
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error.strerror}; choose another directory") from error


def find_library(option: Path | None) -> Path | None:
    """The library of a --custom-ops option."""
    if option is not None and not option.is_file() and str(option) != "auto":
        raise ValueError(f"--custom-ops: there is no {option}; give a library of SparseFFN kernels, or auto")
    return ort_library_path() if str(option) == "auto" else option


def pick_device(name: str) -> torch.device:
    """The device of a --device option."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N; got {name!r}")
    with suppress(RuntimeError):
        device = torch.device(name)
        if device.type == "cpu" or (device.index or 0) < torch.cuda.device_count():
            return device
    raise ValueError(f"there is no device {name!r} here: torch sees {torch.cuda.device_count()} GPUs")


def find_task(options: TaskOptions, path: Path, progress: TrainingProgress) -> Task:
    """The task of a command line, fetched if need be, its labels numbered as the model at `path` does."""
    kind = _kind(options.kind) if options.kind else None
    with progress.working(f"reading {options.name}"):
        task = open_task(options.name, kind)
    return task.in_order(labels_in_order(path, task.labels)) if isinstance(task, LabelledTask) else task


def load_for(task: Task, path: Path, options: TaskOptions) -> tuple[nn.Module, Any]:
    """The model with the head that the task needs, and its tokenizer.

    Raises:
        ValueError: as `load_classifier` and `load_causal_lm`, or more tokens asked for than the model has positions.
    """
    is_labelled = isinstance(task, LabelledTask)
    model, tokenizer = load_classifier(path, task.labels) if isinstance(task, LabelledTask) else load_causal_lm(path)
    name, asked = ("max-length", options.max_length) if is_labelled else ("window", options.window)
    positions = position_table(model)
    if positions is not None and asked > positions:
        raise ValueError(f"{path} has {positions} positions; got --{name} {asked}: give at most that many tokens")
    return model, tokenizer


def position_table(model: nn.Module) -> int | None:
    """How many tokens a model reads that has an embedding for every position; None where positions are computed."""
    config = getattr(model, "config", None)
    most = getattr(config, "max_position_embeddings", None)
    tables = [m for name, m in model.named_modules() if isinstance(m, nn.Embedding) and _POSITIONS.search(name)]
    if not isinstance(most, int) or not any(table.num_embeddings >= most for table in tables):
        return None
    # RoBERTa counts from behind its padding's row
    return min([most, *(t.num_embeddings - t.padding_idx - 1 for t in tables if t.padding_idx is not None)])


def encode(task: Task, tokenizer: Any, options: TaskOptions) -> EncodedTask:
    """The task in tokens, in the sizes the command line asks for."""
    usual = DEFAULT_SIZES[kind_of(task)]
    size = TaskSize(
        batch_size=usual.batch_size if options.batch_size is None else options.batch_size,
        max_length=options.max_length,
        window=options.window,
        test_examples=usual.test_examples if options.test_examples is None else options.test_examples,
    )
    return EncodedTask(task=task, tokenizer=tokenizer, size=size)


def _kind(name: str) -> TaskKind:
    if name in list(TaskKind):
        return TaskKind(name)
    near = get_close_matches(name, list(TaskKind), n=1)
    hint = f"; did you mean {str(near[0])!r}?" if near else ""
    raise ValueError(f"--task-kind must be one of {', '.join(TaskKind)}; got {name!r}{hint}")
