"""The Triton kernels of `lte::SparseFFN`, compiled ahead of time into the images that liblte_ort.so carries.

Run as a program where Triton is installed; neither torch nor a GPU nor the CUDA toolkit is needed, as Triton brings the
assembler. Writes `images.bin`, a table of what is where in it, and the tiles' sizes.

    python exporters/ort_images.py FOLDER [--jobs N]

An image is one kernel for one architecture. Shapes, the activation and the expert size are arguments, so that an image
serves every model; a bias that is missing is an array of zeros.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, Final

# This kernel reads the router before it waits for what comes before it on the stream. In ONNX Runtime that may be the
# node that writes the router, so it is not launched early.
READS_AHEAD: Final = "score_expert"
ROOT: Final = Path(__file__).resolve().parent.parent  # where kernels/ lies, in a checkout and installed

# What Triton compiles for, and the assembler's targets of each. The PTX of the fallback serves every other GPU: it is
# kept to the shared memory of 8.6 and 8.9, the least there is (CUDA C++ Programming Guide, technical specifications),
# and to the PTX of CUDA 12.0.
TARGETS: Final[Mapping[int, tuple[int, ...]]] = {90: (90,), 80: (80, 86, 89)}
FALLBACK: Final = 80
FALLBACK_PTX: Final = 80
MAX_SHARED: Final[Mapping[int, int]] = {80: 99 * 1024, 90: 227 * 1024}

DTYPES: Final = ("fp32", "fp16", "bf16")
LISTS: Final = (512, 2048)  # experts that a kernel can list
PAPER_SIZE: Final = (
    32  # neurons of an expert (arXiv 2402.06126, section 4.1), for which some kernels are compiled apart
)
# Tokens of a kernel for a few. Float32 is multiplied without tensor cores: more tokens than 16 go to cuBLAS.
TOKENS: Final[Mapping[str, tuple[int, ...]]] = {"fp32": (16,), "fp16": (16, 64), "bf16": (16, 64)}
# Tiles, as in kernels/triton_decode.py and kernels/triton_batch.py; exporters/ort/cuda sizes grids and scratch by them.
WIDTHS: Final = (2048, 4096, 8192)  # of rows that are kept in registers whole
TILES: Final[Mapping[str, int]] = {
    "large_up_warps": 24,  # to a multiprocessor
    "large_down_columns": 64,
    "large_down_splits": 8,
    "one_up_rows": 4,
    "one_down_columns": 256,
    "one_down_splits": 32,
    "few_score_experts": 16,
    "few_score_columns": 128,
    "few_score_splits": 8,
    "few_up_neurons": 32,
    "few_down_columns": 64,
    "few_down_splits": 8,
    "mask_neurons": 1024,
    "fill_columns": 1024,
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One kernel and what is fixed in it."""

    name: str  # by which exporters/ort/cuda asks for it
    module: str  # of lte_compile.kernels
    kernel: str
    dtype: str
    constants: Mapping[str, Any]
    warps: int
    aligned: tuple[str, ...] = ()  # arguments that are multiples of 16; "*" for all pointers

    @property
    def parameters(self) -> str:
        """As in `Image`. Triton adds two pointers, to scratch memory that these kernels do not use."""
        letters = {"i32": "i", "fp32": "f"}
        return "".join(letters.get(kind, "p") for kind in argument_types(self).values()) + "pp"


@dataclass(frozen=True, kw_only=True)
class Image:
    """Machine code (or, for architecture 0, PTX) of a variant, and how to launch it."""

    name: str
    architecture: int
    symbol: str
    parameters: str  # a letter each: p pointer, i int32, f float32
    threads: int
    shared: int
    dependent: bool  # launched before the launch before it has ended: programmatic dependent launch, on 9.0
    code: bytes


