"""lte-compile export: write an ONNX file, run it in plain ONNX Runtime, and compare with torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn

from lte_compile.cli.converting import DTYPES
from lte_compile.cli.output import Outcome
from lte_compile.cli.preparing import find_model
from lte_compile.dummies import dummy_inputs
from lte_compile.exporters.files import check_writable
from lte_compile.exporters.report import OnnxReport
from lte_compile.exporters.runtime import OrtGenerator, max_abs_difference, open_session, run
from lte_compile.loading import check_causal_lm, is_transformed, load_model
from lte_compile.onnx_api import export_onnx
from lte_compile.progress import TrainingProgress

EXPORT_DTYPES = ("fp32", "fp16")
DYNAMIC_AXES = ("batch_and_sequence", "batch", "none")


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """As the command's options."""

    model: str
    out: Path
    kv_cache: bool
    dtype: str
    dynamic_axes: str
    opset: int
    dense: bool


def export_model(settings: ExportSettings) -> Outcome:
    """Write the file in the stage the model was saved in, and check it.

    Raises:
        ValueError: bad input; nothing is written then.
    """
    _check_choice("--dtype", settings.dtype, EXPORT_DTYPES)
    _check_choice("--dynamic-axes", settings.dynamic_axes, DYNAMIC_AXES)
    check_writable(settings.out)
    with TrainingProgress() as progress:
        path = find_model(settings.model, progress)
        if settings.kv_cache:
            check_causal_lm(path)
        if not settings.dense and not is_transformed(path):
            raise ValueError(f"{settings.model} has no routers; convert or train it first, or give --dense")
        model = load_model(path, dtype=DTYPES[settings.dtype])
        with progress.working("exporting"):
            report = export_onnx(
                model,
                settings.out,
                kv_cache=settings.kv_cache,
                dynamic_axes=settings.dynamic_axes,
                opset=settings.opset,
                dense=settings.dense,
            )
        with progress.working("running in ONNX Runtime"):
            difference = compare_with_torch(model, settings.out, kv_cache=settings.kv_cache)
    return _outcome(settings, report, difference)


@torch.no_grad()
def compare_with_torch(model: nn.Module, file: Path, *, kv_cache: bool) -> float:
    """Largest absolute difference of the first output (logits, or hidden states) for example inputs."""
    inputs = dummy_inputs(model)
    expected = model.eval()(**inputs).to_tuple()[0]
    session = open_session(file)
    feed: dict[str, Any] = {name: value.numpy() for name, value in inputs.items()}
    if kv_cache:
        feed = _with_empty_cache(session, feed)
    outputs = run(session, feed)
    first = outputs[session.get_outputs()[0].name]
    return max_abs_difference(first, expected.float().numpy())


def _with_empty_cache(session: onnxruntime.InferenceSession, feed: Mapping[str, Any]) -> dict[str, Any]:
    decoder = OrtGenerator(session)
    batch, tokens = feed["input_ids"].shape
    filled = {"position_ids": np.arange(tokens)[None].repeat(batch, axis=0), **feed}
    past = {cache.name: cache.empty(batch) for cache in decoder.caches}
    return {name: value for name, value in filled.items() if name in decoder.input_names} | past


def _check_choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{option} must be one of {', '.join(allowed)}; got {value!r}")


def _outcome(settings: ExportSettings, report: OnnxReport, difference: float) -> Outcome:
    runtime = f"onnxruntime {onnxruntime.__version__}"
    document = {
        "model": settings.model,
        "file": str(report.path),
        "data": None if report.data is None else str(report.data),
        "bytes": report.size,
        "opset": report.opset,
        "dtype": settings.dtype,
        "inputs": report.inputs,
        "outputs": report.outputs,
        "sparse": [node.name for node in report.sparse],
        "masked_dense": [{"parameter": r.parameter or r.node, "reason": r.reason} for r in report.masked_dense],
        "runtime": runtime,
        "max_abs_diff": difference,
    }
    return Outcome(document, [str(report), f"largest difference to torch, run in plain {runtime}: {difference:.3g}"])
