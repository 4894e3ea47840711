"""What pyproject.toml cannot say: wheels carry liblte_ort.so, compiled by the machine that builds them.

Its CUDA kernels are compiled by Triton, which wheel_backend.py asks for; with `--no-build-isolation`, by the
environment's, where there is one.
"""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py


def _load_builder() -> ModuleType:
    """exporters/ort_build.py by its path: importing the package needs torch, which is not here yet."""
    path = Path(__file__).parent / "exporters" / "ort_build.py"
    spec = importlib.util.spec_from_file_location("ort_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


ort_build = _load_builder()


def _why_not() -> str | None:
    """Why this machine builds a wheel without the library, or None."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return "it is built for Linux on x86-64 only"
    try:
        ort_build.find_compiler()
    except ValueError as error:
        return str(error)
    return None


def _build_library(folder: Path) -> None:
    """With CUDA kernels if Triton is there to compile them."""
    with tempfile.TemporaryDirectory() as images:
        has_triton = importlib.util.find_spec("triton") is not None
        if has_triton:
            script = Path(__file__).parent / "exporters" / "ort_images.py"
            subprocess.run([sys.executable, str(script), images], check=True)
        else:
            warnings.warn(f"{ort_build.LIBRARY} has no CUDA kernels: Triton is not installed", stacklevel=2)
        ort_build.build(folder / ort_build.LIBRARY, images=Path(images) if has_triton else None)


class BuildWithLibrary(build_py):
    """Also compiles the library, except for an editable installation, where `lte-compile build-ort` does."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        reason = _why_not()
        if reason is None:
            folder = Path(self.build_lib) / "lte_compile" / "exporters" / "ort"
            folder.mkdir(parents=True, exist_ok=True)
            _build_library(folder)
        else:
            warnings.warn(f"this wheel has no {ort_build.LIBRARY}: {reason}", stacklevel=2)


class PlatformDistribution(Distribution):
    """Machine code makes a wheel one for a platform."""

    def has_ext_modules(self) -> bool:
        return _why_not() is None


class AnyPythonWheel(bdist_wheel):
    """The machine code is not a Python extension: it fits every interpreter."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    distclass=PlatformDistribution,
    cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": AnyPythonWheel},
)
