"""The library's CUDA part as far as a machine without a GPU shows it: kernels compiled ahead of time, and which of them
are launched for which call, with a driver and a cuBLAS of these tests (tests/exporters/fake_cuda)."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from lte_compile.exporters import ort_images
from lte_compile.exporters.ort_build import SOURCES, find_compiler
from lte_compile.serving.ort_library import build_ort_library

HERE = Path(__file__).parent / "fake_cuda"
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1")
STRICT = ("-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror")
FLOAT, HALF, BFLOAT = 0, 2, 14


@dataclass(frozen=True)
class Fake:
    """The host program, and folders of libraries for it."""

    program: Path
    with_driver: Path
    with_both: Path

    def run(
        self, *words: object, libraries: Path | None = None, **environment: object
    ) -> subprocess.CompletedProcess[str]:
        variables = {name: str(value) for name, value in environment.items()}
        found = str(self.with_both if libraries is None else libraries)
        return subprocess.run(
            [str(self.program), *map(str, words)],
            env={**os.environ, "LD_LIBRARY_PATH": found, "ASAN_OPTIONS": "detect_leaks=0", **variables},
            capture_output=True,
            text=True,
            check=False,
        )

    def launched(self, *words: object, libraries: Path | None = None, **environment: object) -> list[str]:
        """What a call put on the stream, in order: kernels by name, and products."""
        done = self.run("run", *words, libraries=libraries, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return re.findall(r"^(?:launch (\S+) for .*|multiply.*)$", done.stdout, re.MULTILINE)


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory, no_code: Path) -> Fake:
    folder = tmp_path_factory.mktemp("fake")
    result = Fake(folder / "main", folder / "driver", folder / "both")
    for libraries in (result.with_driver, result.with_both):
        libraries.mkdir()
        compile_files([HERE / "driver.cpp"], libraries / "libcuda.so.1", "-shared", "-fPIC")
    compile_files([HERE / "blas.cpp"], result.with_both / "libcublas.so.13", "-shared", "-fPIC")
    sources = [file for file in (SOURCES / "cuda").glob("*.cpp") if file.name != "op.cpp"]
    where = (f"-I{SOURCES}", f"-I{no_code}", f"-Wa,-I{no_code}")
    compile_files([HERE / "main.cpp", *sources], result.program, *SANITIZE, *STRICT, *where, "-ldl")
    return result


def compile_files(sources: list[Path], target: Path, *flags: str) -> None:
    command = [find_compiler(), "-std=c++17", *map(str, sources), *flags, "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# TYPE GATED TOKENS D F E S SHIFT [C], with a down bias where SHIFT is 0
@pytest.mark.parametrize(
    "call, wanted",
    [
        ((HALF, 1, 1, 64, 96, 6, 16, 0), ["one.up/fp16/gated/wide", "one.down/fp16/512/wide"]),
        ((HALF, 0, 1, 64, 96, 6, 16, 0), ["one.up/fp16/plain/wide", "one.down/fp16/512/wide"]),
        ((HALF, 0, 1, 576, 1536, 48, 32, 0), ["one.up/fp16/plain/wide", "one.down/fp16/512/32"]),
        ((FLOAT, 1, 1, 60, 96, 6, 16, 0), ["one.up/fp32/gated/any", "one.down/fp32/2048/any"]),
        ((BFLOAT, 1, 1, 64, 96, 6, 16, 2), ["one.up/bf16/gated/any", "one.down/bf16/2048/any"]),
        ((HALF, 1, 1, 64, 1026, 513, 2, 0), ["one.up/fp16/gated/wide", "one.down/fp16/2048/wide"]),
        (
            (HALF, 1, 1, 4096, 11008, 344, 32, 0),
            ["large.scores/fp16/4096", "large.up/fp16/gated/4096", "large.down/fp16"],
        ),
        (
            (BFLOAT, 0, 1, 1600, 6400, 200, 32, 0),
            ["large.scores/bf16/2048", "large.up/bf16/plain/2048", "large.down/bf16"],
        ),
        (
            (HALF, 0, 1, 5120, 13824, 432, 32, 0),
            ["large.scores/fp16/8192", "large.up/fp16/plain/8192", "large.down/fp16"],
        ),
        ((HALF, 0, 1, 4096, 11008, 688, 16, 0), ["one.up/fp16/plain/wide", "one.down/fp16/2048/wide"]),
        ((FLOAT, 0, 1, 4096, 11008, 344, 32, 0), ["one.up/fp32/plain/wide", "one.down/fp32/512/32"]),
        ((HALF, 1, 2, 64, 96, 6, 16, 0), ["few.scores/fp16/16", "few.up/fp16/gated/16", "few.down/fp16/16/512"]),
        ((BFLOAT, 0, 17, 64, 96, 6, 16, 0), ["few.scores/bf16/64", "few.up/bf16/plain/64", "few.down/bf16/64/512"]),
        ((FLOAT, 0, 16, 64, 96, 6, 16, 0), ["few.scores/fp32/16", "few.up/fp32/plain/16", "few.down/fp32/16/512"]),
        ((HALF, 1, 65, 64, 96, 6, 16, 0), ["prompt.fill/fp16", "", "", "", "prompt.mask/fp16/gated", ""]),
        ((FLOAT, 0, 17, 64, 96, 6, 16, 0), ["prompt.fill/fp32", "", "", "prompt.mask/fp32/plain", ""]),
        ((HALF, 0, 5, 64, 96, 8, 12, 0), ["prompt.fill/fp16", "", "", "prompt.mask/fp16/plain", ""]),
        ((HALF, 0, 1, 64, 4098, 2049, 2, 0), ["prompt.fill/fp16", "", "", "prompt.mask/fp16/plain", ""]),
        ((HALF, 0, 3000, 64, 96, 6, 16, 0), ["prompt.fill/fp16", "", "", "prompt.mask/fp16/plain", ""] * 2),
        ((HALF, 0, 70, 64, 96, 6, 16, 16), ["", "", "prompt.mask/fp16/plain", ""]),
        ((HALF, 0, 1, 64, 0, 0, 16, 16), ["prompt.fill/fp16"]),
        ((HALF, 1, 1, 64, 96, 6, 16, 0, 80), ["one.up/fp16/gated/wide", "one.down/fp16/512/wide"]),
        ((HALF, 1, 1, 64, 96, 6, 16, 0, 81), ["one.up/fp16/gated/any", "one.down/fp16/2048/any"]),
        ((HALF, 1, 2, 64, 96, 6, 16, 0, 80), ["few.scores/fp16/16", "few.up/fp16/gated/16", "few.down/fp16/16/512"]),
        (
            (HALF, 1, 1, 4096, 11008, 344, 32, 0, 5120),
            ["large.scores/fp16/8192", "large.up/fp16/gated/4096", "large.down/fp16"],
        ),
        ((HALF, 1, 1, 4096, 11008, 344, 32, 0, 8208), ["one.up/fp16/gated/wide", "one.down/fp16/512/32"]),
        ((HALF, 0, 3000, 64, 96, 6, 16, 0, 80), ["prompt.fill/fp16", "", "", "prompt.mask/fp16/plain", ""] * 2),
    ],
    ids=str,
)
def test_the_dispatcher(call: tuple[int, ...], wanted: list[str], fake: Fake) -> None:
    """Products are empty names."""
    assert fake.launched(*call) == wanted


def names_and_values(output: str) -> list[dict[str, float]]:
    """Of every launch, the arguments by the names that the kernel has for them."""
    variants = {variant.name: variant for variant in ort_images.variants()}
    launches = []
    for name, arguments in re.findall(r"^launch (\S+) for .*\n((?:argument .*\n)*)", output, re.MULTILINE):
        *values, scratch, profile = map(float, re.findall(r"argument (\S+)", arguments))
        assert scratch == profile == 0
        launches.append(dict(zip(ort_images.argument_types(variants[name]), values, strict=True)))
    return launches


TENSORS = ("x", "router", "router_bias", "up", "gate", "down", "up_bias", "gate_bias", "down_bias")


@pytest.mark.parametrize("tokens", [1, 5, 40, 70])
@pytest.mark.parametrize("dtype", [FLOAT, HALF, BFLOAT])
@pytest.mark.parametrize("gated", [0, 1], ids=["plain", "gated"])
@pytest.mark.parametrize("sizes", [(576, 1536, 32), (64, 96, 16), (4096, 11008, 32), (60, 130, 7)], ids=str)
@pytest.mark.parametrize("columns", [0, 80], ids=["router reads x", "router reads another tensor"])
def test_arguments_are_what_the_kernels_call_them(
    columns: int, sizes: tuple[int, int, int], gated: int, dtype: int, tokens: int, fake: Fake
) -> None:
    width, neurons, expert_size = sizes
    experts = -(-neurons // expert_size)
    done = fake.run("run", dtype, gated, tokens, width, neurons, experts, expert_size, 0, columns)
    sizes_by_name = {"D": width, "F": neurons, "E": experts, "EXPERTS": experts, "EXPERT_SIZE": expert_size}
    wanted = {**sizes_by_name, "ROW_STRIDE": width, "tokens": tokens, "tau": 0.5, "constants": 3, "number": 3}
    wanted |= {f"{name}_ptr": 2**24 + 256 * place for place, name in enumerate(TENSORS)}
    wanted |= {"x_ptr": 2**25, "y_ptr": 2**26}
    router_x, router_width = (2**27, columns) if columns else (2**25, width)
    wanted |= {"router_x_ptr": router_x, "ROUTER_D": router_width}
    wanted |= {"bias_ptr": wanted["down_bias_ptr"], "COUNTERS": -(-width // ort_images.TILES["few_down_columns"])}
    if tokens == 1:
        del wanted["COUNTERS"]  # of either of two kernels
    launches = names_and_values(done.stdout)
    assert launches
    scratch: dict[str, float] = {}
    for place, launch in enumerate(launches):
        masked = {"up_ptr", "gate_ptr"} if "scores_ptr" in launch else set()  # there, of what cuBLAS wrote
        only_scores = "router_ptr" in launch and "up_ptr" not in launch
        asked = wanted | ({"x_ptr": router_x, "D": router_width} if only_scores else {})
        for name in launch.keys() & wanted.keys() - masked:
            assert launch[name] == asked[name], name
        for name in (name for name in launch if name.endswith("_ptr") and name not in wanted):
            array = f"{name} {place}" if name == "lists_ptr" else name  # every launch writes its own
            assert launch[name] == scratch.setdefault(array, launch[name]), name
    assert all(address >= 2**30 for address in scratch.values())
    assert len(set(scratch.values())) == len(scratch)  # no two arrays in one place


def test_structures_are_those_of_the_drivers_header(tmp_path: Path) -> None:
    """Triton's wheel has the header."""
    triton = find_spec("triton")
    assert triton is not None
    assert triton.origin is not None
    header = Path(triton.origin).parent / "backends" / "nvidia" / "include" / "cuda.h"
    text = (SOURCES / "cuda" / "driver.cpp").read_text()
    structures = "".join(re.findall(r"^struct Launch\w+ \{.*?^\};\n", text, re.MULTILINE | re.DOTALL))
    numbers = "".join(re.findall(r"^constexpr int .*?;", text, re.MULTILINE | re.DOTALL))
    checks = {
        "sizeof(LaunchConfig) == sizeof(CUlaunchConfig)",
        "offsetof(LaunchConfig, block) == offsetof(CUlaunchConfig, blockDimX)",
        "offsetof(LaunchConfig, shared) == offsetof(CUlaunchConfig, sharedMemBytes)",
        "offsetof(LaunchConfig, stream) == offsetof(CUlaunchConfig, hStream)",
        "offsetof(LaunchConfig, attributes) == offsetof(CUlaunchConfig, attrs)",
        "offsetof(LaunchConfig, attribute_count) == offsetof(CUlaunchConfig, numAttrs)",
        "sizeof(LaunchAttribute) == sizeof(CUlaunchAttribute)",
        "offsetof(LaunchAttribute, value) == offsetof(CUlaunchAttribute, value)",
        "kProgrammaticStreamSerialization == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION",
        "kMaxDynamicShared == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES",
        "kMultiprocessors == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT",
        "kCapabilityMajor == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR",
        "kCapabilityMinor == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR",
        "kNoBinaryForGpu == CUDA_ERROR_NO_BINARY_FOR_GPU",
        "kInvalidImage == CUDA_ERROR_INVALID_IMAGE",
        "kInvalidPtx == CUDA_ERROR_INVALID_PTX",
        "kUnsupportedPtx == CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
        "kInvalidSource == CUDA_ERROR_INVALID_SOURCE",
    }
    source = tmp_path / "check.cpp"
    source.write_text(
        f'#include "{header}"\n#include <cstddef>\nstruct Stream;\n{structures}{numbers}\n'
        + "".join(f"static_assert({check});\n" for check in sorted(checks))
    )
    compile_files([source], tmp_path / "check.o", "-c")