def variants() -> Iterator[Variant]:
    """All of them. `wide` ones read 16 bytes at a time; for one token, `any` ones serve every size and alignment."""
    for dtype in DTYPES:
        yield from _for_one_token(dtype, "wide", LISTS)
        yield from _for_one_token(dtype, "any", LISTS[-1:])
        if dtype != "fp32":
            yield from _for_one_token_of_large_layers(dtype)
        for tokens in TOKENS[dtype]:
            yield from _for_few_tokens(dtype, tokens)
        yield from _for_a_prompt(dtype)


def _for_one_token(dtype: str, width: str, lists: tuple[int, ...]) -> Iterator[Variant]:
    aligned = ("*", "D", "ROUTER_D", "ROW_STRIDE") if width == "wide" else ()
    for gated in (False, True):
        constants = _activation(gated) | {"BIAS_STRIDE": 1, "ROWS": TILES["one_up_rows"], "BLOCK": 1024, "STAGES": 1}
        yield Variant(
            name=f"one.up/{dtype}/{_kind(gated)}/{width}",
            module="decode_kernels",
            kernel="route_up",
            dtype=dtype,
            constants=constants,
            warps=4,
            aligned=aligned,
        )
    sizes = {"ROWS": 32, "BLOCK": TILES["one_down_columns"], "SPLITS": TILES["one_down_splits"], "STAGES": 1}
    down = partial(Variant, module="decode_kernels", kernel="down", dtype=dtype, warps=2, aligned=aligned)
    for experts in lists:
        yield down(name=f"one.down/{dtype}/{experts}/{width}", constants={**sizes, "EXPERTS_PADDED": experts})
    if width == "wide":
        known = {"EXPERTS_PADDED": LISTS[0], "EXPERT_SIZE": PAPER_SIZE}
        yield down(name=f"one.down/{dtype}/{LISTS[0]}/{PAPER_SIZE}", constants={**sizes, **known})


def _for_one_token_of_large_layers(dtype: str) -> Iterator[Variant]:
    """Of experts of PAPER_SIZE: dividing by a size that is known saves a tenth of the time."""
    large = partial(Variant, module="decode_list_kernels", dtype=dtype, aligned=("*", "D", "ROW_STRIDE"))
    token = {"tokens": 1, "TOKENS": 1}
    lists = {**token, "EXPERTS_PADDED": LISTS[0], "EXPERT_SIZE": PAPER_SIZE, "STAGES": 1}
    for width in WIDTHS:
        yield large(
            name=f"large.scores/{dtype}/{width}", kernel="score_expert", constants={**token, "WIDTH": width}, warps=4
        )
        for gated in (False, True):
            yield large(
                name=f"large.up/{dtype}/{_kind(gated)}/{width}",
                kernel="compute_hidden",
                constants={**_activation(gated), **lists, "WIDTH": width, "BIAS_STRIDE": 1},
                warps=large_up_warps(width),
            )
    sizes = {"ROWS": 128, "BLOCK": TILES["large_down_columns"], "SPLITS": TILES["large_down_splits"]}
    yield large(name=f"large.down/{dtype}", kernel="project_down", constants={**lists, **sizes}, warps=4)


def large_up_warps(width: int) -> int:
    """Every thread holds 64 bytes of a row of two-byte elements."""
    return width * 2 // (32 * 64)


def _for_few_tokens(dtype: str, tokens: int) -> Iterator[Variant]:
    few = partial(Variant, module="batch_kernels", dtype=dtype, warps=4, aligned=("*", "D", "F", "EXPERT_SIZE"))
    columns = TILES["few_score_columns"]
    yield few(
        name=f"few.scores/{dtype}/{tokens}",
        kernel="score_parts",
        constants={
            "TOKENS": tokens,
            "BLOCK_EXPERTS": TILES["few_score_experts"],
            "BLOCK": columns,
            "UPCAST": False,
            "STAGES": 4,
        },
    )
    block, stages = (64, 3) if dtype == "fp32" else (128, 4)
    for gated in (False, True):
        sizes = {"TOKENS": tokens, "NEURONS": TILES["few_up_neurons"], "BLOCK": block, "STAGES": stages}
        sizes["SCORE_PARTS"] = TILES["few_score_splits"]  # an unknown number would be read one after the other
        yield few(
            name=f"few.up/{dtype}/{_kind(gated)}/{tokens}",
            kernel="gate_up",
            constants=_activation(gated) | sizes,
        )
    for experts in LISTS:
        sizes = {"TOKENS": tokens, "NEURONS": 32, "BLOCK": TILES["few_down_columns"], "STAGES": 6}
        sizes["SPLITS"] = TILES["few_down_splits"]
        yield few(
            name=f"few.down/{dtype}/{tokens}/{experts}",
            kernel="down",
            constants={"EXPERTS_PADDED": experts} | sizes,
        )


