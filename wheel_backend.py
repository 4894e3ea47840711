"""setuptools as the build backend, with what wheels alone need: Triton, to compile the CUDA kernels of liblte_ort.so.

It is 200 MB, so editable installations and source distributions go without; pyproject.toml has one list for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

TRITON = "triton>=3.6; platform_system == 'Linux' and platform_machine == 'x86_64'"


def get_requires_for_build_wheel(config_settings: Mapping[str, Any] | None = None) -> list[str]:
    """setuptools' own, and Triton where the wheel carries the library."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), TRITON]
