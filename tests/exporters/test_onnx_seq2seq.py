"""Encoder-decoders with their cache: an encoder's and a decoder's file in ONNX Runtime, against torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lte_compile.exporters.runtime import OrtSeq2SeqGenerator, open_session
from lte_compile.serving.folders import FolderReport, export_folder
from lte_compile.serving.onnx_file import export_onnx
from tests.exporters.hard import prompts, shallow

NEW_TOKENS = 32
FAMILIES = ("t5", *(pytest.param(family, marks=pytest.mark.slow) for family in ("bart", "whisper")))

Exported = tuple[Any, FolderReport]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    model, _ = shallow(request.param)
    return model, export_folder(model, tmp_path_factory.mktemp("pairs") / request.param, kv_cache=True)


@pytest.mark.parametrize("batch", [1, 3])
def test_encoder_decoders_generate_what_torch_does(batch: int, pair: Exported) -> None:
    model, report = pair
    assert [str(file) for file in report.files] == ["decoder_model.onnx", "encoder_model.onnx"]
    assert all(written.sparse for written in report.models)
    source, start = source_of(model, batch), model.config.decoder_start_token_id
    encoder, decoder = (report.path / name for name in ("encoder_model.onnx", "decoder_model.onnx"))
    stream = OrtSeq2SeqGenerator(encoder, decoder).stream(source, start_token_id=start, max_new_tokens=NEW_TOKENS)
    np.testing.assert_array_equal(np.stack(list(stream), 1), greedy_targets(model, source, start))


@torch.no_grad()
def greedy_targets(model: Any, source: dict[str, Any], start: int) -> Any:
    """The most likely tokens by torch, without a cache: generate() forces and forbids some per architecture."""
    rows = len(next(iter(source.values())))
    target = torch.full((rows, 1), start)
    for _ in range(NEW_TOKENS):
        logits = model(**source, decoder_input_ids=target, use_cache=False).logits
        target = torch.cat([target, logits[:, -1:].argmax(-1)], dim=1)
    return target[:, 1:].numpy()


def test_logits_of_several_steps(pair: Exported, ort_library: str) -> None:
    model, report = pair
    source, target = source_of(model, 2), prompts(2, 5)[0]
    with torch.no_grad():
        wanted = model(**source, decoder_input_ids=target).logits.numpy()
    sessions = [open_session(written.path, custom_ops=ort_library, threads=1) for written in report.models]
    generator = OrtSeq2SeqGenerator(*sessions)
    arrays = {name: value.numpy() for name, value in source.items()}
    read, past = generator.read(arrays), generator.empty_cache(2)
    for start, end in ((0, 3), (3, 5)):
        logits, past = generator.step(target[:, start:end].numpy(), arrays.get("attention_mask"), read, past)
        np.testing.assert_allclose(logits, wanted[:, start:end], atol=1e-4)  # float32 sums of size about 1


def source_of(model: Any, batch: int) -> dict[str, Any]:
    if model.main_input_name != "input_ids":
        return {"input_features": torch.randn(batch, 8, 32, generator=torch.Generator().manual_seed(0))}
    ids, mask = prompts(batch, 6)
    return {"input_ids": ids.flip(1), "attention_mask": mask.flip(1)}


def test_an_encoder_decoder_with_a_cache_is_no_single_file(tmp_path: Path) -> None:
    model, _ = shallow("t5")
    with pytest.raises(ValueError, match="with a cache that is two files"):
        export_onnx(model, tmp_path / "t5.onnx", kv_cache=True)
    with pytest.raises(ValueError, match="Triton serves one file per model"):
        export_folder(model, tmp_path / "t5", kv_cache=True, target="triton-server")
    assert not list(tmp_path.iterdir())
