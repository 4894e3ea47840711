"""The hand-written slice of ONNX Runtime's C ABI against an official header, where one is installed.

Debian's libonnxruntime-dev has it; ORT_C_API_HEADER names another.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from lte_compile.exporters.ort_build import SOURCES, find_compiler

ABI = (SOURCES / "abi.h").read_text()
HEADER_NAME = "onnxruntime_c_api.h"
HEADER_FOLDERS = ("/usr/include/onnxruntime", "/usr/include/onnxruntime/core/session", "/usr/local/include")


def body(start: str) -> str:
    return ABI.split(start, 1)[1].split("\n};", 1)[0]


SLOTS = {name: int(number) for name, number in re.findall(r"(\w+) = (\d+)", body("enum class Slot : size_t {"))}
MEMBERS = ["version", *re.findall(r"\(\*(\w+)\)", body("struct OrtCustomOp {"))]
CONSTANTS = set(re.findall(r"\b((?:ORT|ONNX|INPUT)_\w+|OrtMemTypeDefault) = \d+", ABI))


def official_header() -> Path:
    named = os.environ.get("ORT_C_API_HEADER")
    for candidate in [Path(named)] if named else [Path(folder) / HEADER_NAME for folder in HEADER_FOLDERS]:
        if candidate.is_file():
            return candidate
    pytest.skip(f"no official {HEADER_NAME}: install libonnxruntime-dev or set ORT_C_API_HEADER")


def test_the_slice_is_read_whole() -> None:
    assert SLOTS["KernelContext_ParallelFor"] == 274
    assert list(SLOTS.values()) == sorted(set(SLOTS.values()))
    assert (len(MEMBERS), len(CONSTANTS)) == (26, 9)


def test_slots_members_and_constants_are_the_official_ones(tmp_path: Path) -> None:
    header = official_header()
    checks = [f"offsetof(OrtApi, {name}) == {slot} * sizeof(void*)" for name, slot in SLOTS.items()]
    checks += [f"offsetof(OrtCustomOp, {name}) == offsetof(lte::abi::OrtCustomOp, {name})" for name in MEMBERS]
    checks += ["sizeof(OrtCustomOp) == sizeof(lte::abi::OrtCustomOp)"]
    checks += [f"static_cast<int>({name}) == static_cast<int>(lte::abi::{name})" for name in sorted(CONSTANTS)]
    source = tmp_path / "check.cpp"
    source.write_text(
        f'#include "{header}"\n#include "{SOURCES / "abi.h"}"\n'
        + "".join(f'static_assert({check}, "{check}");\n' for check in checks)
    )
    command = [find_compiler(), "-std=c++17", "-fsyntax-only", "-Wno-invalid-offsetof", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
