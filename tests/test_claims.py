"""Pieces of work are held by one process at a time, and given back by one that dies."""

from __future__ import annotations

import os
import signal
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path

from lte_compile.baselines.claims import claim


def _hold(path: Path, is_held: Event) -> None:
    with claim(path):
        is_held.set()
        signal.pause()


def test_a_piece_belongs_to_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "made" / "piece.lock"
    with claim(path) as first, claim(path, wait=False) as second:
        assert first
        assert not second
    with claim(path, wait=False) as again:
        assert again


def test_a_killed_process_gives_its_piece_back(tmp_path: Path) -> None:
    context = get_context("spawn")
    path, is_held = tmp_path / "piece.lock", context.Event()
    holder = context.Process(target=_hold, args=(path, is_held))
    holder.start()
    assert is_held.wait(60)
    with claim(path, wait=False) as is_mine:
        assert not is_mine
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    with claim(path) as is_mine:
        assert is_mine
    holder.join()
