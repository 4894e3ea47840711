"""lte-compile convert: a dense model becomes one with routers, its function unchanged, and is saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn

from lte_compile.calibration.watching import collect_activations
from lte_compile.checkpoints.loading import TOKENIZER_FILES, load_model, load_tokenizer
from lte_compile.checkpoints.persistence import save_pretrained
from lte_compile.checkpoints.streaming import StreamPlan, plan_stream, run_stream
from lte_compile.cli.convert_comparison import Comparison, compare_directories, run_once
from lte_compile.cli.options import TaskOptions
from lte_compile.cli.output import Outcome, facts_table
from lte_compile.cli.preparing import check_output, encode, find_model, find_task
from lte_compile.config import Grouping, TransformConfig
from lte_compile.evaluation.quality import router_parameters, sites_of
from lte_compile.inspection.sites import inspect
from lte_compile.running.labels import without_labels
from lte_compile.training.losses import Batch
from lte_compile.training.progress import TrainingProgress
from lte_compile.transform import transform

# Batches whose activations group neurons: 16 windows of 256 tokens or as many batches of 32 texts hold a few thousand.
ACTIVATION_BATCHES = 16
# A streamed model of up to this size is loaded afterwards, to compare it with the dense one: Python with torch takes
# 0.44 GB (docs/cli.md), a load for a moment twice the weights, and streaming promises to stay within 1 GB.
COMPARED_BYTES = 200 * 2**20
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


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A conversion that is on the disk. `model` has its routers, and after streaming no data.

    `reason` says why it was not streamed, if it was not; `seconds` is the time from reading weights to having saved.
    """

    model: nn.Module
    parameters: int
    seconds: float
    comparison: Comparison | None
    reason: str | None = None


def convert_model(settings: ConvertSettings) -> Outcome:
    """Convert weight by weight, or in memory where that is not possible, and compare with the dense model.

    Raises:
        ValueError: bad input of any kind; nothing is written then.
    """
    dtype = pick_dtype(settings.dtype)
    if settings.config.grouping is Grouping.COACTIVATION and settings.task is None:
        raise ValueError("--grouping coactivation looks at activations: name the text to run with --task")
    with TrainingProgress() as progress:
        path = find_model(settings.model, progress)
        check_output(settings.out, path, overwrite=settings.overwrite)
        with progress.working("finding FFNs"):
            plan = plan_stream(path, settings.config, dtype=dtype)
        if isinstance(plan, str):
            progress.say(f"converting in memory: {plan}")
            return _outcome(_convert_in_memory(path, settings, progress, reason=plan), settings)
        return _outcome(_convert_streamed(plan, settings, progress), settings)


def _convert_streamed(plan: StreamPlan, settings: ConvertSettings, progress: TrainingProgress) -> Converted:
    start = perf_counter()
    with progress.counting("converting", total=len(plan.routers)) as advance:
        run_stream(plan, settings.out, lambda site: advance(site.name))
    seconds = perf_counter() - start
    comparison = None
    if sum(tensor.nbytes for tensor in plan.model.parameters()) <= COMPARED_BYTES:
        with progress.working("comparing with the dense model"):
            comparison = compare_directories(plan.source, settings.out, pick_dtype(settings.dtype))
    return Converted(model=plan.model, parameters=plan.parameters, seconds=seconds, comparison=comparison)


def _convert_in_memory(path: Path, settings: ConvertSettings, progress: TrainingProgress, *, reason: str) -> Converted:
    start = perf_counter()
    model = load_model(path, dtype=pick_dtype(settings.dtype))
    before = sum(parameter.numel() for parameter in model.parameters())
    dense = run_once(model)
    with progress.working("transforming"):
        transform(model, settings.config, activations=_activations(model, path, settings, progress))
    comparison = Comparison.of(dense, run_once(model))
    tokenizer = load_tokenizer(path) if _has_tokenizer(path) else None
    with progress.working("saving"):
        save_pretrained(model, settings.out, tokenizer)
    seconds = perf_counter() - start
    return Converted(model=model, parameters=before, seconds=seconds, comparison=comparison, reason=reason)


def pick_dtype(name: str) -> torch.dtype | None:
    """The dtype of a --dtype option; None for "auto"."""
    if name != "auto" and name not in DTYPES:
        raise ValueError(f"--dtype must be auto, {', '.join(DTYPES)}; got {name!r}")
    return DTYPES.get(name)


def activations_for(model: nn.Module, config: TransformConfig, batches: Iterable[Batch]) -> Mapping[str, Tensor]:
    """What `transform` needs to know for this grouping: activations on these inputs, labelled or not; or nothing."""
    if config.grouping is not Grouping.COACTIVATION:
        return {}
    return collect_activations(model, inspect(model).ffn_sites, (without_labels(model, batch) for batch in batches))


def _activations(
    model: nn.Module, path: Path, settings: ConvertSettings, progress: TrainingProgress
) -> Mapping[str, Tensor]:
    if settings.task is None or settings.config.grouping is not Grouping.COACTIVATION:
        return {}
    task = encode(find_task(settings.task, path, progress), load_tokenizer(path), settings.task)
    held_out = task.held_out(ACTIVATION_BATCHES, next(model.parameters()).device)
    return activations_for(model, settings.config, held_out)


def _has_tokenizer(path: Path) -> bool:
    return any((path / file).is_file() for file in TOKENIZER_FILES)  # a ViT has none


def _outcome(converted: Converted, settings: ConvertSettings) -> Outcome:
    sites, added = sites_of(converted.model), router_parameters(converted.model)
    comparison = converted.comparison
    document = {
        "model": settings.model,
        "out": str(settings.out),
        "config": settings.config.to_dict(),
        "sites": [site.to_dict() for site in sites],
        "parameters": converted.parameters,
        "router_parameters": added,
        "streamed": converted.reason is None,
        "in_memory_because": converted.reason,
        "seconds": converted.seconds,
        "max_abs_diff": None if comparison is None else comparison.difference,
        "max_abs_output": None if comparison is None else comparison.scale,
    }
    facts = {
        "FFN sites": len(sites),
        "experts": f"{settings.config.expert_size} neurons each, {settings.config.grouping} grouping",
        "parameters": f"{converted.parameters:,}",
        "added by routers": f"{added:,} ({added / converted.parameters:.2%})",
        "time": f"{converted.seconds:.1f} s, {converted.seconds / len(sites):.1f} s for each FFN",
        "largest difference to the dense model": _difference(comparison),
        "written to": settings.out,
    }
    return Outcome(document, [facts_table(f"{settings.model} converted", facts)])


def _difference(comparison: Comparison | None) -> str:
    if comparison is None:
        return f"not measured: the model is over {COMPARED_BYTES >> 20} MB and was not loaded as a whole"
    return f"{comparison.difference:.3g} (outputs up to {comparison.scale:.3g})"
