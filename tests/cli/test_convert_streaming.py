"""lte-compile convert: what is streamed, what is converted in memory and why, and what the result says about it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.checkpoints import assert_equal, in_memory, saved
from tests.cli.conftest import Run


def test_weights_that_loading_makes_up(run: Run, tmp_path: Path) -> None:
    """A head that is not in the files is drawn when the model is loaded; the command says so and loads it."""
    source = saved("bert", tmp_path / "dense")
    tensors = load_file(source / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if "classifier" not in n}, source / "model.safetensors")
    result = run("convert", source, tmp_path / "out", "--expert-size", 24, "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["streamed"] is False
    assert document["in_memory_because"].startswith("the checkpoint lacks classifier.bias")
    assert "converting in memory: the checkpoint lacks classifier.bias" in result.stderr


def test_the_command_streams(run: Run, tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "dense", scattered=True)
    result = run("convert", source, tmp_path / "out", "--expert-size", 24, "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["streamed"] is True
    assert document["max_abs_diff"] < 1e-5  # a permutation reorders sums in float32
    assert "converting 2/2, model.layers.1.mlp" in result.stderr
    assert_equal(tmp_path / "out", in_memory(source, tmp_path / "whole"))


def test_large_models_are_not_loaded_to_be_compared(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lte_compile.cli.converting.COMPARED_BYTES", 1000)
    monkeypatch.setattr("lte_compile.cli.converting.load_model", lambda *_, **__: pytest.fail("loaded the model"))
    result = run("convert", saved("llama", tmp_path / "dense"), tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["max_abs_diff"] is None
