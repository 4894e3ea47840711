"""What a result file says about where it was made."""

from __future__ import annotations

import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from lte_compile.reports.results import Environment

_PACKAGES = ("lte-compile", "torch", "transformers", "triton", "onnx", "onnxruntime", "numpy")


def describe_environment() -> Environment:
    """Package versions, processor, threads, date and command line of this process."""
    return Environment(
        versions={"python": platform.python_version(), **_versions()},
        cpu=_processor(),
        threads=torch.get_num_threads(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # an optional extra that is not installed
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