def _for_a_prompt(dtype: str) -> Iterator[Variant]:
    serving = partial(Variant, module="serving_kernels", dtype=dtype, warps=4)
    for gated in (False, True):
        pointers = {} if gated else {"gate_ptr": None, "gate_bias_ptr": None}
        constants = {"BLOCK": TILES["mask_neurons"]} | pointers
        yield serving(name=f"prompt.mask/{dtype}/{_kind(gated)}", kernel="mask_hidden", constants=constants)
    yield serving(name=f"prompt.fill/{dtype}", kernel="fill_rows", constants={"BLOCK": TILES["fill_columns"]})


def _kind(gated: bool) -> str:
    return "gated" if gated else "plain"


def _activation(gated: bool) -> dict[str, Any]:
    """Called as the function of a region program is; its constants are the number of the activation."""
    given: dict[str, Any] = {"ACTIVATION": f"{_kind(gated)}_hidden", "IS_PROGRAM": True}
    return given if gated else given | {"gate_ptr": None, "gate_bias_ptr": None}


def compile_variant(variant: Variant, target: int) -> list[Image]:
    """The variant's images for one of TARGETS.

    Raises:
        RuntimeError: it needs more shared memory than the target has, or takes other arguments than its signature says.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": variant.warps} | ({"ptx_version": FALLBACK_PTX} if target == FALLBACK else {})
    is_dependent = variant.module != "serving_kernels" and target >= 90
    compiled = triton.compile(_source(variant, is_dependent), target=GPUTarget("cuda", target, 32), options=options)
    if compiled.metadata.shared > MAX_SHARED[target]:
        raise RuntimeError(f"{variant.name}: {compiled.metadata.shared} bytes of shared memory on sm_{target}")
    ptx = compiled.asm["ptx"]
    if parameters_of(ptx) != variant.parameters:
        raise RuntimeError(f"{variant.name} takes {parameters_of(ptx)}, not {variant.parameters}")
    codes = {number: assemble(ptx, number) if number != target else compiled.asm["cubin"] for number in TARGETS[target]}
    if target == FALLBACK:
        codes[0] = ptx.encode() + b"\0"
    return [
        Image(
            name=variant.name,
            architecture=number,
            symbol=compiled.metadata.name,
            parameters=variant.parameters,
            threads=32 * variant.warps,
            shared=compiled.metadata.shared,
            dependent=is_dependent and variant.kernel != READS_AHEAD,
            code=code,
        )
        for number, code in codes.items()
    ]


def _source(variant: Variant, is_dependent: bool) -> Any:
    from triton.compiler import ASTSource

    kernel, types = kernels(variant.module)[variant.kernel], argument_types(variant)
    constants = dict(variant.constants)
    if "DEPENDENT" in kernel.arg_names:  # 2: the last launch starts while the one before it runs (triton_launch.py)
        constants["DEPENDENT"] = (2 if variant.module == "decode_list_kernels" else 1) if is_dependent else 0
    if "ACTIVATION" in constants:
        constants["ACTIVATION"] = kernels("serving_kernels")[constants["ACTIVATION"]]
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(signature.items())
        if kind != "constexpr" and (name in variant.aligned or (kind[0] == "*" and "*" in variant.aligned))
    }
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=aligned)


def argument_types(variant: Variant) -> dict[str, str]:
    """Triton's type of each argument that a launch passes, in order."""
    names = kernels(variant.module)[variant.kernel].arg_names
    passed = (name for name in names if name not in variant.constants and name != "DEPENDENT")
    return {name: _argument_type(variant, name) for name in passed}


