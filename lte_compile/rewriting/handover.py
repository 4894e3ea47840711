"""How the gates get from the hook of a first projection to the hook of its down-projection, which share no call."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor


class _OfThisThread(threading.local):
    value: Tensor | str | None = None  # always there: compiled code is guarded by what it finds


class Handover:
    """One FFN's gates in flight. Each thread has its own: models are called from several at once, as DataParallel does.

    Dynamo does not trace thread-locals across a graph break, so compiled code uses a plain attribute. Copies and
    pickles start empty.
    """

    def __init__(self) -> None:
        self._compiled: Tensor | str | None = None
        self._eager = _OfThisThread()

    def put(self, gates_TE: Tensor) -> None:
        """Keep the gates until `take`, in place of any that an interrupted call left."""
        self._store(gates_TE)

    def take(self, *, keep: bool = False) -> Tensor:
        """The gates put last, once; with `keep`, as often as the hidden value is read.

        Raises:
            RuntimeError: there are none.
        """
        gates_TE = self._load()
        if not isinstance(gates_TE, Tensor):
            raise RuntimeError("the down-projection of a routed FFN ran before its first projection; no gates to apply")
        if not keep:
            self.clear()
        return gates_TE

    def mark_applied(self) -> None:
        """A module around the down-projection has applied the gates."""
        self._store(_APPLIED)

    @property
    def is_applied(self) -> bool:
        return isinstance(self._load(), str)

    @property
    def is_pending(self) -> bool:
        """Whether gates were put and not taken."""
        return isinstance(self._load(), Tensor)

    def clear(self) -> None:
        """Nothing is in flight any more."""
        self._store(None)

    def _store(self, value: Tensor | str | None) -> None:
        if torch.compiler.is_compiling():
            self._compiled = value
            return
        self._compiled = None
        self._eager.value = value

    def _load(self) -> Tensor | str | None:
        return self._eager.value if self._compiled is None else self._compiled

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


_APPLIED = "applied"
