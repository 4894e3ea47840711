"""Plain modules as ONNX files in plain ONNX Runtime, against torch; what is refused, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lte_compile.config import TransformConfig
from lte_compile.exporters.runtime import OrtGenerator, max_abs_difference, open_session, run
from lte_compile.routing.router import set_stage
from lte_compile.serving.onnx_file import export_onnx
from lte_compile.transform import transform
from tests.routed import Block
from tests.tiers import WIDTH, Raw

# float32 sums of 40 terms of size about 1: rounding is near 1e-6, another expert choice near 1e-1.
TOLERANCE = 1e-4


class Classifier(nn.Module):
    """A model that is not from transformers, with a float input of its own name."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(dtype=torch.float32)
        self.head = nn.Linear(16, 3)

    def forward(self, features: Tensor) -> Tensor:
        y: Tensor = self.head(self.block(features))
        return y


@pytest.fixture
def classifier() -> nn.Module:
    model = Classifier()
    settings = TransformConfig(expert_size=16)
    return set_stage(transform(model, settings, torch.randn(2, 16)), "hard")


def test_plain_module_with_one_example_row(classifier: nn.Module, tmp_path: Path) -> None:
    classifier.train()
    report = export_onnx(classifier, tmp_path / "m.onnx", example_inputs=torch.randn(4, 16)[:1])
    assert classifier.training
    assert (report.inputs, report.outputs, len(report.sparse)) == (("features",), ("output",), 1)
    x = torch.randn(7, 16)
    with torch.no_grad():
        assert max_abs_difference(run(report.path, {"features": x})["output"], classifier(x)) < TOLERANCE
    with pytest.raises(ValueError, match=r"the model takes \['features'\]; got \['ids'\]"):
        run(report.path, {"ids": np.zeros((1, 2))})
    with pytest.raises(ValueError, match="kv_cache=True"):
        OrtGenerator(report.path)


def test_export_in_float16_leaves_the_model_alone(classifier: nn.Module, tmp_path: Path) -> None:
    report = export_onnx(classifier, tmp_path / "m.onnx", example_inputs=[torch.randn(2, 16)], dtype=torch.float16)
    assert next(classifier.parameters()).dtype == torch.float32
    x = torch.randn(5, 16)
    got = run(report.path, {"features": x})["output"]
    assert got.dtype == np.float16
    with torch.no_grad():
        assert max_abs_difference(got, classifier(x)) < 2e-2  # 11 bits on values of size about 2


def test_bfloat16_passes_the_checker(classifier: nn.Module, tmp_path: Path) -> None:
    """ONNX Runtime has no bfloat16 kernels on a CPU: the checker and shape inference are what can be run."""
    report = export_onnx(classifier, tmp_path / "m.onnx", example_inputs=[torch.randn(2, 16)], dtype=torch.bfloat16)
    proto = onnx.shape_inference.infer_shapes(onnx.load(report.path), check_type=True, strict_mode=True)
    onnx.checker.check_model(proto, full_check=True)
    assert proto.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16
    assert len(report.sparse) == 1
    with pytest.raises(ValueError, match=r"onnxruntime [\d.]+ cannot run .*m.onnx on cpu: export it in float32"):
        open_session(report.path)


def test_an_opset_that_is_too_new_is_said_to_be(classifier: nn.Module, tmp_path: Path) -> None:
    path = export_onnx(classifier, tmp_path / "m.onnx", example_inputs=torch.randn(2, 16)).path
    proto = onnx.load(path)
    proto.opset_import[0].version = 99
    onnx.save(proto, path)
    with pytest.raises(ValueError, match=r"cannot run .*m.onnx on cpu: export it with a lower opset for this release"):
        open_session(path)


@pytest.mark.parametrize(
    "dynamic_axes, wanted",
    [("none", [2, 16]), ({"features": {0: "rows"}}, ["rows", 16])],
    ids=["none", "mapping"],
)
def test_axes_as_asked(dynamic_axes: Any, wanted: list[Any], classifier: nn.Module, tmp_path: Path) -> None:
    inputs = {"features": torch.randn(2, 16)}
    path = export_onnx(classifier, tmp_path / "m.onnx", example_inputs=inputs, dynamic_axes=dynamic_axes).path
    (value,) = onnx.load(path).graph.input
    assert [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] == wanted