def test_every_token_alone_where_the_process_has_no_blas(fake: Fake) -> None:
    launched = fake.launched(HALF, 1, 65, 64, 96, 6, 16, 0, libraries=fake.with_driver)
    assert launched == ["one.up/fp16/gated/wide", "one.down/fp16/512/wide"] * 65
    done = fake.run("run", HALF, 1, 1, 64, 4098, 2049, 2, 0, libraries=fake.with_driver)
    assert "more than 2048 experts need cuBLAS, which is not in this process" in done.stdout


@pytest.mark.parametrize("capability, architecture", [(80, 80), (86, 80), (89, 80), (90, 90), (100, 0), (120, 0)])
def test_images_are_chosen_by_capability(capability: int, architecture: int, fake: Fake) -> None:
    """Machine code of the same major version and no higher a minor one, else PTX. Launches overlap on 9.0 alone."""
    done = fake.run("run", HALF, 1, 1, 64, 96, 6, 16, 0, FAKE_CAPABILITY=capability)
    found = re.findall(r"for (\d+), grid .*, attributes (\d)", done.stdout)
    assert found == [(str(architecture), "1" if architecture == 90 else "0")] * 2


def test_ptx_where_the_driver_refuses_the_machine_code(fake: Fake) -> None:
    done = fake.run("run", HALF, 1, 1, 64, 96, 6, 16, 0, FAKE_REFUSED=90)
    assert re.findall(r"for (\d+), grid", done.stdout) == ["0", "0"]


