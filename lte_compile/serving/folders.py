"""export_folder: a model as the folder that a server or a generation library loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from lte_compile.checkpoints.loading import TOKENIZER_FILES
from lte_compile.exporters import genai, triton_server
from lte_compile.exporters.axes import DynamicAxes
from lte_compile.exporters.files import check_folder, staging_folder
from lte_compile.exporters.interface import read_interface
from lte_compile.exporters.onnx_export import DEFAULT_OPSET, check_opset
from lte_compile.exporters.report import OnnxReport
from lte_compile.exporters.seq2seq import is_encoder_decoder
from lte_compile.serving.onnx_file import export_onnx
from lte_compile.serving.programs import Inputs
from lte_compile.serving.seq2seq import DECODER_FILE, export_encoder_decoder

__all__ = ["TARGETS", "FolderReport", "export_folder"]

ONNX_RUNTIME, TRITON_SERVER = "onnxruntime", "triton-server"
TARGETS: Final = (ONNX_RUNTIME, TRITON_SERVER)

MODEL_FILE: Final = "model.onnx"
# What tells a folder written here from any other.
_SIGNS: Final = (MODEL_FILE, DECODER_FILE, genai.CONFIG_NAME, triton_server.CONFIG_NAME)

# What transformers and GenAI read beside the vocabulary.
_TOKENIZER_COMPANIONS: Final = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)

# For models without positions to run out of (ALiBi): GenAI wants a limit to the length of a text all the same.
_UNLIMITED_CONTEXT: Final = 131_072


@dataclass(frozen=True, kw_only=True)
class FolderReport:
    """A folder, the files in it (relative to it) and what each ONNX file holds."""

    path: Path
    files: tuple[Path, ...]
    models: tuple[OnnxReport, ...]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum((self.path / file).stat().st_size for file in self.files)

    def __str__(self) -> str:
        listed = ", ".join(str(file) for file in self.files)
        return "\n".join([f"{self.path}: {self.size / 1e6:.1f} MB in {listed}", *map(str, self.models)])


def export_folder(
    model: nn.Module,
    out: str | Path,
    *,
    target: str = ONNX_RUNTIME,
    kv_cache: bool = False,
    tokenizer: str | Path | None = None,
    custom_ops: str | Path | None = None,
    device: str = "auto",
    repository: str | None = None,
    example_inputs: Inputs | None = None,
    dynamic_axes: DynamicAxes = "batch_and_sequence",
    opset: int = DEFAULT_OPSET,
    dtype: torch.dtype | None = None,
    dense: bool = False,
    overwrite: bool = False,
) -> FolderReport:
    """Write `model` as a folder. Everything appears at once, under its final name, or not at all.

    Target "onnxruntime": `model.onnx` and the tokenizer's files; with `kv_cache` also `genai_config.json`, so that
    ONNX Runtime GenAI loads the folder. Target "triton-server": a model of a Triton Inference Server repository, which
    is the folder that holds `out`: `config.pbtxt` and `1/model.onnx`.

    Args:
        model: a transformers model where `kv_cache` is set; else as for `export_onnx`.
        tokenizer: model directory whose tokenizer files are copied; Triton's clients bring their own.
        custom_ops: library of `SparseFFN` kernels; a copy goes into the folder and its configuration names it.
            Without one the folder runs in any ONNX Runtime.
        device: where Triton's instances run: "auto", "cpu" or "cuda".
        repository: where Triton will see the folder that holds `out`; by default where it is now.
        example_inputs, dynamic_axes, opset, dtype, dense: as for `export_onnx`.
        overwrite: replace an earlier export.

    Raises:
        ValueError: bad arguments, or `out` should not be written. Nothing is written then.
    """
    out = Path(out)
    check_opset(opset)
    check_target(out, target, device=device, custom_ops=custom_ops, overwrite=overwrite)
    is_pair = kv_cache and is_encoder_decoder(model)
    if is_pair and target == TRITON_SERVER:
        raise ValueError("Triton serves one file per model, and an encoder-decoder with a cache is two; omit kv_cache")
    facts = decoder_facts(model) if kv_cache and not is_pair and target == ONNX_RUNTIME else None

    def write_models(folder: Path) -> tuple[OnnxReport, ...]:
        if is_pair:
            return export_encoder_decoder(model, folder, opset=opset, dtype=dtype, dense=dense)
        report = export_onnx(
            model,
            folder / MODEL_FILE,
            example_inputs=example_inputs,
            dynamic_axes=dynamic_axes,
            kv_cache=kv_cache,
            opset=opset,
            dtype=dtype,
            dense=dense,
        )
        return (report,)

    with staging_folder(out) as staged:
        library = None if custom_ops is None else Path(custom_ops)
        if target == TRITON_SERVER:
            reports = _fill_triton(staged, write_models, library, device, _root(out, repository))
        else:
            reports = _fill_runtime(staged, write_models, library, facts, tokenizer)
        files = tuple(sorted(file.relative_to(staged) for file in staged.rglob("*") if file.is_file()))
        moved = tuple(_moved(report, staged, out) for report in reports)
    return FolderReport(path=out, files=files, models=moved)


def check_target(out: Path, target: str, *, device: str, custom_ops: str | Path | None, overwrite: bool) -> None:
    """The ValueError that `export_folder` would raise for these, before any work is spent on a model."""
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}; got {target!r}")
    if device not in triton_server.INSTANCE_KINDS:
        raise ValueError(f"device must be one of {', '.join(triton_server.INSTANCE_KINDS)}; got {device!r}")
    if custom_ops is not None and not Path(custom_ops).is_file():
        raise ValueError(f"{custom_ops}: no such library of custom operators; leave it out to run anywhere")
    check_folder(out, overwrite=overwrite, signs=_SIGNS)


WriteModels = Callable[[Path], tuple[OnnxReport, ...]]


def _fill_runtime(
    folder: Path,
    write_models: WriteModels,
    library: Path | None,
    facts: genai.DecoderFacts | None,
    tokenizer: str | Path | None,
) -> tuple[OnnxReport, ...]:
    """Files, library and tokenizer side by side; with `facts`, what GenAI needs."""
    reports = write_models(folder)
    if library is not None:
        shutil.copy(library, folder)
    if tokenizer is not None:
        _copy_tokenizer(Path(tokenizer), folder)
    if facts is not None:
        name = None if library is None else library.name
        config = genai.genai_config(read_interface(folder / MODEL_FILE), facts, filename=MODEL_FILE, custom_ops=name)
        (folder / genai.CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return reports


def _fill_triton(
    folder: Path, write_models: WriteModels, library: Path | None, device: str, served: Path
) -> tuple[OnnxReport, ...]:
    """Version 1 with the library beside it, and the configuration. `served` is what the server sees `folder` as."""
    version = folder / triton_server.VERSION_FOLDER
    version.mkdir()
    reports = write_models(version)
    seen = None
    if library is not None:
        shutil.copy(library, version)
        seen = str(served / version.name / library.name)
    text = triton_server.model_config(served.name, read_interface(version / MODEL_FILE), device=device, library=seen)
    (folder / triton_server.CONFIG_NAME).write_text(text, encoding="utf-8")
    return reports


def _root(out: Path, repository: str | None) -> Path:
    """The folder of the model as the server sees it."""
    return (out.absolute().parent if repository is None else Path(repository)) / out.name


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for name in (*TOKENIZER_FILES, *_TOKENIZER_COMPANIONS):
        if (source / name).is_file():
            shutil.copy(source / name, folder)


def _moved(report: OnnxReport, staged: Path, out: Path) -> OnnxReport:
    data = None if report.data is None else out / report.data.relative_to(staged)
    return replace(report, path=out / report.path.relative_to(staged), data=data)


def decoder_facts(model: nn.Module) -> genai.DecoderFacts:
    """What GenAI must know of a transformers decoder.

    Raises:
        ValueError: the model is not from transformers, or does not say which token ends a text.
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"kv_cache=True needs a transformers decoder; got {type(model).__name__}")
    text = config.get_text_config()
    settings: Any = getattr(model, "generation_config", None)
    tokens = {
        name: _first_given(getattr(source, name, None) for source in (settings, text))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    ends = tokens["eos_token_id"]
    return genai.DecoderFacts(
        context_length=getattr(text, "max_position_embeddings", None) or _UNLIMITED_CONTEXT,
        hidden_size=text.hidden_size,
        attention_heads=text.num_attention_heads,
        bos_token_id=tokens["bos_token_id"],
        eos_token_ids=() if ends is None else tuple(ends) if isinstance(ends, list) else (ends,),
        pad_token_id=tokens["pad_token_id"],
    )


def _first_given(values: Iterable[Any]) -> Any:
    return next((value for value in values if value is not None), None)
