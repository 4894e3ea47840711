"""Safetensors files read and written piece by piece, so that no file is ever in memory as a whole.

A file is eight bytes that give the length of a JSON header, the header (dtype, shape and place of every tensor), and
the tensors' bytes without gaps. Files are checked by the safetensors library before they are read here. Reads and
writes go through file descriptors: mapped files would count as this process's memory page by page.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

CHUNK_BYTES = 64 * 2**20  # what is copied at a time; larger chunks are no faster
_LENGTH_BYTES = 8
_ALIGNMENT = 8  # the header is padded with spaces so that tensors start at a multiple
_METADATA = "__metadata__"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its dtype as safetensors names it, its shape, and where its bytes start in the file."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    start: int = 0

    @property
    def itemsize(self) -> int:
        return self.nbytes // max(math.prod(self.shape), 1)

    @classmethod
    def of(cls, dtype: torch.dtype, shape: tuple[int, ...]) -> Entry:
        """The entry of a tensor that is still to be placed."""
        return cls(_NAMES[dtype], shape, math.prod(shape) * dtype.itemsize)


@dataclass(frozen=True)
class Shard:
    """One safetensors file: where it is and what its header says."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        """A whole tensor, in memory of its own."""
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        with self.path.open("rb", buffering=0) as file:
            _read_into(file, entry.start, bytes_of(tensor), self.path)
        return tensor

    def chunks(self, name: str) -> Iterator[tuple[int, memoryview]]:
        """The tensor's bytes in pieces of at most CHUNK_BYTES, each with its offset within the tensor."""
        entry = self.entries[name]
        buffer = memoryview(bytearray(min(CHUNK_BYTES, entry.nbytes)))
        with self.path.open("rb", buffering=0) as file:
            for offset in range(0, entry.nbytes, CHUNK_BYTES):
                piece = buffer[: min(CHUNK_BYTES, entry.nbytes - offset)]
                _read_into(file, entry.start + offset, piece, self.path)
                yield offset, piece

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor of the entry's dtype and shape in its place."""
        entry = self.entries[name]
        assert (_NAMES[tensor.dtype], tuple(tensor.shape)) == (entry.dtype, entry.shape), name
        self.write_bytes(name, 0, bytes_of(tensor.detach().contiguous()))

    def write_bytes(self, name: str, offset: int, piece: memoryview) -> None:
        """Put bytes at an offset within a tensor."""
        with self.path.open("r+b", buffering=0) as file:
            file.seek(self.entries[name].start + offset)
            done = 0
            while done < len(piece):
                done += file.write(piece[done:])


def open_shard(path: Path) -> Shard:
    """Read a file's header.

    Raises:
        ValueError: the file is missing, cut short or corrupt.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: the checkpoint is not complete; copy it again")
    try:
        with safe_open(path, framework="pt"):  # checks that the header is sound and that the file is as long as it says
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is cut short or corrupt ({error}); copy or save the checkpoint again") from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    metadata = header.pop(_METADATA, {})
    return Shard(path, {name: _entry(record, _LENGTH_BYTES + length) for name, record in header.items()}, metadata)


def create_shard(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> Shard:
    """A file of the right size whose header is written and whose tensors are to be filled in, each by its name."""
    header: dict[str, Any] = {}
    offset = 0
    # Wide dtypes first, as the safetensors library has it: every tensor then starts at a multiple of its element size.
    for name, entry in sorted(entries.items(), key=lambda item: -item[1].itemsize):
        ends = [offset, offset + entry.nbytes]
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": ends}
        offset = ends[1]
    text = json.dumps({_METADATA: dict(metadata), **header} if metadata else header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    first = _LENGTH_BYTES + len(text)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        file.truncate(first + offset)
    return Shard(path, {name: _entry(record, first) for name, record in header.items()}, metadata)


def _entry(record: Mapping[str, Any], first: int) -> Entry:
    start, end = record["data_offsets"]
    return Entry(record["dtype"], tuple(record["shape"]), end - start, first + start)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _read_into(file: io.FileIO, start: int, piece: memoryview, path: Path) -> None:
    file.seek(start)
    done = 0
    while done < len(piece):
        read = file.readinto(piece[done:])
        if not read:
            raise ValueError(f"{path} became shorter while it was read; copy or save the checkpoint again")
        done += read