def test_an_older_gpu_and_a_missing_driver_are_said(fake: Fake, tmp_path: Path) -> None:
    call = ("run", HALF, 1, 1, 64, 96, 6, 16, 0)
    done = fake.run(*call, FAKE_CAPABILITY=75)
    assert "for compute capability 7.5; 8.0 is the least" in done.stdout
    (tmp_path / "libcuda.so.1").write_text("not a library")
    done = fake.run(*call, libraries=tmp_path)
    assert "there is no CUDA driver (libcuda.so.1) on this machine" in done.stdout


@pytest.mark.parametrize("sizes", [(3, 5, 4, 0), (3, 5, 4, 1), (1, 7, 2, 1), (6, 1, 3, 0)], ids=str)
def test_products_are_row_major(sizes: tuple[int, ...], fake: Fake) -> None:
    assert fake.run("multiply", *sizes).returncode == 0


def test_one_of_each_kernel_compiles_for_every_architecture(tmp_path: Path) -> None:
    kernels: dict[str, ort_images.Variant] = {}
    for variant in ort_images.variants():
        if variant.dtype == "fp16":
            kernels.setdefault(variant.module + variant.kernel, variant)
    assert len(kernels) == 10
    images = [
        image
        for variant in kernels.values()
        for target in ort_images.TARGETS
        for image in ort_images.compile_variant(variant, target)
    ]
    assert {image.architecture for image in images} == {0, 80, 86, 89, 90}
    ort_images.write_images(images, tmp_path)
    blob, rows = (tmp_path / "images.bin").read_bytes(), (tmp_path / "images.inc").read_text().splitlines()
    for row in rows:
        name, architecture, *_, start, size = row.strip("{},").split(", ")
        code = blob[int(start) : int(start) + int(size)]
        assert code.startswith(b"//" if architecture == "0" else b"\x7fELF"), name
        assert architecture != "0" or code.endswith(b"\0")


def test_without_triton_there_are_no_cuda_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images: list[Path | None] = []
    monkeypatch.setattr("lte_compile.serving.ort_library.find_spec", lambda name: None)
    monkeypatch.setattr("lte_compile.serving.ort_library.build", lambda target, **given: images.append(given["images"]))
    with pytest.raises(ValueError, match="CUDA kernels are compiled by Triton, which is not installed"):
        build_ort_library(tmp_path, cuda=True)
    build_ort_library(tmp_path)
    assert images == [None]


@pytest.mark.slow
def test_all_kernels_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LTE_COMPILE_CACHE", str(tmp_path))
    built = build_ort_library(cuda=True)
    assert built.cuda
    assert built.path.stat().st_size > 2**20
