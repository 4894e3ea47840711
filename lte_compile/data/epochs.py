"""Training data as endless batches that know their place: data that knows it itself, a list or a DataLoader."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from random import Random
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor

_POSITION = ("next_batch", "state_dict", "load_state_dict")


class Batches(Protocol):
    """Training data whose position can be saved, as `lte_compile.data.batches` makes it."""

    def next_batch(self) -> Mapping[str, Tensor]: ...
    def state_dict(self) -> Mapping[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def endless(batches: Batches | Iterable[Mapping[str, Tensor]], seed: int) -> Batches:
    """The batches themselves if their position can be saved, else `Epochs` of them.

    Raises:
        ValueError: they are neither, or can be gone through only once.
    """
    if _keeps_its_place(batches):
        return batches
    if not isinstance(batches, Iterable) or isinstance(batches, Mapping | Tensor | str):
        raise ValueError(
            f"batches are a list or a DataLoader of mappings, or an object with {'(), '.join(_POSITION)}() as in "
            f"lte_compile.data.batches; got {type(batches).__name__}"
        )
    if iter(batches) is batches:
        raise ValueError(
            f"batches of type {type(batches).__name__} can be gone through once, and training goes through them again "
            "and again; give a list or a DataLoader"
        )
    return Epochs(batches, seed)


def _keeps_its_place(batches: object) -> TypeGuard[Batches]:
    return all(hasattr(batches, name) for name in _POSITION)


class Epochs:
    """A list or DataLoader, gone through again and again.

    What it draws at random at the start of an epoch, as a shuffling DataLoader does, depends on the seed and the epoch
    alone: training resumes with the batches that an uninterrupted run would have seen. To find its place it takes the
    epoch's earlier batches once more.
    """

    def __init__(self, batches: Iterable[Mapping[str, Tensor]], seed: int) -> None:
        self._batches = batches
        self._seed = seed
        self._epoch, self._index = 0, 0
        self._rest: Iterator[Mapping[str, Tensor]] | None = None

    def next_batch(self) -> Mapping[str, Tensor]:
        """The next batch; after an epoch's last one the next epoch begins.

        Raises:
            ValueError: an epoch has no batch, or a batch is no mapping.
        """
        batch = self._take()
        if batch is None:
            self._epoch, self._index, self._rest = self._epoch + 1, 0, None
            batch = self._take()
        if batch is None:
            raise ValueError("no batches were given; pass at least one mapping of keyword arguments for the model")
        if not isinstance(batch, Mapping):
            raise ValueError(
                "a batch to train on is a mapping of keyword arguments for the model, `labels` among them; got "
                f"{type(batch).__name__}: let the dataset or its collate_fn return a dict"
            )
        if others := [name for name, value in batch.items() if not isinstance(value, Tensor)]:
            kind = type(batch[others[0]]).__name__
            raise ValueError(f"a batch to train on holds tensors, rows first; {others[0]!r} is a {kind}: collate it")
        self._index += 1
        return batch

    def _take(self) -> Mapping[str, Tensor] | None:
        """The epoch's next batch; None behind its last one."""
        if self._rest is not None:
            return next(self._rest, None)
        with torch.random.fork_rng(devices=[]):
            # the CPU's alone: on a GPU training draws dropout from another
            torch.default_generator.manual_seed(Random(f"{self._seed}/{self._epoch}").getrandbits(63))
            self._rest = iter(self._batches)
            return next(self._rest, None)  # where a DataLoader's sampler draws the order

    def state_dict(self) -> dict[str, int]:
        """Position of the next batch, and what makes it meaningful."""
        return {"epoch": self._epoch, "index": self._index, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position. Raises ValueError when it was saved from other data or another seed."""
        if differing := [key for key, value in self._identity().items() if state.get(key) != value]:
            was = ", ".join(f"{key} {state.get(key)!r} (now {self._identity()[key]!r})" for key in differing)
            raise ValueError(f"this position belongs to other batches: {was}")
        self._epoch, self._index, self._rest = state["epoch"], 0, None
        while self._index < state["index"]:
            if self._take() is None:
                raise ValueError(f"no batch at epoch {state['epoch']}, index {state['index']}: an epoch has fewer now")
            self._index += 1

    def _identity(self) -> dict[str, int]:
        try:
            return {"seed": self._seed, "batches": len(self._batches)}  # type: ignore[arg-type]
        except TypeError:  # a stream's length is unknown, and a DataLoader's of one
            return {"seed": self._seed}
