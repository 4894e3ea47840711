"""Compiling `liblte_ort.so`, the kernels of `lte::SparseFFN` for ONNX Runtime, with a C++17 compiler and nothing else.

CUDA kernels come as images that exporters/ort_images.py made; without them the library is one for CPUs.

Imports the standard library alone: setup.py loads this file where the package's dependencies are not installed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SOURCES: Final = Path(__file__).resolve().parent / "ort"
LIBRARY: Final = "liblte_ort.so"

# fp-contract: products are added with one rounding, in ISO mode too.
FLAGS: Final = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
# The compiler's runtime goes into the library, so that it runs where another version of it, or none, is installed;
# the map keeps that, and all but one function, to the library itself.
LINK_FLAGS: Final = ("-shared", "-static-libstdc++", "-static-libgcc", "-Wl,--no-undefined", "-ldl")
# Files that only run after the processor has been asked; the rest is for any processor.
INSTRUCTION_SETS: Final = {
    "simd_avx2.cpp": ("-mavx2", "-mfma", "-mf16c"),
    "simd_avx512.cpp": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"),
}

_COMPILERS: Final = ("c++", "g++", "clang++")


@dataclass(frozen=True, kw_only=True)
class OrtBuild:
    """A library that was built: its file, the compiler's own description of itself, and how long that took."""

    path: Path
    compiler: str
    seconds: float
    cuda: bool  # whether it has CUDA kernels


def source_digest() -> str:
    """Names the library that these sources make on this kind of machine: hexadecimal, 16 digits."""
    digest = hashlib.sha256(repr((FLAGS, LINK_FLAGS, INSTRUCTION_SETS, platform.machine())).encode())
    for file in sorted(file for kind in ("h", "inc", "cpp", "map") for file in SOURCES.rglob(f"*.{kind}")):
        digest.update(f"{file.relative_to(SOURCES)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def find_compiler(name: str | None = None) -> str:
    """The compiler's path: `name`, else the environment's CXX, else the system's.

    Raises:
        ValueError: there is none of that name, or none at all.
    """
    wanted = name or os.environ.get("CXX")
    for candidate in (wanted,) if wanted else _COMPILERS:
        if found := shutil.which(candidate):
            return found
    if wanted:
        origin = "" if name else ", which CXX names"
        raise ValueError(f"there is no compiler {wanted!r}{origin}; give the name or path of a C++17 compiler")
    raise ValueError(f"no C++ compiler found (tried {', '.join(_COMPILERS)}); install one, such as Debian's g++")


def build(
    target: Path, *, compiler: str | None = None, extra_flags: Sequence[str] = (), images: Path | None = None
) -> OrtBuild:
    """Compile the library to `target`, whose folder must exist. A failure leaves what was there.

    `images` is a folder that ort_images.py wrote; without one the library has no CUDA kernels.

    Raises:
        ValueError: no compiler, or the folder cannot be written.
        RuntimeError: the compiler failed, with its first messages.
    """
    start = time.perf_counter()
    found = find_compiler(compiler)
    try:
        folder = tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise ValueError(f"cannot write into {target.parent}: {error.strerror}; choose another folder") from error
    with folder as name:
        linked = _compile(Path(name), found, extra_flags, images)
        os.replace(linked, target)
    description = _run([found, "--version"]).splitlines()[0]
    return OrtBuild(path=target, compiler=description, seconds=time.perf_counter() - start, cuda=images is not None)


def _compile(folder: Path, compiler: str, extra_flags: Sequence[str], images: Path | None) -> Path:
    # The assembler looks for what .incbin names in the folders it is told of.
    cuda = () if images is None else ("-DLTE_CUDA", f"-I{images}", f"-Wa,-I{images}")
    commands = {
        str(folder / f"{number}.o"): [
            compiler,
            *FLAGS,
            *_instruction_set(source),
            *cuda,
            *extra_flags,
            "-c",
            str(source),
        ]
        for number, source in enumerate(sorted(SOURCES.rglob("*.cpp")))
        if images is not None or source.parent.name != "cuda"
    }
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(lambda target: _run([*commands[target], "-o", target]), commands):
            pass
    linked = folder / LIBRARY
    symbols = f"-Wl,--version-script={SOURCES / 'symbols.map'}"
    _run([compiler, *extra_flags, *commands, *LINK_FLAGS, symbols, "-o", str(linked)])
    return linked


def _instruction_set(source: Path) -> tuple[str, ...]:
    return INSTRUCTION_SETS.get(source.name, ()) if platform.machine() == "x86_64" else ()


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed with code {done.returncode}:\n{done.stderr[:2000].strip()}")
    return done.stdout
