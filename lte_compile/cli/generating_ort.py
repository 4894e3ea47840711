"""Decoding in ONNX Runtime: an exported file or folder, or a model that is exported for the occasion."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from lte_compile.checkpoints.loading import check_causal_lm, load_model
from lte_compile.cli.preparing import find_model
from lte_compile.exporters.genai import CONFIG_NAME
from lte_compile.exporters.runtime import OrtGenerator, open_session
from lte_compile.serving.folders import MODEL_FILE
from lte_compile.serving.onnx_file import export_onnx
from lte_compile.serving.seq2seq import DECODER_FILE
from lte_compile.training.progress import TrainingProgress

# max_new_tokens, the prompt, what gets every token as it comes.
Decode = Callable[[int, list[int], Callable[[int], None]], None]


@contextmanager
def opened(model: str, file: Path | None, custom_ops: Path | None, device: str) -> Iterator[tuple[Path, Decode]]:
    """The directory that holds the tokenizer, and greedy decoding with an open session.

    Args:
        model: a folder written by `lte-compile export --kv-cache`, or a model as for the other commands.
        file: ONNX file to run; by default the folder's own, or the model exported to a temporary one.
        custom_ops: library of kernels; by default the one that the folder was exported with.

    Raises:
        ValueError: no decoder, or an encoder-decoder; a file without a cache; no such library.
    """
    folder = Path(model).expanduser()
    if file is None and (folder / DECODER_FILE).is_file():
        raise ValueError(f"{folder} is an encoder-decoder; OrtSeq2SeqGenerator runs it (docs/serving.md)")
    if file is None and (folder / MODEL_FILE).is_file():
        yield folder, _decoder(folder, folder / MODEL_FILE, custom_ops or _own_library(folder), device)
        return
    with tempfile.TemporaryDirectory(prefix="lte-compile-") as scratch:
        with TrainingProgress() as progress:
            path = find_model(model, progress)
            if file is None:
                file = Path(scratch) / MODEL_FILE
                with progress.working("exporting (lte-compile export --kv-cache keeps the file)"):
                    _export(path, file)
            decode = _decoder(path, file, custom_ops, device)
        yield path, decode


def _export(path: Path, file: Path) -> None:
    check_causal_lm(path)
    export_onnx(load_model(path, dtype=torch.float32), file, kv_cache=True, dense=True)


def _decoder(path: Path, file: Path, custom_ops: Path | None, device: str) -> Decode:
    session = open_session(file, custom_ops=custom_ops, device=_device(device))
    generator = OrtGenerator(session)
    ends = frozenset(_end_tokens(path))

    def decode(max_new_tokens: int, ids: list[int], on_token: Callable[[int], None]) -> None:
        for token in generator.stream([ids], max_new_tokens=max_new_tokens):
            on_token(int(token[0]))
            if int(token[0]) in ends:
                return

    return decode


def _own_library(folder: Path) -> Path | None:
    """The library that the folder's configuration names, which GenAI loads too."""
    config = _read(folder / CONFIG_NAME) if (folder / CONFIG_NAME).is_file() else {}
    name = config.get("model", {}).get("decoder", {}).get("session_options", {}).get("custom_ops_library")
    return None if name is None else folder / name


def _device(name: str) -> str:
    """ "cpu" or "cuda"; "auto" is a GPU where torch sees one and this onnxruntime can use it."""
    if name != "auto":
        return name  # open_session says what it cannot do; torch may have been built without CUDA
    has_provider = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    return "cuda" if has_provider and torch.cuda.is_available() else "cpu"


def _end_tokens(path: Path) -> Iterator[int]:
    """The tokens that end a text, as the export or else transformers' generate() knows them."""
    for name in (CONFIG_NAME, "generation_config.json", "config.json"):
        file = path / name
        record = _read(file) if file.is_file() else {}
        ends = record.get("model", record).get("eos_token_id")
        if ends is not None:
            yield from ends if isinstance(ends, list) else [ends]
            return


def _read(file: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}; export the model again") from error
    return record
