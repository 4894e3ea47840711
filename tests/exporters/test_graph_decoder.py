"""The steps of benchmarks/ort_graph_decoder.py, without a graph: a cache of fixed size that is filled slot by slot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import ort_decoder
from benchmarks.ort_graph_decoder import GraphDecoder
from lte_compile.exporters.runtime import OrtGenerator, max_abs_difference
from lte_compile.serving.onnx_file import export_onnx
from tests.exporters.hard import prompts, shallow


@pytest.mark.filterwarnings("ignore:Duplicate provider")  # one where the benchmark names two
def test_tokens_are_read_as_with_a_growing_cache(
    tmp_path: Path, ort_library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_decoder, "ort_library_path", lambda: ort_library)
    monkeypatch.setattr(ort_decoder, "PROVIDER", "CPUExecutionProvider")
    model, _ = shallow("llama")
    report = export_onnx(model, tmp_path / "decoder.onnx", kv_cache=True, dtype=ort_decoder.DTYPE)
    decoder = GraphDecoder(report.path, device="cpu")
    generator = OrtGenerator(ort_decoder.open_session(str(report.path)))
    for _ in range(2):  # the second text finds what the first one left
        ids_BT = prompts(1, 9)[0].numpy()
        seconds, logits_V = decoder.read(ids_BT[0].tolist())
        wanted, _ = generator.step(ids_BT, np.ones_like(ids_BT), generator.empty_cache(1))
        assert len(seconds) == 9
        assert max_abs_difference(logits_V.numpy(), wanted[0, -1]) <= 2e-2  # float16, summed in other orders