def _argument_type(variant: Variant, name: str) -> str:
    if not name.endswith("_ptr"):
        return "fp32" if name == "tau" else "i32"
    if name in ("active_ptr", "arrived_ptr", "selected_ptr", "lists_ptr"):
        return "*i32"
    if name == "hidden_ptr":  # one token's stays in float32 between the launches
        return f"*{variant.dtype}" if variant.module == "batch_kernels" else "*fp32"
    return "*fp32" if name in ("partial_ptr", "parts_ptr", "scores_ptr") else f"*{variant.dtype}"


def kernels(module: str) -> Mapping[str, Any]:
    """A module of lte_compile.kernels, without running lte_compile/__init__.py, which imports torch."""
    if "lte_compile" not in sys.modules:
        package = ModuleType("lte_compile")
        package.__path__ = [str(ROOT)]
        sys.modules["lte_compile"] = package
    return vars(import_module(f"lte_compile.kernels.{module}"))


def parameters_of(ptx: str) -> str:
    """The letters of `Image.parameters`, read from the kernel's entry."""
    entry = re.search(r"\.entry\s+\w+\((.*?)\)", ptx, re.DOTALL)
    kinds = re.findall(r"\.param\s+\.(\w+)", entry[1]) if entry else []
    letters = {"u64": "p", "b64": "p", "u32": "i", "b32": "i", "f32": "f"}
    return "".join(letters.get(kind, "?") for kind in kinds)


def assemble(ptx: str, architecture: int) -> bytes:
    """Machine code by the assembler that Triton brings."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        command = [get_ptxas(architecture).path, f"-arch=sm_{architecture}", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
        return target.read_bytes()


def write_images(images: list[Image], folder: Path) -> None:
    """`images.bin`, and `images.inc` with a row for each image, for exporters/ort/cuda/images.cpp."""
    rows, blob = [], bytearray()
    for image in sorted(images, key=lambda image: (image.name, -image.architecture)):
        blob += bytes(-len(blob) % 16)
        rows.append(
            f'{{"{image.name}", {image.architecture}, "{image.symbol}", "{image.parameters}", {image.threads}, '
            f"{image.shared}, {str(image.dependent).lower()}, {len(blob)}, {len(image.code)}}},\n"
        )
        blob += image.code
    (folder / "images.bin").write_bytes(blob)
    (folder / "images.inc").write_text("".join(rows))
    (folder / "tiles.inc").write_text(tiles_header())


def tiles_header() -> str:
    """The sizes that launches depend on, as C++ constants."""
    sizes = {
        **TILES,
        "narrow": WIDTHS[0],
        "middle": WIDTHS[1],
        "broad": WIDTHS[2],
        "paper_size": PAPER_SIZE,
        "list_small": LISTS[0],
        "list_large": LISTS[1],
        "tokens_float": TOKENS["fp32"][-1],
    }
    sizes |= {"tokens_small": TOKENS["fp16"][0], "tokens_large": TOKENS["fp16"][-1]}
    return "".join(f"inline constexpr int k{_camel(name)} = {value};\n" for name, value in sizes.items())


def _camel(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_"))


def source_digest() -> str:
    """Names what the kernels are compiled from: hexadecimal, 16 digits."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for module in sorted({variant.module for variant in variants()}):
        digest.update((ROOT / "kernels" / f"{module}.py").read_bytes())
    return digest.hexdigest()[:16]


def digest() -> str:
    """Names the images that this version of Triton makes of them."""
    return f"{source_digest()}-triton-{version('triton')}"


def compile_all(jobs: int) -> list[Image]:
    work = [(variant, target) for target in TARGETS for variant in variants()]
    with ProcessPoolExecutor(jobs) as pool:
        done = pool.map(compile_variant, *zip(*work, strict=True))
        return [image for images in done for image in images]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # half of an image otherwise
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    write_images(compile_all(arguments.jobs), arguments.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