@pytest.mark.parametrize("how", ["addmm", "matmul", "linear"])
def test_the_batch_stays_free_where_parameters_are_multiplied_by_flattened_tokens(how: str, tmp_path: Path) -> None:
    model = transform(Raw(how), TransformConfig(expert_size=8), torch.randn(2, 7, WIDTH))
    report = export_onnx(
        set_stage(model, "hard"), tmp_path / "m.onnx", example_inputs=torch.randn(2, 7, WIDTH), dynamic_axes="batch"
    )
    x = torch.randn(5, 7, WIDTH)
    with torch.no_grad():
        assert max_abs_difference(run(report.path, {"x": x})["output"], model(x)) < TOLERANCE


def test_other_stages_say_why_they_are_masked_dense(classifier: nn.Module, tmp_path: Path) -> None:
    set_stage(classifier, "soft")
    report = export_onnx(classifier, tmp_path / "m.onnx", example_inputs=torch.randn(2, 16))
    assert [(r.parameter, "soft" in r.reason) for r in report.masked_dense] == [("block.down.weight", True)]
    x = torch.randn(5, 16)
    with torch.no_grad():
        assert max_abs_difference(run(report.path, {"features": x})["output"], classifier(x)) < TOLERANCE


def test_a_dense_model_only_when_asked_for(tmp_path: Path) -> None:
    model, x, path = Classifier(), torch.randn(2, 16), tmp_path / "m.onnx"
    with pytest.raises(ValueError, match=r"Classifier has no routed FFN; call lte_compile\.transform"):
        export_onnx(model, path, example_inputs=x)
    assert not list(tmp_path.iterdir())
    report = export_onnx(model, path, example_inputs=x, dense=True)
    assert not report.sparse
    assert not report.masked_dense


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"dynamic_axes": "everything"}, "one of 'batch_and_sequence', 'batch', 'none' or a mapping.*got 'everything'"),
        ({"dynamic_axes": {"ids": {0: "batch"}}}, r"names inputs \['ids'\]; the model is called with \['features'\]"),
        ({"dynamic_axes": {"features": {2: "batch"}}}, "features has axes 0 to 1; got"),
        ({"opset": 24}, "opset must be one of 20, 21, 22, 23; got 24"),
        ({"dtype": torch.float64}, "dtype must be one of torch.float32, torch.float16, torch.bfloat16"),
        ({"kv_cache": True}, "kv_cache=True sets its own example inputs"),
        ({"kv_cache": True, "example_inputs": None}, "needs a transformers decoder .*; got Classifier"),
        ({"path": "missing/m.onnx"}, "does not exist; create it first"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_bad_arguments(arguments: dict[str, Any], message: str, classifier: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / arguments.pop("path", "m.onnx")
    with pytest.raises(ValueError, match=message):
        export_onnx(classifier, path, **{"example_inputs": torch.randn(2, 16), **arguments})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "extra", "where"),
    [
        ("recurrent_gemma", {"lru_width": 16, "block_types": ["recurrent", "attention"]}, "inside its layers"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "in a DynamicCache"),
    ],
)
def test_caches_of_other_kinds_are_refused(kind: str, extra: dict[str, Any], where: str, tmp_path: Path) -> None:
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(kind, vocab_size=32, num_key_value_heads=1, **size, **extra)
    with pytest.raises(ValueError, match=f"keeps its state {where}, not as keys and values per layer"):
        export_onnx(AutoModelForCausalLM.from_config(config), tmp_path / "m.onnx", kv_cache=True, dense=True)
    assert not list(tmp_path.iterdir())


def test_sessions_are_refused_what_is_not_here(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such library of custom operators"):
        open_session(tmp_path / "m.onnx", custom_ops=tmp_path / "missing.so")
    with pytest.raises(ValueError, match="device must be one of cpu, cuda; got 'tpu'"):
        open_session(tmp_path / "m.onnx", device="tpu")
    with pytest.raises(ValueError, match=r"cannot run .*m.onnx on cpu"):
        open_session(tmp_path / "m.onnx")
    library = tmp_path / "library.so"
    library.write_bytes(b"no library")
    with pytest.raises(ValueError, match=r"cannot load .*library.so"):
        open_session(tmp_path / "m.onnx", custom_ops=library)


@pytest.mark.filterwarnings("ignore:Specified provider")  # ONNX Runtime's own
def test_a_gpu_that_cannot_be_used_is_no_reason_to_run_on_the_cpu(
    classifier: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = export_onnx(classifier, tmp_path / "m.onnx", example_inputs=torch.randn(2, 16)).path
    with pytest.raises(ValueError, match="this onnxruntime has no CUDAExecutionProvider; install onnxruntime-gpu"):
        open_session(path, device="cuda")
    # As onnxruntime-gpu where CUDA's libraries are missing: there is a provider, and then the session is without it.
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(ValueError, match=r"could not start CUDAExecutionProvider.*check the GPU.*or use cpu"):
        open_session(path, device="cuda")
