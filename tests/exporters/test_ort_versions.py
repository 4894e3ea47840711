"""The library in other releases of ONNX Runtime, each in an environment of its own: `-m slow`, and fetches packages."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lte_compile.exporters import runtime
from lte_compile.exporters.runtime import greedy_generate
from lte_compile.serving.onnx_file import export_onnx
from tests.exporters.hard import prompts, shallow
from tests.exporters.single_node import Array, Case, make_model, reference
from tests.exporters.test_ort_library import TOLERANCE

# The last one before 1.18 is told that it is too old.
TOO_OLD = "1.17.3"
VERSIONS = (TOO_OLD, "1.18.1", "1.20.1", "1.23.2")
TOKENS = (1, 5, 40)

PROGRAM = """
import sys
import numpy as np
import onnxruntime as ort

library, folder = sys.argv[1:]
options = ort.SessionOptions()
options.intra_op_num_threads = 2
options.log_severity_level = 4
options.register_custom_ops_library(library)
session = ort.InferenceSession(f"{folder}/model.onnx", options, providers=["CPUExecutionProvider"])
results = {}
for tokens in map(int, open(f"{folder}/tokens")):
    inputs = np.load(f"{folder}/{tokens}.npz")
    results[str(tokens)] = session.run(None, dict(inputs))[0]
np.savez(f"{folder}/results.npz", **results)
"""

# runtime.py needs numpy and onnxruntime alone and lies beside the file.
DECODE = """
import sys
import numpy as np
from runtime import OrtGenerator, open_session

library, prompt = sys.argv[1], np.load("prompt.npz")
for number, custom_ops in enumerate((None, library)):
    generator = OrtGenerator(open_session("decoder.onnx", custom_ops=custom_ops))
    np.save(f"tokens{number}.npy", generator.generate(**prompt, max_new_tokens=8))
"""


def install(version: str, folder: Path) -> str:
    """Python of a new environment with this release."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    packages = [f"onnxruntime=={version}", "numpy<2"]  # what the older ones were built for, and all of them take
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def write_inputs(case: Case, inputs: dict[int, dict[str, Array]], folder: Path) -> None:
    kind = np.float16 if case.dtype == "fp16" else np.float32
    folder.mkdir()
    (folder / "model.onnx").write_bytes(make_model(case))
    (folder / "tokens").write_text("\n".join(map(str, inputs)))
    for tokens, arrays in inputs.items():
        typed: dict[str, Any] = {name: np.asarray(array, kind) for name, array in arrays.items()}
        np.savez(folder / f"{tokens}.npz", **typed)


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info >= (3, 13), reason="the older releases have no wheels for this Python")
@pytest.mark.parametrize("version", VERSIONS)
def test_other_releases(version: str, tmp_path: Path, ort_library: str) -> None:
    python = install(version, tmp_path / "environment")
    for dtype in ("fp32", "fp16"):
        case, folder = Case(dtype=dtype, width=96, neurons=256, expert_size=32), tmp_path / dtype
        inputs = {tokens: case.arrays(tokens) for tokens in TOKENS}
        write_inputs(case, inputs, folder)
        command = [python, "-c", PROGRAM, ort_library, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if version == TOO_OLD:
            assert f"liblte_ort.so needs ONNX Runtime 1.18 or later; this is {version}" in done.stderr
        else:
            assert done.returncode == 0, done.stderr
            check(case, inputs, folder)
    if version != TOO_OLD:
        decode(python, ort_library, tmp_path / "decoder")


def check(case: Case, inputs: dict[int, dict[str, Array]], folder: Path) -> None:
    results = np.load(folder / "results.npz")
    for tokens, arrays in inputs.items():
        wanted = reference(case, arrays)
        assert np.abs(results[str(tokens)] - wanted).max() <= TOLERANCE[case.dtype] * np.abs(wanted).max()


def decode(python: str, library: str, folder: Path) -> None:
    """A decoder of opset 20, which 1.18 reads, with and without the library."""
    folder.mkdir()
    model, _ = shallow("llama")
    export_onnx(model, folder / "decoder.onnx", kv_cache=True, opset=20)
    shutil.copy(runtime.__file__, folder)
    ids, mask = (tensor.numpy() for tensor in prompts(3, 7))
    np.savez(folder / "prompt.npz", input_ids=ids, attention_mask=mask)
    done = subprocess.run([python, "-c", DECODE, library], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wanted = greedy_generate(str(folder / "decoder.onnx"), ids, mask, max_new_tokens=8)
    for number in range(2):
        np.testing.assert_array_equal(np.load(folder / f"tokens{number}.npy"), wanted)
