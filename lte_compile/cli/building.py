"""lte-compile build-ort: compile the kernels for ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter

from lte_compile.cli.output import Outcome, facts_table
from lte_compile.serving.ort_library import build_ort_library


def build_library(out: Path | None, compiler: str | None, cuda: bool | None) -> Outcome:
    """Build, and say where the library is and how to use it."""
    start = perf_counter()
    built = build_ort_library(out, compiler=compiler, cuda=cuda)
    seconds = round(perf_counter() - start, 1)  # Triton's part too, unless its images were cached
    facts = {
        "library": str(built.path),
        "compiler": built.compiler,
        "CUDA kernels": "yes" if built.cuda else "no: such nodes run on the CPU",
        "seconds": seconds,
        "size": f"{built.path.stat().st_size / 1e6:.1f} MB",
    }
    document = {"library": str(built.path), "compiler": built.compiler, "cuda": built.cuda}
    document |= {"seconds": seconds, "size": built.path.stat().st_size}
    hint = f'session_options.register_custom_ops_library("{built.path}")'
    return Outcome(document, (facts_table("ONNX Runtime kernels", facts), hint))
