"""Tokens per second of a trained decoder in ONNX Runtime on this CPU, dense and sparse.

    python -m benchmarks.trained_speed_ort runs/compared/models/lte-0.3-seed0 --task prose --threads 1 2

Both are exported from the checkpoint with a KV cache, in fp32: the sparse one at its own thresholds with SparseFFN,
the dense one without routers. They read the same text of the task's test split, a token a call, in turns, so that a
disturbance of the machine meets both. Times are of one call; the density is measured on this very text. Exporting takes
minutes: with `--exports DIR` files stay there, and a checkpoint that has not changed since is not exported again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel

import lte_compile as lte
from benchmarks.trained import without_routers
from lte_compile.data.tasks import load_corpus
from lte_compile.evaluation.quality import evaluate
from lte_compile.exporters.runtime import OrtGenerator, open_session
from lte_compile.reports.environment import describe_environment
from lte_compile.reports.results import write_atomically
from lte_compile.serving.onnx_file import export_onnx
from lte_compile.serving.ort_library import ort_library_path

PROMPT = 64
TURN = 8  # tokens that one model reads before the other's turn


class Reader:
    """One session that reads a text, the prompt in one call and then token by token."""

    def __init__(self, file: Path, ids: Sequence[int], threads: int) -> None:
        self.generator = OrtGenerator(open_session(file, custom_ops=ort_library_path(), threads=threads))
        self.ids = ids
        self.milliseconds: list[float] = []
        self._read(0, PROMPT, self.generator.empty_cache(1))

    def read(self, count: int) -> None:
        """The next tokens, each call timed but the first, which finds the other model's weights in the caches."""
        for number in range(count):
            start = perf_counter()
            self._read(self.position, self.position + 1, self.past)
            if number:
                self.milliseconds.append(1e3 * (perf_counter() - start))

    def _read(self, first: int, last: int, past: Any) -> None:
        mask = np.ones((1, last), np.int64)
        _, self.past = self.generator.step(np.array([self.ids[first:last]], np.int64), mask, past)
        self.position = last


def exported(model: PreTrainedModel, checkpoint: Path, folder: Path) -> Mapping[str, Path]:
    """The dense and the sparse file in `folder`, written unless they are newer than the checkpoint's weights."""
    files = {name: folder / f"{name}.onnx" for name in ("dense", "sparse")}
    since = max(file.stat().st_mtime for file in checkpoint.glob("*.safetensors"))
    if all(file.exists() and file.stat().st_mtime > since for file in files.values()):
        return files
    folder.mkdir(parents=True, exist_ok=True)
    export_onnx(without_routers(model), files["dense"], kv_cache=True, dense=True)
    export_onnx(model, files["sparse"], kv_cache=True)
    return files


def measure(
    directory: Path, task: str, tokens: int, threads: Sequence[int], exports: Path | None = None
) -> dict[str, Any]:
    """One checkpoint, with each number of threads; files stay in `exports`, if that is given."""
    model = lte.load_pretrained(directory)
    assert isinstance(model, PreTrainedModel)
    lte.set_stage(model, "hard")
    text = max(load_corpus(task).test, key=len)
    ids = AutoTokenizer.from_pretrained(directory)(text[:20_000])["input_ids"][: PROMPT + tokens]
    batch = torch.tensor([ids])
    measured = evaluate(model, [{"input_ids": batch, "labels": batch}])
    assert measured.selection is not None
    with contextlib.ExitStack() as stack:
        folder = exports or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lte_compile-")))
        files = exported(model, directory, folder / directory.name)
        rows = [{"threads": count, **race(files, ids, tokens, count)} for count in threads]
    return {
        "checkpoint": directory.name,
        "density": measured.density,
        "weight_share": measured.selection.weight_share,
        "tokens": tokens,
        "rows": rows,
        "environment": asdict(describe_environment()),
    }


def race(files: Mapping[str, Path], ids: Sequence[int], tokens: int, threads: int) -> dict[str, Any]:
    readers = {name: Reader(file, ids, threads) for name, file in files.items()}
    for _ in range(tokens // TURN):
        for reader in readers.values():
            reader.read(TURN)
    times = {name: median(reader.milliseconds) for name, reader in readers.items()}
    per_second = {name: 1e3 / time for name, time in times.items()}
    return {"milliseconds_a_token": times, "tokens_per_second": per_second}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--task", default="prose", help="the corpus whose test split is read")
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="of ONNX Runtime")
    parser.add_argument("--exports", type=Path, help="keep the ONNX files here, and take those that are there")
    parser.add_argument("--output", type=Path, help="also write the figures here, as JSON")
    options = parser.parse_args()
    if missing := [str(directory) for directory in options.checkpoints if not directory.is_dir()]:
        parser.error(f"no such directory: {', '.join(missing)}; give models that lte-compile train saved")
    rows = [
        measure(directory, options.task, options.tokens, options.threads, options.exports)
        for directory in options.checkpoints
    ]
    text = json.dumps(rows, indent=1) + "\n"
    sys.stdout.write(text)
    if options.output:
        write_atomically(options.output, text.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
