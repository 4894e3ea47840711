"""Folders for ONNX Runtime and Triton Inference Server: what is in them, and what is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lte_compile.config import TransformConfig
from lte_compile.routing.router import set_stage
from lte_compile.serving.folders import FolderReport, export_folder
from lte_compile.transform import transform
from tests.exporters.model_config import parse_model_config
from tests.routed import Block


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that stands for a library where nothing loads it."""
    path = tmp_path_factory.mktemp("library") / "libkernels.so"
    path.write_bytes(b"kernels")
    return path


def routed_block() -> nn.Module:
    model = Block(dtype=torch.float32)
    return set_stage(transform(model, TransformConfig(expert_size=16), torch.randn(2, 16)), "hard")


def export_block(out: Path, **options: Any) -> FolderReport:
    """The smallest model there is: 16 numbers in, 16 out."""
    return export_folder(routed_block(), out, example_inputs=torch.randn(2, 16), **options)


def test_a_triton_repository(tmp_path: Path, library: Path) -> None:
    out = tmp_path / "repository" / "block"
    report = export_block(out, target="triton-server", custom_ops=library, device="cpu", repository="/models")
    assert [str(file) for file in report.files] == [f"1/{library.name}", "1/model.onnx", "config.pbtxt"]
    assert (out / "1" / library.name).read_bytes() == library.read_bytes()
    config = parse_model_config((out / "config.pbtxt").read_text(encoding="utf-8"))
    assert (config.name, config.input[0].name, config.output[0].name) == ("block", "x", "output")
    assert [list(tensor.dims) for tensor in (*config.input, *config.output)] == [[-1, 16], [-1, 16]]
    assert list(config.model_operations.op_library_filename) == [f"/models/block/1/{library.name}"]
    assert report.models[0].path == out / "1" / "model.onnx"


def test_without_a_repository_the_library_is_where_it_was_written(tmp_path: Path, library: Path) -> None:
    out = tmp_path / "deep" / "block"
    export_block(out, target="triton-server", custom_ops=library)
    config = parse_model_config((out / "config.pbtxt").read_text(encoding="utf-8"))
    assert list(config.model_operations.op_library_filename) == [str(out / "1" / library.name)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"target": "torchserve"}, "target must be one of onnxruntime, triton-server; got 'torchserve'"),
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda; got 'tpu'"),
        ({"custom_ops": "missing.so"}, r"missing\.so: no such library"),
        ({"opset": 24}, "opset must be one of"),
        ({"kv_cache": True}, "needs a transformers decoder; got Block"),
    ],
)
def test_bad_arguments_leave_nothing(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export_block(tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


def test_folders_are_replaced_only_on_request_and_only_exports(tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    export_block(out)
    (out / "left").write_text("over")
    with pytest.raises(ValueError, match="out is not empty"):
        export_block(out)
    export_block(out, overwrite=True)
    assert [file.name for file in out.iterdir()] == ["model.onnx"]
    other.mkdir()
    (other / "thesis.txt").write_text("draft")
    with pytest.raises(ValueError, match="holds other things than an export"):
        export_block(other, overwrite=True)
    with pytest.raises(ValueError, match="it is a file"):
        export_block(other / "thesis.txt")
    with pytest.raises(ValueError, match="is a file; name another folder"):
        export_block(other / "thesis.txt" / "out")
    assert [file.name for file in other.iterdir()] == ["thesis.txt"]


def test_a_failure_leaves_an_earlier_export_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.onnx").write_text("earlier")
    with pytest.raises(ValueError, match="no routed FFN"):
        export_folder(Block(dtype=torch.float32), out, example_inputs=torch.randn(2, 16), overwrite=True)
    with pytest.raises(ValueError, match="no routed FFN"):
        export_folder(Block(dtype=torch.float32), tmp_path / "new" / "out", example_inputs=torch.randn(2, 16))
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert (out / "model.onnx").read_text() == "earlier"
