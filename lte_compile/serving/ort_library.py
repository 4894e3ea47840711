"""Where the kernels for ONNX Runtime are: in the package, or in the user's cache once they were built."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from lte_compile.data.cache import cache_root, cached_directory
from lte_compile.exporters import ort_images
from lte_compile.exporters.ort_build import LIBRARY, SOURCES, OrtBuild, build, find_compiler, source_digest

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
        "run `lte-compile build-ort`, which needs a C++17 compiler and a minute or two"
    )


def build_ort_library(
    out: str | Path | None = None, *, compiler: str | None = None, cuda: bool | None = None
) -> OrtBuild:
    """Compile the library into the folder `out`, or into the cache, where `ort_library_path` finds it.

    `cuda` says whether it has CUDA kernels too: by default where Triton is installed, which compiles them. It takes a
    minute or two the first time; the machine code is kept in the cache.

    Raises:
        ValueError: no such compiler, the folder or the cache cannot be written, or CUDA kernels without Triton.
        RuntimeError: a compiler failed.
    """
    target = _cached() if out is None else Path(out) / LIBRARY
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {target.parent}: {error.strerror}; choose another") from error
    found = find_compiler(compiler)  # before minutes of other work
    return build(target, compiler=found, images=_images() if _wants_cuda(cuda) else None)


def _wants_cuda(asked: bool | None) -> bool:
    has_triton = find_spec("triton") is not None
    if asked and not has_triton:
        raise ValueError("CUDA kernels are compiled by Triton, which is not installed; install it, or leave them out")
    return has_triton if asked is None else asked


def _images() -> Path:
    """Machine code of the CUDA kernels, from the cache where it is there already."""
    try:
        return cached_directory(f"ort-images/{ort_images.digest()}", _compile_images)
    except OSError as error:
        raise ValueError(
            f"cannot write into the cache {cache_root()}, which keeps CUDA kernels: {error.strerror}; "
            "set LTE_COMPILE_CACHE to another folder, or leave the CUDA kernels out"
        ) from error


def _compile_images(folder: Path) -> None:
    command = [sys.executable, str(ort_images.__file__), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"compiling the CUDA kernels failed with code {done.returncode}:\n{done.stderr[-2000:]}")


def _cached() -> Path:
    return cache_root() / "ort" / f"{source_digest()}-{ort_images.source_digest()}" / LIBRARY
