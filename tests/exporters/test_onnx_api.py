"""Transformed transformers models as ONNX files in plain ONNX Runtime, against torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from lte_compile.config import TransformConfig
from lte_compile.exporters import runtime
from lte_compile.exporters.report import OnnxReport
from lte_compile.exporters.runtime import OrtGenerator, greedy_generate, max_abs_difference, run
from lte_compile.onnx_api import export_onnx
from lte_compile.routing import set_stage
from lte_compile.tracing import trace_routers
from lte_compile.transform import transform
from tests import zoo
from tests.routed import Block, routed

# float32 models of width 64 with outputs of size about 1: rounding is near 1e-6, another expert choice near 1e-1.
TOLERANCE = 1e-4
Exported = tuple[nn.Module, dict[str, Any], OnnxReport]


def hard(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A transformed tiny model in the hard stage whose experts matter to its output."""
    model, inputs = routed(name, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return set_stage(model, "hard"), inputs


def export_hard(name: str, folder: Path, *, kv_cache: bool) -> Exported:
    model, inputs = hard(name)
    return model, inputs, export_onnx(model, folder / f"{name}.onnx", kv_cache=kv_cache)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_hard("bert", tmp_path_factory.mktemp("bert"), kv_cache=False)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_hard("llama", tmp_path_factory.mktemp("llama"), kv_cache=True)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    if request.param == "llama":
        exported: Exported = request.getfixturevalue("llama")
        return exported
    return export_hard(request.param, tmp_path_factory.mktemp(request.param), kv_cache=True)


def prompts(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Random ids, padded on the left by 0, 2, 4 ... positions where there are several."""
    ids = torch.randint(3, zoo.VOCAB, (batch, length), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : 2 * row] = 0
    return ids * mask, mask


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (3, 5)])
def test_bert_with_any_batch_and_length(shape: tuple[int, int], bert: Exported) -> None:
    model, _, report = bert
    ids, _ = prompts(1, shape[0] * shape[1])
    ids = ids.reshape(shape)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    with torch.no_grad(), trace_routers(model) as trace:
        wanted = model(input_ids=ids, attention_mask=mask).logits
    got = run(report.path, {"input_ids": ids, "attention_mask": mask})
    assert 0.05 < trace.density() < 0.95
    assert list(got) == ["logits"]
    assert max_abs_difference(got["logits"], wanted) < TOLERANCE


def test_every_site_is_one_node(bert: Exported) -> None:
    _, _, report = bert
    names = [node.name for node in onnx.load(report.path).graph.node if node.op_type == "SparseFFN"]
    assert names == ["bert.encoder.layer.0", "bert.encoder.layer.1"] == [node.name for node in report.sparse]
    assert not report.masked_dense


def test_dynamic_axes_are_named(bert: Exported) -> None:
    graph = onnx.load(bert[2].path).graph
    axes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}
    assert axes == {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "sequence"]}


def test_decoder_inputs_and_outputs_are_those_of_genai(llama: Exported) -> None:
    report = llama[2]
    past = [f"past_key_values.{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")]
    assert list(report.inputs) == ["input_ids", "attention_mask", "position_ids", *past]
    assert list(report.outputs) == ["logits", *(name.replace("past_key_values", "present") for name in past)]
    assert [node.name for node in report.sparse] == ["model.layers.0.mlp", "model.layers.1.mlp"]


@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_decoding_equals_generate(batch: int, decoder: Exported) -> None:
    model, _, report = decoder
    ids, mask = prompts(batch, 7)
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(input_ids=ids, attention_mask=mask, **options)  # type: ignore[operator]
    got = greedy_generate(report.path, ids.numpy(), mask.numpy(), max_new_tokens=16)
    np.testing.assert_array_equal(got, wanted.numpy())


@pytest.mark.parametrize("past, new", [(0, 6), (0, 1), (5, 1), (4, 3)])
def test_prefill_and_decode_logits(past: int, new: int, decoder: Exported) -> None:
    model, _, report = decoder
    ids, mask = prompts(2, past + new)
    mask = torch.ones_like(mask)
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask).logits[:, past:]
    generator = OrtGenerator(report.path)
    cache = generator.empty_cache(2)
    for start, end in ((0, past), (past, past + new)):
        if end > start:
            logits, cache = generator.step(ids[:, start:end].numpy(), mask[:, :end].numpy(), cache)
    assert max_abs_difference(logits, wanted) < TOLERANCE


def test_generation_stops_at_the_end_token(llama: Exported) -> None:
    generator = OrtGenerator(llama[2].path)
    ids, mask = prompts(2, 7)
    free = generator.generate(ids, mask, max_new_tokens=6)[:, 7:]
    end = int(free[0, 1])
    ended = generator.generate(ids, mask, max_new_tokens=6, eos_token_id=end, pad_token_id=0)[:, 7:]
    rows = [list(row) for row in ended]
    stop = list(free[0]).index(end)
    assert rows[0][: stop + 1] == list(free[0, : stop + 1])
    assert set(rows[0][stop + 1 :]) <= {0}
    assert len(list(generator.stream(ids[:1], max_new_tokens=6, eos_token_id=end))) <= 6


def test_generator_refuses_other_models_and_right_padding(bert: Exported, llama: Exported) -> None:
    with pytest.raises(ValueError, match="kv_cache=True"):
        OrtGenerator(bert[2].path)
    with pytest.raises(ValueError, match="pad prompts on the left"):
        greedy_generate(llama[2].path, [[5, 6, 0]], [[1, 1, 0]])
    with pytest.raises(ValueError, match=r"the model takes \['attention_mask', 'input_ids'\]"):
        run(bert[2].path, {"ids": np.zeros((1, 2))})


_STANDALONE = """
import sys, importlib.util, numpy as np
spec = importlib.util.spec_from_file_location("runtime", sys.argv[1])
runtime = importlib.util.module_from_spec(spec)
sys.modules["runtime"] = runtime
spec.loader.exec_module(runtime)
print(runtime.greedy_generate(sys.argv[2], [[5, 6, 7]], max_new_tokens=4).tolist())
assert not {"torch", "lte_compile", "transformers", "onnx"} & set(sys.modules), sorted(sys.modules)
"""


def test_the_file_needs_only_numpy_and_onnxruntime(llama: Exported) -> None:
    arguments = [sys.executable, "-c", _STANDALONE, str(runtime.__file__), str(llama[2].path)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(greedy_generate(llama[2].path, [[5, 6, 7]], max_new_tokens=4).tolist())


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


def test_export_in_float16_leaves_the_model_alone(classifier: nn.Module, tmp_path: Path) -> None:
    report = export_onnx(classifier, tmp_path / "m.onnx", example_inputs=[torch.randn(2, 16)], dtype=torch.float16)
    assert next(classifier.parameters()).dtype == torch.float32
    x = torch.randn(5, 16)
    got = run(report.path, {"features": x})["output"]
    assert got.dtype == np.float16
    with torch.no_grad():
        assert max_abs_difference(got, classifier(x)) < 2e-2  # 11 bits on values of size about 2


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
