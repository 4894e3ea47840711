"""The library of kernels for ONNX Runtime, compiled once for these sources."""

from __future__ import annotations

import pytest

from lte_compile.ort_library import build_ort_library, ort_library_path


@pytest.fixture(scope="session")
def ort_library() -> str:
    try:
        return str(ort_library_path())
    except RuntimeError:  # not built yet
        return str(build_ort_library().path)
