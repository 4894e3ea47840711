"""Writing an artefact, a file with its companion or a folder, so that a failure leaves nothing half-written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staging(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`; on a clean exit its files move next to `path`, under their names.

    The file called like `path` moves last, so that it never refers to a companion that is not there yet. On an
    exception everything written is removed and whatever `path` held before is untouched.

    Raises:
        ValueError: `path` is a directory, or its folder is missing or cannot be written; raised on entry.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a directory; give the name of the file to write")
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: the folder {path.parent} does not exist; create it first")
    try:
        folder = tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise ValueError(f"cannot write into {path.parent}: {error.strerror}; choose a writable folder") from error
    with folder as name:
        yield Path(name)
        for written in sorted(Path(name).iterdir(), key=lambda file: file.name == path.name):
            os.replace(written, path.parent / written.name)


def check_writable(path: Path) -> None:
    """The ValueError that `staging(path)` would raise, before any work is spent on what to write."""
    with staging(path):
        pass


@contextmanager
def staging_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` on a clean exit, in place of what was there.

    On an exception everything written is removed and whatever `path` held before is untouched.
    """
    made = [folder for folder in path.absolute().parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as name:
            staged, replaced = Path(name) / "new", Path(name) / "old"
            staged.mkdir()
            yield staged
            if path.exists():
                path.rename(replaced)
            staged.rename(path)
    except BaseException:
        for folder in made:
            folder.rmdir()
        raise


def check_folder(path: Path, *, overwrite: bool, signs: Iterable[str]) -> None:
    """A ValueError if `staging_folder(path)` cannot, or should not, write there; nothing is left behind.

    Args:
        overwrite: replace a folder that is there, if it holds one of the files `signs`: it is then an earlier export.

    Raises:
        ValueError: a file is in the way, the folder holds other things, or it cannot be written.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"cannot write {path}: it is a file; name a folder")
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise ValueError(f"{path} is not empty; name another folder, or overwrite it (--overwrite)")
        if not any((path / sign).is_file() for sign in signs):
            raise ValueError(f"{path} holds other things than an export and is left alone; name another folder")
    nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not nearest.is_dir():
        raise ValueError(f"cannot write {path}: {nearest} is a file; name another folder")
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}; choose a writable folder") from error
