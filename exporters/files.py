"""Writing an artefact of one or two files so that a failure leaves nothing half-written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
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
