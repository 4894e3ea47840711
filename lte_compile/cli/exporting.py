"""lte-compile export: write an ONNX file or folder, run it in ONNX Runtime, and compare with torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnxruntime
from torch import nn

from lte_compile.checkpoints.loading import check_generates, is_transformed, load_model
from lte_compile.cli.converting import DTYPES
from lte_compile.cli.export_comparison import compare_with_torch
from lte_compile.cli.output import Outcome
from lte_compile.cli.preparing import find_model
from lte_compile.exporters.files import check_writable
from lte_compile.exporters.report import OnnxReport
from lte_compile.exporters.runtime import register_library
from lte_compile.serving.folders import ONNX_RUNTIME, TARGETS, FolderReport, check_target, export_folder
from lte_compile.serving.onnx_file import export_onnx
from lte_compile.training.progress import TrainingProgress

EXPORT_DTYPES = ("fp32", "fp16", "bf16")
DYNAMIC_AXES = ("batch_and_sequence", "batch", "none")


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """As the command's options. An `out` that ends in .onnx is a file, any other a folder."""

    model: str
    out: Path
    target: str
    kv_cache: bool
    dtype: str
    dynamic_axes: str
    opset: int
    dense: bool
    custom_ops: Path | None
    device: str
    repository: str | None
    overwrite: bool

    @property
    def is_file(self) -> bool:
        return self.out.suffix == ".onnx"


def export_model(settings: ExportSettings) -> Outcome:
    """Write the model in the stage it was saved in, and check it.

    Raises:
        ValueError: bad input; nothing is written then.
    """
    _check(settings)
    with TrainingProgress() as progress:
        path = find_model(settings.model, progress)
        if settings.kv_cache:
            check_generates(path)
        if not settings.dense and not is_transformed(path):
            raise ValueError(f"{settings.model} has no routers; convert or train it first, or give --dense")
        model = load_model(path, dtype=DTYPES[settings.dtype])
        with progress.working("exporting"):
            report = _export(model, path, settings)
        written = (report,) if isinstance(report, OnnxReport) else report.models
        difference = None
        if settings.dtype != "bf16":
            with progress.working("running in ONNX Runtime"):
                files = [one.path for one in written]
                difference = compare_with_torch(model, files, kv_cache=settings.kv_cache, library=settings.custom_ops)
    return _outcome(settings, report, written, difference)


def _check(settings: ExportSettings) -> None:
    _check_choice("--dtype", settings.dtype, EXPORT_DTYPES)
    _check_choice("--dynamic-axes", settings.dynamic_axes, DYNAMIC_AXES)
    _check_choice("--target", settings.target, TARGETS)
    if not settings.is_file:
        check_target(
            settings.out,
            settings.target,
            device=settings.device,
            custom_ops=settings.custom_ops,
            overwrite=settings.overwrite,
        )
        if settings.custom_ops is not None:
            register_library(onnxruntime.SessionOptions(), settings.custom_ops)  # before minutes of other work
        return
    if settings.target != ONNX_RUNTIME or settings.custom_ops is not None:
        raise ValueError(f"--target and --custom-ops describe a folder; name one instead of the file {settings.out}")
    check_writable(settings.out)


def _export(model: nn.Module, path: Path, settings: ExportSettings) -> OnnxReport | FolderReport:
    if settings.is_file:
        return export_onnx(
            model,
            settings.out,
            kv_cache=settings.kv_cache,
            dynamic_axes=settings.dynamic_axes,
            opset=settings.opset,
            dense=settings.dense,
        )
    return export_folder(
        model,
        settings.out,
        target=settings.target,
        kv_cache=settings.kv_cache,
        tokenizer=path,
        custom_ops=settings.custom_ops,
        device=settings.device,
        repository=settings.repository,
        dynamic_axes=settings.dynamic_axes,
        opset=settings.opset,
        dense=settings.dense,
        overwrite=settings.overwrite,
    )


def _check_choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{option} must be one of {', '.join(allowed)}; got {value!r}")


def _outcome(
    settings: ExportSettings,
    report: OnnxReport | FolderReport,
    written: tuple[OnnxReport, ...],
    difference: float | None,
) -> Outcome:
    first = written[0]
    refused = [rejection for one in written for rejection in one.masked_dense]
    runtime = f"onnxruntime {onnxruntime.__version__}"
    document = {
        "model": settings.model,
        "file": str(first.path),
        "data": None if first.data is None else str(first.data),
        "folder": None if settings.is_file else str(settings.out),
        "files": [] if isinstance(report, OnnxReport) else [str(file) for file in report.files],
        "bytes": report.size,
        "opset": first.opset,
        "dtype": settings.dtype,
        "inputs": first.inputs,
        "outputs": first.outputs,
        "sparse": [node.name for one in written for node in one.sparse],
        "masked_dense": [{"parameter": r.parameter or r.node, "reason": r.reason} for r in refused],
        "runtime": runtime,
        "max_abs_diff": difference,
    }
    return Outcome(document, [str(report), _verdict(settings, runtime, difference)])


def _verdict(settings: ExportSettings, runtime: str, difference: float | None) -> str:
    if difference is None:
        return "not run: ONNX Runtime's CPU provider has no bfloat16 kernels; onnx.checker and shape inference passed"
    kernels = "plain " if settings.custom_ops is None else f"{settings.custom_ops.name} in "
    return f"largest difference to torch, run in {kernels}{runtime}: {difference:.3g}"
