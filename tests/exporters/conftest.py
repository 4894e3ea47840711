"""The library of kernels for ONNX Runtime, compiled once for these sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from lte_compile.data.cache import cached_directory
from lte_compile.exporters import ort_images
from lte_compile.exporters.ort_build import LIBRARY, build, source_digest
from lte_compile.serving.ort_library import ort_library_path


@pytest.fixture(scope="session")
def no_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of all CUDA kernels without any code in them: no GPU here could run it."""
    folder = tmp_path_factory.mktemp("images")
    images = [
        ort_images.Image(
            name=variant.name,
            architecture=architecture,
            symbol=variant.kernel,
            parameters=variant.parameters,
            threads=32 * variant.warps,
            shared=16,
            dependent=architecture == 90,
            code=f"{variant.name} for {architecture}\0{variant.parameters}\0".encode(),  # as fake_cuda reads it
        )
        for variant in ort_images.variants()
        for architecture in (80, 90, 0)
    ]
    ort_images.write_images(images, folder)
    return folder


@pytest.fixture(scope="session")
def ort_library(no_code: Path) -> str:
    try:
        return str(ort_library_path())
    except RuntimeError:  # not built yet; compiling the CUDA kernels takes minutes

        def compile_library(folder: Path) -> None:
            build(folder / LIBRARY, images=no_code)

        key = f"ort-without-cuda-code/{source_digest()}-{ort_images.source_digest()}"
        return str(cached_directory(key, compile_library) / LIBRARY)
