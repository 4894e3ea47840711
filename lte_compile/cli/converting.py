"""lte-compile convert: a dense model becomes one with routers, its function unchanged, and is saved."""

from __future__ import annotations

import inspect as python_inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lte_compile.calibration import collect_activations
from lte_compile.cli.options import TaskOptions
from lte_compile.cli.output import Outcome, facts_table
from lte_compile.cli.preparing import check_output, encode, find_model, find_task
from lte_compile.config import Grouping, TransformConfig
from lte_compile.dummies import dummy_inputs
from lte_compile.evaluation import router_parameters, sites_of
from lte_compile.inspection import inspect
from lte_compile.loading import TOKENIZER_FILES, load_model, load_tokenizer
from lte_compile.losses import Batch
from lte_compile.modes import eval_mode
from lte_compile.persistence import save_pretrained
from lte_compile.progress import TrainingProgress
from lte_compile.tasks_api import without_labels
from lte_compile.transform import transform

# Batches whose activations group neurons: 16 windows of 256 tokens or as many batches of 32 texts hold a few thousand.
ACTIVATION_BATCHES = 16
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class ConvertSettings:
    """`dtype` "auto" keeps the checkpoint's; `task` is read for grouping by co-activation."""

    model: str
    out: Path
    config: TransformConfig
    dtype: str
    task: TaskOptions | None
    overwrite: bool


def convert_model(settings: ConvertSettings) -> Outcome:
    """Transform, compare with the dense model, save.

    Raises:
        ValueError: bad input of any kind; nothing is written then.
    """
    dtype = pick_dtype(settings.dtype)
    if settings.config.grouping is Grouping.COACTIVATION and settings.task is None:
        raise ValueError("--grouping coactivation looks at activations: name the text to run with --task")
    with TrainingProgress() as progress:
        path = find_model(settings.model, progress)
        check_output(settings.out, path, overwrite=settings.overwrite)
        model = load_model(path, dtype=dtype)
        before = sum(parameter.numel() for parameter in model.parameters())
        dense = run_once(model)
        with progress.working("transforming"):
            transform(model, settings.config, activations=_activations(model, path, settings, progress))
        difference = largest_difference(dense, run_once(model))
        tokenizer = load_tokenizer(path) if _has_tokenizer(path) else None
        with progress.working("saving"):
            save_pretrained(model, settings.out, tokenizer)
    scale = max(float(value.abs().max()) for value in dense)
    return _outcome(model, settings, before, difference, scale)


def pick_dtype(name: str) -> torch.dtype | None:
    """The dtype of a --dtype option; None for "auto"."""
    if name != "auto" and name not in DTYPES:
        raise ValueError(f"--dtype must be auto, {', '.join(DTYPES)}; got {name!r}")
    return DTYPES.get(name)


def activations_for(model: nn.Module, config: TransformConfig, batches: list[Batch]) -> Mapping[str, Tensor]:
    """What `transform` needs to know for this grouping: activations, or nothing."""
    if config.grouping is not Grouping.COACTIVATION:
        return {}
    return collect_activations(model, inspect(model).sites, batches)


def _activations(
    model: nn.Module, path: Path, settings: ConvertSettings, progress: TrainingProgress
) -> Mapping[str, Tensor]:
    if settings.task is None or settings.config.grouping is not Grouping.COACTIVATION:
        return {}
    task = encode(find_task(settings.task, progress), load_tokenizer(path), settings.task)
    batches = without_labels(task.held_out(ACTIVATION_BATCHES, next(model.parameters()).device))
    return activations_for(model, settings.config, list(batches))


@torch.no_grad()
def run_once(model: nn.Module) -> list[Tensor]:
    """The tensors a model returns first (logits, or hidden states) for example inputs."""
    inputs: dict[str, Any] = dict(dummy_inputs(model))
    if "use_cache" in python_inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    with eval_mode(model):
        result = model(**inputs)
    return [value for value in tuple(result.to_tuple()) if isinstance(value, Tensor)]


def largest_difference(before: list[Tensor], after: list[Tensor]) -> float:
    return max(float((b.double() - a.double()).abs().max()) for b, a in zip(before, after, strict=True))


def _has_tokenizer(path: Path) -> bool:
    return any((path / file).is_file() for file in TOKENIZER_FILES)  # a ViT has none


def _outcome(model: nn.Module, settings: ConvertSettings, before: int, difference: float, scale: float) -> Outcome:
    sites = sites_of(model)
    document = {
        "model": settings.model,
        "out": str(settings.out),
        "config": settings.config.to_dict(),
        "sites": [site.to_dict() for site in sites],
        "parameters": before,
        "router_parameters": router_parameters(model),
        "max_abs_diff": difference,
        "max_abs_output": scale,
    }
    facts = {
        "FFN sites": len(sites),
        "experts": f"{settings.config.expert_size} neurons each, {settings.config.grouping} grouping",
        "parameters": f"{before:,}",
        "added by routers": f"{router_parameters(model):,} ({router_parameters(model) / before:.2%})",
        "largest difference to the dense model": f"{difference:.3g} (outputs up to {scale:.3g})",
        "written to": settings.out,
    }
    return Outcome(document, [facts_table(f"{settings.model} converted", facts)])
