"""Decoders with a key/value cache as folders: in ONNX Runtime, alone and under GenAI, against torch's generate()."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from lte_compile.exporters import runtime
from lte_compile.exporters.runtime import OrtGenerator, greedy_generate, max_abs_difference, open_session
from lte_compile.serving.folders import FolderReport, export_folder
from tests import zoo
from tests.exporters.hard import prompts, shallow

# Tracing these for coverage takes half of their time again; other tests run the same lines.
pytestmark = pytest.mark.no_cover

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
# float32 rounds at 1e-7 of sums of size about 1; float16 keeps 11 bits of them.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}
NEW_TOKENS = 32
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

Exported = tuple[Any, FolderReport]
Export = Callable[[str, str], Exported]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """A family's model in float32 and its folder in a precision, written when first asked for."""
    folder, cases, source = tmp_path_factory.mktemp("decoders"), {}, tmp_path_factory.mktemp("source")
    for name in (*TOKENIZER_FILES, "notes.txt"):
        (source / name).write_text("{}", encoding="utf-8")

    def find(family: str, precision: str) -> Exported:
        key = family, precision
        if key not in cases:
            model, _ = shallow(family)
            out = folder / f"{family}.{precision}"
            report = export_folder(model, out, kv_cache=True, dtype=DTYPES[precision], tokenizer=source)
            cases[key] = model, report
        return cases[key]

    return find


@pytest.fixture(scope="module")
def llama(case: Export) -> Exported:
    return case("llama", "fp32")


def file_of(exported: Exported) -> Path:
    return exported[1].models[0].path


