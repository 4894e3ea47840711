"""The files of a converted checkpoint: the input's shards with routers added, an index, the plan in config.json."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lte_compile.checkpoints.persistence import INDEX_FILE, read_json
from lte_compile.checkpoints.streaming_files import DTYPES, Entry, Shard, bytes_of, create_shard
from lte_compile.huggingface.registration import remember_plan
from lte_compile.routing.router import require_routers

# What is no weight and no config.json: tokenizers, processors and generation settings are copied as they are.
COPIED = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "tekken.json"),
    *("chat_template*", "additional_chat_templates", "*processor_config.json", "generation_config.json"),
)


@dataclass(frozen=True)
class Output:
    """Output files with room for every tensor. `pairs` are input and output shards, `written` the names filled in."""

    staged: Path
    model: nn.Module
    pairs: tuple[tuple[Shard, Shard], ...]
    shard_of: Mapping[str, Shard]
    written: set[str] = field(default_factory=set)

    @classmethod
    def create(
        cls,
        shards: Sequence[Shard],
        staged: Path,
        model: nn.Module,
        keys: Mapping[str, Sequence[str]],
        unused: frozenset[str],
    ) -> Output:
        """Files named as the input's, whose tensors have the dtype of the model's parameters.

        Args:
            keys: names of the FFNs' parameters in the files, by their names in the model.
            unused: names that are left out.
        """
        state = model.state_dict()
        added = _router_entries(model, keys)
        pairs = []
        for shard in shards:
            kept = {name: entry for name, entry in shard.entries.items() if name not in unused}
            entries = {name: _as_in_model(entry, state.get(name)) for name, entry in kept.items()}
            for name in kept:
                entries |= added.pop(name, {})
            pairs.append((shard, create_shard(staged / shard.path.name, entries, shard.metadata)))
        assert not added, added
        shard_of = {name: target for _, target in pairs for name in target.entries}
        return cls(staged, model, tuple(pairs), shard_of)

    def write(self, name: str, tensor: Tensor) -> None:
        self.shard_of[name].write(name, tensor)
        self.written.add(name)

    def copy_the_rest(self, source: Path) -> None:
        """Everything but what `write` wrote: other tensors, index, configuration with the plan, tokenizer."""
        for before, after in self.pairs:
            for name in after.entries.keys() - self.written:
                copy_tensor(before, after, name)
        if (source / INDEX_FILE).exists():
            self._write_index(source)
        remember_plan(self.model)
        config: Any = self.model.config
        config.save_pretrained(str(self.staged))
        for pattern in COPIED:
            for path in source.glob(pattern):
                copy = shutil.copytree if path.is_dir() else shutil.copyfile
                copy(path, self.staged / path.name)

    def _write_index(self, source: Path) -> None:
        index = read_json(source / INDEX_FILE)
        entries = [entry for _, shard in self.pairs for entry in shard.entries.values()]
        sizes = {
            "total_size": sum(entry.nbytes for entry in entries),
            "total_parameters": sum(math.prod(entry.shape) for entry in entries),
        }
        metadata = {**index.get("metadata", {}), **sizes}
        weight_map = {name: shard.path.name for name, shard in sorted(self.shard_of.items())}
        text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2)
        (self.staged / INDEX_FILE).write_text(text + "\n", encoding="utf-8")


def _router_entries(model: nn.Module, keys: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Entry]]:
    """The routers' tensors, by the weight whose file they go into: that of the FFN's first projection."""
    entries: dict[str, dict[str, Entry]] = {}
    for router in require_routers(model):
        path = router.site.router_path
        tensors = {f"{path}.{name}": Entry.of(t.dtype, tuple(t.shape)) for name, t in router.state_dict().items()}
        entries.setdefault(keys[router.site.first_projection][0], {}).update(tensors)
    return entries


def _as_in_model(entry: Entry, parameter: Tensor | None) -> Entry:
    """The entry in the model's dtype. What the model knows under another name stays: loading casts it."""
    dtype = DTYPES.get(entry.dtype)
    if parameter is None or dtype is None or not dtype.is_floating_point or dtype is parameter.dtype:
        return entry
    return Entry.of(parameter.dtype, entry.shape)


def copy_tensor(before: Shard, after: Shard, name: str) -> None:
    """Copy a tensor from file to file in small pieces, casting it where the dtypes differ."""
    source, target = before.entries[name], after.entries[name]
    for offset, piece in before.chunks(name):
        if source.dtype == target.dtype:
            after.write_bytes(name, offset, piece)
            continue
        cast = torch.frombuffer(piece, dtype=DTYPES[source.dtype]).to(DTYPES[target.dtype])
        place = offset // source.itemsize * target.itemsize
        after.write_bytes(name, place, bytes_of(cast))


def check_space(shards: Sequence[Shard], staged: Path) -> None:
    """A RuntimeError if the disk has no room for a copy of the shards."""
    needed = sum(entry.nbytes for shard in shards for entry in shard.entries.values())
    free = shutil.disk_usage(staged).free
    if free < needed:
        raise RuntimeError(
            f"the converted model needs {needed / 2**30:.1f} GB of disk, and {free / 2**30:.1f} GB are free at "
            f"{staged.parent}; choose another directory, or a smaller --dtype"
        )
