"""Checkpoints of tiny models on disk, in one file or scattered over several, and what it means that two are equal."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lte_compile.checkpoints.loading import load_model
from lte_compile.checkpoints.persistence import INDEX_FILE, load_pretrained, save_pretrained
from lte_compile.config import TransformConfig
from lte_compile.rewriting.plan import plan_of
from lte_compile.transform import transform
from tests.zoo import build

CONFIG = TransformConfig(expert_size=24)  # does not divide the 128 neurons


def scatter(directory: Path, shards: int = 3) -> None:
    """Spread the tensors of a one-file checkpoint over several, so that every layer lies in more than one."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    files: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    for number, (name, tensor) in enumerate(tensors.items()):
        files[number % shards][name] = tensor
    weight_map: dict[str, str] = {}
    for number, held in enumerate(files):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file(held, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index))


def saved(family: str, directory: Path, *, scattered: bool = False) -> Path:
    build(family)[0].save_pretrained(directory)  # type: ignore[operator]
    if scattered:
        scatter(directory)
    return directory


def in_memory(source: Path, out: Path, config: TransformConfig = CONFIG, dtype: torch.dtype | None = None) -> Path:
    save_pretrained(transform(load_model(source, dtype=dtype), config), out)
    return out


def assert_equal(left: Path, right: Path) -> None:
    """Both load, as the same model: names, dtypes and values of all tensors, and the plan."""
    one, other = load_pretrained(left), load_pretrained(right)
    state, expected = one.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert tensor.dtype is expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
    assert plan_of(one) == plan_of(other)
    assert json.loads((left / "config.json").read_text()) == json.loads((right / "config.json").read_text())