def wanted_tokens(model: Any, ids: torch.Tensor, mask: torch.Tensor, **ending: int) -> Any:
    """Prompt and 32 greedy tokens; `ending` says what becomes of the end token."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, **ending}
    return model.generate(input_ids=ids, attention_mask=mask, **options).numpy()


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_greedy_decoding_equals_generate(
    family: str, batch: int, precision: str, case: Export, ort_library: str
) -> None:
    exported = case(family, precision)
    ids, mask = prompts(batch, 7)
    model = deepcopy(exported[0]).to(DTYPES[precision])
    wanted = wanted_tokens(model, ids, mask, eos_token_id=zoo.VOCAB)  # no token: none ends a text
    for library in (None, ort_library):
        session = open_session(file_of(exported), custom_ops=library, threads=1)
        got = greedy_generate(session, ids.numpy(), mask.numpy(), max_new_tokens=NEW_TOKENS)
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("past, new", [(0, 6), (0, 1), (5, 1), (4, 3)])
def test_prefill_and_decode_logits(
    past: int, new: int, family: str, precision: str, case: Export, ort_library: str
) -> None:
    model, report = exported = case(family, precision)
    ids, mask = prompts(2, past + new)
    mask = torch.ones_like(mask)
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask).logits[:, past:]
    assert [len(report.models[0].sparse), report.models[0].masked_dense] == [model.config.num_hidden_layers, ()]
    for library in (None, ort_library):
        generator = OrtGenerator(open_session(file_of(exported), custom_ops=library, threads=1))
        cache = generator.empty_cache(2)
        for start, end in ((0, past), (past, past + new)):
            if end > start:
                logits, cache = generator.step(ids[:, start:end].numpy(), mask[:, :end].numpy(), cache)
        assert max_abs_difference(logits, wanted) <= TOLERANCE[precision]


def test_inputs_and_outputs_are_those_of_genai(llama: Exported) -> None:
    written = llama[1].models[0]
    past = ["past_key_values.0.key", "past_key_values.0.value"]
    assert list(written.inputs) == ["input_ids", "attention_mask", "position_ids", *past]
    assert list(written.outputs) == ["logits", *(name.replace("past_key_values", "present") for name in past)]
    assert [node.name for node in written.sparse] == ["model.layers.0.mlp"]


def test_a_folder_holds_file_tokenizer_and_configuration(llama: Exported) -> None:
    model, report = llama
    config = json.loads((report.path / "genai_config.json").read_text(encoding="utf-8"))["model"]
    assert sorted(file.name for file in report.path.iterdir()) == [str(file) for file in report.files]
    assert {str(file) for file in report.files} == {"model.onnx", "genai_config.json", *TOKENIZER_FILES}
    assert report.size == sum(file.stat().st_size for file in report.path.iterdir())
    assert config["vocab_size"] == model.config.vocab_size
    assert config["context_length"] == model.config.max_position_embeddings
    assert config["eos_token_id"] == model.generation_config.eos_token_id
    assert config["decoder"]["num_attention_heads"] == model.config.num_attention_heads
    assert config["decoder"]["num_key_value_heads"] == model.config.num_key_value_heads
    assert "custom_ops_library" not in config["decoder"]["session_options"]
    assert str(report).startswith(f"{report.path}: ")
    assert "1 SparseFFN nodes" in str(report)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_genai_generates_what_torch_does(family: str, batch: int, precision: str, case: Export) -> None:
    model, report = case(family, precision)
    ids = prompts(1, 7)[0].repeat(batch, 1) + torch.arange(batch)[:, None] % 2
    model = deepcopy(model).to(DTYPES[precision])
    wanted = wanted_tokens(model, ids, torch.ones_like(ids), min_new_tokens=NEW_TOKENS)
    assert tokens_of_genai(report.path, ids) == wanted.tolist()


def test_genai_loads_the_library_beside_the_file(llama: Exported, ort_library: str, tmp_path: Path) -> None:
    model, report = llama
    folder = tmp_path / "llama"
    shutil.copytree(report.path, folder)
    name = Path(shutil.copy(ort_library, folder)).name
    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    config["model"]["decoder"]["session_options"]["custom_ops_library"] = name  # as custom_ops= writes it
    (folder / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
    ids, _ = prompts(1, 7)
    wanted = wanted_tokens(model, ids, torch.ones_like(ids), min_new_tokens=NEW_TOKENS)
    assert tokens_of_genai(folder, ids) == wanted.tolist()


def tokens_of_genai(folder: Path, ids: torch.Tensor) -> list[list[int]]:
    """Prompts and 32 greedy tokens, none of which ends a text."""
    genai: Any = pytest.importorskip("onnxruntime_genai", reason="needs onnxruntime-genai")
    loaded = genai.Model(str(folder))
    params = genai.GeneratorParams(loaded)
    rows, length = len(ids), ids.shape[1] + NEW_TOKENS
    params.set_search_options(max_length=length, min_length=length, batch_size=rows)
    generator = genai.Generator(loaded, params)
    generator.append_tokens(ids.numpy().astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [list(generator.get_sequence(row)) for row in range(rows)]


def test_the_cache_never_becomes_an_array(llama: Exported) -> None:
    """Present outputs are bound as past inputs as they are; only logits are read."""
    generator = OrtGenerator(file_of(llama))
    ids, mask = prompts(2, 5)
    logits, cache = generator.step(ids.numpy(), mask.numpy(), generator.empty_cache(2))
    assert all(isinstance(value, ort.OrtValue) for value in cache.values())
    assert {tuple(value.shape()) for value in cache.values()} == {(2, 2, 5, 16)}
    held = {name: value.data_ptr() for name, value in cache.items()}
    _, grown = generator.step(logits[:, -1:].argmax(-1), np.pad(mask.numpy(), ((0, 0), (0, 1))) | 1, cache)
    assert {tuple(value.shape()) for value in grown.values()} == {(2, 2, 6, 16)}
    assert {name: value.data_ptr() for name, value in cache.items()} == held


def test_generation_stops_at_the_end_token(llama: Exported) -> None:
    generator = OrtGenerator(file_of(llama))
    ids, mask = prompts(2, 7)
    free = generator.generate(ids, mask, max_new_tokens=6)[:, 7:]
    end = int(free[0, 1])
    ended = generator.generate(ids, mask, max_new_tokens=6, eos_token_id=end, pad_token_id=0)[:, 7:]
    rows = [list(row) for row in ended]
    stop = list(free[0]).index(end)
    assert rows[0][: stop + 1] == list(free[0, : stop + 1])
    assert set(rows[0][stop + 1 :]) <= {0}
    assert len(list(generator.stream(ids[:1], max_new_tokens=6, eos_token_id=end))) <= 6


def test_prompts_are_padded_on_the_left(llama: Exported) -> None:
    with pytest.raises(ValueError, match="pad prompts on the left"):
        greedy_generate(file_of(llama), [[5, 6, 0]], [[1, 1, 0]])


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
    arguments = [sys.executable, "-c", _STANDALONE, str(runtime.__file__), str(file_of(llama))]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(greedy_generate(file_of(llama), [[5, 6, 7]], max_new_tokens=4).tolist())
