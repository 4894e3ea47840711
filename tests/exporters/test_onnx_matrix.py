"""Transformers models that do not generate from a cache, as ONNX files in two precisions, against torch.

Decoders have tests of their own, in test_onnx_decoders.py; encoder-decoders with a cache in test_onnx_seq2seq.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import pytest
import torch
from torch import Tensor, nn

from lte_compile.exporters.report import OnnxReport
from lte_compile.exporters.runtime import max_abs_difference, open_session, run
from lte_compile.running.tracing import trace_routers
from lte_compile.serving.onnx_file import export_onnx
from tests.exporters.hard import prompts, shallow

# Tracing these for coverage takes half of their time again; other tests run the same lines.
pytestmark = pytest.mark.no_cover

FAMILIES = ("bert", "t5", "vit", *(pytest.param(family, marks=pytest.mark.slow) for family in ("bart", "whisper")))
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
# float32 rounds at 1e-7 of sums of size about 1; float16 keeps 11 bits of them.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}


class Case(NamedTuple):
    """A model in float32, inputs for it, and its file in some precision."""

    model: nn.Module
    inputs: dict[str, Tensor]
    report: OnnxReport

    def difference(self, inputs: dict[str, Tensor], library: str | None = None) -> float:
        """Largest difference of the first output."""
        with torch.no_grad():
            wanted = self.model(**inputs).to_tuple()[0]
        outputs = run(open_session(self.report.path, custom_ops=library, threads=1), inputs)
        assert tuple(outputs) == self.report.outputs
        return max_abs_difference(outputs[self.report.outputs[0]], wanted)


Export = Callable[[str, str], Case]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """A family's file in a precision, written when first asked for."""
    folder, cases = tmp_path_factory.mktemp("matrix"), {}

    def find(family: str, precision: str) -> Case:
        key = family, precision
        if key not in cases:
            model, inputs = shallow(family)
            report = export_onnx(model, folder / f"{family}.{precision}.onnx", dtype=DTYPES[precision])
            cases[key] = Case(model, inputs, report)
        return cases[key]

    return find


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_file_computes_what_the_model_does(family: str, precision: str, case: Export, ort_library: str) -> None:
    if (family, precision) == ("bart", "fp16"):
        with pytest.raises(ValueError, match=r"decides by values .*modeling_bart\.py:\d+.*another dtype"):
            case(family, precision)
        return
    exported = case(family, precision)
    with trace_routers(exported.model) as trace:
        for library in (None, ort_library):
            assert exported.difference(exported.inputs, library) <= TOLERANCE[precision]
    assert 0.05 < trace.density() < 0.95
    assert len(exported.report.sparse) == (1 if family in ("bert", "vit") else 2)
    assert not exported.report.masked_dense


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (3, 5)])
@pytest.mark.parametrize("family", ["bert", "t5", pytest.param("bart", marks=pytest.mark.slow)])
def test_batch_and_length_are_free(family: str, shape: tuple[int, int], case: Export) -> None:
    ids, mask = prompts(*shape)
    inputs = {"input_ids": ids, "attention_mask": mask.flip(1)}
    if family != "bert":
        inputs["decoder_input_ids"] = prompts(shape[0], shape[1] + 2)[0]
    assert case(family, "fp32").difference(inputs) <= TOLERANCE["fp32"]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", ["vit", pytest.param("whisper", marks=pytest.mark.slow)])
def test_batch_of_images_and_sounds_is_free(family: str, rows: int, case: Export) -> None:
    exported = case(family, "fp32")
    inputs = {name: torch.cat([value, value])[:rows] for name, value in exported.inputs.items()}
    assert exported.difference(inputs) <= TOLERANCE["fp32"]


def test_sites_and_axes_have_names(case: Export) -> None:
    report = case("bert", "fp32").report
    graph = onnx.load(report.path).graph
    assert [node.name for node in graph.node if node.op_type == "SparseFFN"] == ["bert.encoder.layer.0"]
    assert [node.name for node in report.sparse] == ["bert.encoder.layer.0"]
    axes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}
    assert axes == {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "sequence"]}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "llama", "t5", "vit"])
def test_bfloat16_is_written_and_checked(family: str, tmp_path: Path) -> None:
    """ONNX Runtime has no bfloat16 kernels on a CPU: the checker and shape inference are what can be run."""
    model, _ = shallow(family)
    report = export_onnx(model, tmp_path / "m.onnx", kv_cache=family == "llama", dtype=torch.bfloat16)
    proto: Any = onnx.shape_inference.infer_shapes(onnx.load(report.path), check_type=True, strict_mode=True)
    onnx.checker.check_model(proto, full_check=True)
    (logits,) = [value for value in proto.graph.output if value.name == "logits"]
    assert logits.type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16
    assert report.sparse
    assert not report.masked_dense
