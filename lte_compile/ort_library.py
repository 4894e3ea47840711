"""Where the kernels for ONNX Runtime are: in the package, or in the user's cache once they were built."""

from __future__ import annotations

from pathlib import Path

from lte_compile.data.cache import cache_root
from lte_compile.exporters.ort_build import LIBRARY, SOURCES, OrtBuild, build, source_digest

__all__ = ["OrtBuild", "build_ort_library", "ort_library_path"]


def ort_library_path() -> Path:
    """The library to register with ONNX Runtime, which then runs `lte::SparseFFN` with kernels that skip experts.

        options.register_custom_ops_library(str(lte_compile.ort_library_path()))

    Wheels for Linux on x86-64 carry it; elsewhere `lte-compile build-ort` builds it once for this version's sources.

    Raises:
        RuntimeError: neither is there.
    """
    for library in (SOURCES / LIBRARY, _cached()):
        if library.is_file():
            return library
    raise RuntimeError(
        f"{LIBRARY} is neither in the package nor in the cache ({_cached()}); "
        "run `lte-compile build-ort`, which needs a C++17 compiler and some seconds"
    )


def build_ort_library(out: str | Path | None = None, *, compiler: str | None = None) -> OrtBuild:
    """Compile the library into the folder `out`, or into the cache, where `ort_library_path` finds it.

    Raises:
        ValueError: no such compiler, or the folder cannot be written.
        RuntimeError: the compiler failed.
    """
    target = _cached() if out is None else Path(out) / LIBRARY
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {target.parent}: {error.strerror}; choose another") from error
    return build(target, compiler=compiler)


def _cached() -> Path:
    return cache_root() / "ort" / source_digest() / LIBRARY
