"""Directories that are built once, kept in the user's cache and noticed when they are damaged."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

MANIFEST = "lte_cache.json"


def cache_root() -> Path:
    """LTE_COMPILE_CACHE, else XDG_CACHE_HOME/lte_compile, else ~/.cache/lte_compile."""
    if own := os.environ.get("LTE_COMPILE_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "lte_compile"
    return Path.home() / ".cache" / "lte_compile"


def cached_directory(key: str, build: Callable[[Path], None]) -> Path:
    """The directory `key` (a relative path) of the cache; `build` fills it when it is missing or damaged.

    `build` gets an empty directory, which is renamed into place only when it has returned. Processes that ask at the
    same time wait for the first one, which holds a lock.
    """
    target = cache_root() / key
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_name(f".{target.name}.lock")):
        if not is_whole(target):
            _rebuild(target, build)
    return target


def is_whole(directory: Path) -> bool:
    """Whether every file of the directory's manifest is there with its size and sha256."""
    manifest = directory / MANIFEST
    if not manifest.is_file():
        return False
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (json.JSONDecodeError, KeyError):
        return False
    return all(_matches(directory / name, record) for name, record in files.items())


def sha256_of(path: Path) -> str:
    """Hex digest of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _matches(path: Path, record: dict[str, object]) -> bool:
    # The size first: it settles the usual damage, a truncated file, without reading it.
    return path.is_file() and path.stat().st_size == record["bytes"] and sha256_of(path) == record["sha256"]


def _rebuild(target: Path, build: Callable[[Path], None]) -> None:
    for abandoned in target.parent.glob(f".{target.name}.building-*"):  # by a process that was killed: the lock is ours
        shutil.rmtree(abandoned)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.building-", dir=target.parent))
    try:
        build(fresh)
        _write_manifest(fresh)
        fresh.chmod(0o755)  # mkdtemp's directories are private
        if target.exists():
            shutil.rmtree(target)
        fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _write_manifest(directory: Path) -> None:
    files = {
        str(path.relative_to(directory)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    (directory / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, also when the process dies
        yield
