"""Building the library, finding it, and what is said when that fails."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lte_compile
from lte_compile.cli.app import app
from lte_compile.exporters import ort_build
from lte_compile.exporters.ort_build import LIBRARY, SOURCES, build, find_compiler, source_digest
from lte_compile.serving import ort_library

ROOT = Path(__file__).parents[2]


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the library's sources that the builder then uses."""
    copy = tmp_path / "sources"
    shutil.copytree(SOURCES, copy, ignore=shutil.ignore_patterns(LIBRARY))
    monkeypatch.setattr(ort_build, "SOURCES", copy)
    monkeypatch.setattr(ort_library, "SOURCES", copy)
    return copy


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LTE_COMPILE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_one_function_is_visible(ort_library: str) -> None:
    symbols = subprocess.run(["nm", "-D", "--defined-only", ort_library], capture_output=True, text=True, check=True)
    assert [line.split()[-1] for line in symbols.stdout.splitlines()] == ["RegisterCustomOps"]


def test_a_library_that_is_not_built_is_one_clear_error(sources: Path, empty_cache: Path) -> None:
    with pytest.raises(RuntimeError, match=r"neither in the package nor in the cache .*run `lte-compile build-ort`"):
        lte_compile.ort_library_path()
    (sources / LIBRARY).touch()  # as a wheel has it
    assert lte_compile.ort_library_path() == sources / LIBRARY


def test_the_cache_is_per_sources(sources: Path) -> None:
    before = source_digest()
    assert before == source_digest()
    (sources / "element.h").write_text("// another library\n")
    assert source_digest() != before


def shrink(sources: Path, text: str) -> None:
    """One file that compiles at once, or not at all, instead of all."""
    for file in sources.rglob("*.cpp"):
        file.unlink()
    (sources / "register.cpp").write_text(text)


def test_small_build_leaves_only_the_library(sources: Path, empty_cache: Path) -> None:
    shrink(sources, "int answer() { return 42; }\n")
    built = lte_compile.build_ort_library(cuda=False)
    assert built.path == lte_compile.ort_library_path()
    assert built.path.is_relative_to(empty_cache)
    assert [file.name for file in built.path.parent.iterdir()] == [LIBRARY]
    assert built.compiler
    assert 0 < built.seconds < 60


def test_a_failure_shows_the_compilers_message_and_keeps_what_was_there(sources: Path, tmp_path: Path) -> None:
    shrink(sources, "#error no such luck\n")
    target = tmp_path / LIBRARY
    target.write_bytes(b"an earlier build")
    with pytest.raises(RuntimeError, match=r"(?s)register\.cpp.*failed with code .*no such luck"):
        build(target)
    assert target.read_bytes() == b"an earlier build"
    assert {file.name for file in tmp_path.iterdir()} == {"sources", LIBRARY}


def test_command_line(sources: Path, empty_cache: Path, tmp_path: Path) -> None:
    shrink(sources, "int answer() { return 42; }\n")
    runner = CliRunner()
    done = runner.invoke(app, ["build-ort", "--no-cuda", "--json"])
    said = json.loads(done.stdout)
    assert (said["library"], said["cuda"]) == (str(lte_compile.ort_library_path()), False)
    done = runner.invoke(app, ["build-ort", "--no-cuda", "--out", str(tmp_path / "new" / "folder")])
    assert "such nodes run on the CPU" in done.stdout
    assert "register_custom_ops_library(" in done.stdout
    assert (tmp_path / "new" / "folder" / LIBRARY).is_file()
    refused = runner.invoke(app, ["build-ort", "--no-cuda", "--compiler", "nonesuch"])
    assert (refused.exit_code, refused.stderr) == (
        2,
        "error: there is no compiler 'nonesuch'; give the name or path of a C++17 compiler\n",
    )


def test_compilers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no compiler 'nonesuch'"):
        find_compiler("nonesuch")
    monkeypatch.setenv("CXX", "neither")
    with pytest.raises(ValueError, match="there is no compiler 'neither', which CXX names; give the name or path"):
        find_compiler()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"no C\+\+ compiler found \(tried c\+\+, g\+\+, clang\+\+\); install one"):
        find_compiler()


def test_a_folder_that_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="cannot write into /proc"):
        build(Path("/proc") / LIBRARY)
    with pytest.raises(ValueError, match="cannot make the folder /proc/no"):
        lte_compile.build_ort_library("/proc/no")


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LTE_COMPILE_CACHE", "/proc/no")
    with pytest.raises(ValueError, match=r"cannot write into the cache /proc/no.*set LTE_COMPILE_CACHE"):
        lte_compile.build_ort_library(tmp_path, cuda=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_wheels_carry_the_library(tmp_path: Path) -> None:
    """Fetches what builds a wheel. Without a compiler the wheel is one for any platform, without the library."""
    tree = tmp_path / "tree"
    kept = ("exporters", "kernels", "passes", "lte_compile")
    for folder in kept:
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=shutil.ignore_patterns("*.so"))
    for name in ("pyproject.toml", "setup.py", "wheel_backend.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    with_library, without = wheel(tree, tmp_path / "with", {}), wheel(tree, tmp_path / "without", {"CXX": "nonesuch"})
    library = f"lte_compile/exporters/ort/{LIBRARY}"
    assert with_library.name.endswith("-py3-none-linux_x86_64.whl")
    assert zipfile.ZipFile(with_library).getinfo(library).file_size > 5 * 2**20  # for a CPU alone it is below 1 MB
    assert without.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(without).namelist()
    assert library not in names
    sources = SOURCES.rglob("[!.]*.[hci]*")
    assert {f"lte_compile/exporters/ort/{file.relative_to(SOURCES)}" for file in sources} <= {*names}


def wheel(tree: Path, out: Path, environment: dict[str, str]) -> Path:
    shutil.rmtree(tree / "build", ignore_errors=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(tree)]
    subprocess.run(["env", *(f"{key}={value}" for key, value in environment.items()), *command], check=True)
    (found,) = out.iterdir()
    return found
