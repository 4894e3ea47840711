"""Work that several processes share out: a piece belongs to whoever holds the lock on its file.

Locks are the operating system's, so a process that dies gives its pieces back.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def claim(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock on `path` (made if it is missing) inside the block; yields whether it was to be had.

    Args:
        wait: until whoever holds it is done. Otherwise a lock that is taken yields False at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True  # released when the file is closed
