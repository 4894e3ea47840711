"""genai_config.json and config.pbtxt, made from the interfaces of hand-written files."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from google.protobuf import text_format  # type: ignore[import-untyped]
from onnx import TensorProto, helper

from lte_compile.exporters.genai import DecoderFacts, genai_config
from lte_compile.exporters.interface import Interface, TensorSpec, read_interface
from lte_compile.exporters.triton_server import model_config
from tests.exporters.model_config import parse_model_config

PAST = tuple(
    TensorSpec(f"past_key_values.{layer}.{kind}", "FLOAT16", ("batch", 3, "past_sequence", 64))
    for layer in range(2)
    for kind in ("key", "value")
)
IDS = TensorSpec("input_ids", "INT64", ("batch", "sequence"))
MASK = TensorSpec("attention_mask", "INT64", ("batch", "total_sequence"))
POSITIONS = TensorSpec("position_ids", "INT64", ("batch", "sequence"))
LOGITS = TensorSpec("logits", "FLOAT16", ("batch", None, 100))
DECODER = Interface((IDS, MASK, POSITIONS, *PAST), (LOGITS,))
FACTS = DecoderFacts(
    context_length=512, hidden_size=576, attention_heads=9, bos_token_id=1, eos_token_ids=(2,), pad_token_id=0
)


def test_interface_of_a_file(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.BFLOAT16, ["batch", 3, None])
    y = helper.make_tensor_value_info("y", TensorProto.BFLOAT16, [])
    graph = helper.make_graph([helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)], "sum", [x], [y])
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    assert read_interface(tmp_path / "m.onnx") == Interface(
        (TensorSpec("x", "BFLOAT16", ("batch", 3, None)),), (TensorSpec("y", "BFLOAT16", ()),)
    )


def test_interface_without_a_rank_is_refused(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", [x], [x])
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="x is no tensor of known rank"):
        read_interface(tmp_path / "m.onnx")


def test_genai_reads_sizes_from_the_file() -> None:
    model = genai_config(DECODER, FACTS)["model"]
    decoder = model["decoder"]
    assert (model["vocab_size"], model["context_length"]) == (100, 512)
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (1, 2, 0)
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"], decoder["head_size"]) == (2, 3, 64)
    assert (decoder["hidden_size"], decoder["num_attention_heads"]) == (576, 9)
    assert decoder["inputs"]["past_key_names"] % 1 == "past_key_values.1.key"
    assert decoder["inputs"]["position_ids"] == "position_ids"
    assert decoder["outputs"]["present_value_names"] % 0 == "present.0.value"
    assert decoder["filename"] == "model.onnx"


def test_genai_names_a_library_only_where_there_is_one() -> None:
    def options(custom_ops: str | None) -> Any:
        return genai_config(DECODER, FACTS, custom_ops=custom_ops)["model"]["decoder"]["session_options"]

    assert "custom_ops_library" not in options(None)
    assert options("liblte_ort.so")["custom_ops_library"] == "liblte_ort.so"


def test_genai_takes_what_the_model_has() -> None:
    without = replace(DECODER, inputs=(IDS, MASK, *PAST))
    facts = replace(FACTS, bos_token_id=None, pad_token_id=None, eos_token_ids=(7, 8))
    model = genai_config(without, facts)["model"]
    assert "position_ids" not in model["decoder"]["inputs"]
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (7, [7, 8], 7)


def test_genai_refuses_what_it_cannot_run() -> None:
    with pytest.raises(ValueError, match="export it with kv_cache=True"):
        genai_config(replace(DECODER, inputs=(IDS, MASK)), FACTS)
    with pytest.raises(ValueError, match="set generation_config"):
        replace(FACTS, eos_token_ids=())
    other = TensorSpec("past_key_values.2.key", "FLOAT16", ("batch", 3, "past_sequence", 128))
    with pytest.raises(ValueError, match=r"one number of heads .* has \[\(3, 64\), \(3, 128\)\]"):
        genai_config(replace(DECODER, inputs=(*DECODER.inputs, other)), FACTS)


def test_triton_config_says_what_the_file_takes_and_gives() -> None:
    config = parse_model_config(model_config("smollm2", DECODER))
    assert (config.name, config.backend, config.max_batch_size) == ("smollm2", "onnxruntime", 0)
    assert [tensor.name for tensor in config.input] == [spec.name for spec in DECODER.inputs]
    assert [list(tensor.dims) for tensor in config.input] == [[-1, -1]] * 3 + [[-1, 3, -1, 64]] * 4
    assert [list(tensor.dims) for tensor in config.output] == [[-1, -1, 100]]
    kinds = type(config.input[0]).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
    assert [kinds[tensor.data_type].name for tensor in config.input] == ["TYPE_INT64"] * 3 + ["TYPE_FP16"] * 4
    assert not config.HasField("model_operations")


@pytest.mark.parametrize("device, kind", [("auto", "KIND_AUTO"), ("cpu", "KIND_CPU"), ("cuda", "KIND_GPU")])
def test_triton_runs_one_instance_where_asked(device: str, kind: str) -> None:
    assert f"instance_group {{ count: 1 kind: {kind} }}" in model_config("m", DECODER, device=device)


def test_triton_gets_paths_and_names_literally() -> None:
    config = parse_model_config(model_config('a "b"', DECODER, library="/models/ü \\ x/liblte_ort.so"))
    assert config.name == 'a "b"'
    assert list(config.model_operations.op_library_filename) == ["/models/ü \\ x/liblte_ort.so"]


def test_triton_reshapes_numbers() -> None:
    config = parse_model_config(model_config("m", Interface((IDS,), (TensorSpec("loss", "FLOAT", ()),))))
    assert (list(config.output[0].dims), list(config.output[0].reshape.shape)) == ([1], [])
    assert config.output[0].HasField("reshape")


def test_triton_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="device must be one of auto, cpu, cuda; got 'tpu'"):
        model_config("m", DECODER, device="tpu")
    with pytest.raises(ValueError, match="no data type for x, which is FLOAT8E4M3FN"):
        model_config("m", Interface((TensorSpec("x", "FLOAT8E4M3FN", ()),), ()))


@pytest.mark.skipif(
    importlib.util.find_spec("tritonclient") is None, reason="tritonclient, with the schema, is not here"
)
def test_tritons_own_schema_accepts_the_config() -> None:
    package = importlib.util.find_spec("tritonclient")
    assert package is not None
    assert package.submodule_search_locations is not None
    file = Path(package.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", file)  # its package would want grpc
    assert spec is not None
    assert spec.loader is not None
    schema = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(schema)
    text = model_config("m", DECODER, library="/models/m/1/liblte_ort.so")
    config = text_format.Parse(text, schema.ModelConfig())
    assert [list(tensor.dims) for tensor in config.output] == [[-1, -1, 100]]
    assert list(config.model_operations.op_library_filename) == ["/models/m/1/liblte_ort.so"]
