"""Random nodes and inputs for the library, built with AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lte_compile.exporters.ort_build import LIBRARY, build, find_compiler
from tests.exporters.test_ort_library import instruction_sets

ROOT = Path(__file__).parents[2]
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g1")
STRICT = ("-Wpedantic", "-Wconversion", "-Wshadow", "-Werror")


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory, no_code: Path) -> str:
    target = tmp_path_factory.mktemp("sanitized") / LIBRARY
    return str(build(target, extra_flags=(*SANITIZE, *STRICT), images=no_code).path)


def runtime_of(name: str) -> str:
    """Where the compiler keeps a sanitizer's library."""
    command = [find_compiler(), f"-print-file-name=lib{name}.so"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def fuzz(library: str, first: int, end: int, monkeypatch: pytest.MonkeyPatch, ort_library: str) -> str:
    """What the last line says: "done", or the seed at which something went wrong, and how."""
    sets = instruction_sets(ort_library, monkeypatch)
    command = [sys.executable, "-m", "tests.exporters.fuzz_ort", library, "--seeds", str(first), str(end)]
    environment = {
        **os.environ,
        "LD_PRELOAD": f"{runtime_of('asan')}:{runtime_of('ubsan')}",  # before Python, which is not instrumented
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and ONNX Runtime free little at their end
        "PYTHONMALLOC": "malloc",  # so that numpy's arrays are guarded too
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [*command, "--instruction-sets", *sets], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines() or ["before the first seed"]
    return lines[-1] if done.returncode == 0 else f"{lines[-1]}\n{done.stderr[-4000:]}"


def test_random_nodes(sanitized: str, ort_library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fuzz(sanitized, 0, 500, monkeypatch, ort_library) == "done"


@pytest.mark.slow
@pytest.mark.parametrize("first", range(500, 10_500, 1_000))
def test_many_random_nodes(first: int, sanitized: str, ort_library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fuzz(sanitized, first, first + 1_000, monkeypatch, ort_library) == "done"
