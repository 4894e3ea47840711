"""benchmarks.trained_speed moves densities without new constants in the code; its biases do what `set_density` does.
benchmarks.trained_speed_ort exports a checkpoint once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import lte_compile as lte
from benchmarks import trained_speed_ort
from benchmarks.trained import without_routers
from benchmarks.trained_speed import Knob
from benchmarks.trained_speed_ort import exported
from lte_compile.config import RouterKind
from tests.zoo import build


def active(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad(), lte.trace_routers(model) as trace:
        model(**batch)
    thresholds = [router.threshold for router in lte.routers(model)]
    return [trace.scores(site) > tau for site, tau in zip(trace.sites, thresholds, strict=True)]


@pytest.mark.parametrize("density", [None, 0.2, 0.6, 1.0])
def test_biases_select_what_thresholds_select(density: float | None) -> None:
    torch.manual_seed(0)
    model, batch = build("llama", torch.float64)  # else a score on a threshold may fall on either side
    lte.transform(model, lte.TransformConfig(expert_size=4, router=RouterKind.TWO_LAYER))
    for router in lte.routers(model):
        torch.nn.init.normal_(router.weight)
    lte.set_stage(model, "hard")
    lte.calibrate(model, [batch])
    lte.set_density(model, 0.4)
    told = [router.expected_density for router in lte.routers(model)]
    knob = Knob(model)
    if density is not None:
        lte.set_density(model, density)
    expected = active(model, batch)
    for turned in (0.3, density):
        knob.turn(turned)
    assert all(router.threshold == 0.5 for router in lte.routers(model))
    assert [router.expected_density for router in lte.routers(model)] == told
    for after, before in zip(active(model, batch), expected, strict=True):
        assert torch.equal(after, before)


def test_without_routers_the_weights_are_the_same() -> None:
    model, batch = build("llama")
    lte.transform(model, lte.TransformConfig(expert_size=4))
    config: Any = model.config
    config.quantization_config = object()  # as load_pretrained leaves one
    dense = without_routers(model)
    lte.set_stage(model, "dense")
    with torch.no_grad():
        torch.testing.assert_close(dense(**batch).logits, model(**batch).logits)
    assert not list(lte.routers(dense))


def test_a_checkpoint_is_exported_again_only_when_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def write(model: torch.nn.Module, path: Path, **options: bool) -> None:
        path.touch()
        written.append(path.name)

    monkeypatch.setattr(trained_speed_ort, "export_onnx", write)  # a real export takes ten seconds
    monkeypatch.setattr(trained_speed_ort, "without_routers", lambda model: model)
    weights, model = tmp_path / "model.safetensors", torch.nn.Identity()
    weights.touch()
    os.utime(weights, (0, 0))
    for _ in range(2):
        files = exported(model, tmp_path, tmp_path / "onnx")
        assert {name: file.exists() for name, file in files.items()} == {"dense": True, "sparse": True}
        assert written == ["dense.onnx", "sparse.onnx"]
    later = files["sparse"].stat().st_mtime + 1
    os.utime(weights, (later, later))
    exported(model, tmp_path, tmp_path / "onnx")
    assert len(written) == 4
