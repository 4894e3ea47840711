"""lte-compile export and generate, in torch and in ONNX Runtime."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lte_compile.checkpoints.loading import load_causal_lm
from lte_compile.cli.app import app
from tests.cli.conftest import Run

RunJson = Callable[..., Any]
PROMPT = "w1 w2 w3"


@pytest.fixture(scope="module")
def exported(trained_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What export --kv-cache said about the trained decoder; `folder` is the folder, `file` the ONNX file in it."""
    path = tmp_path_factory.mktemp("served") / "decoder"
    result = CliRunner().invoke(app, ["export", str(trained_llama), str(path), "--kv-cache", "--json"])
    assert result.exit_code == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def test_an_exported_decoder_equals_torch(exported: dict[str, Any]) -> None:
    assert exported["max_abs_diff"] < 1e-4  # float32 in another order of summation
    assert len(exported["sparse"]) == 2
    assert exported["bytes"] == sum(file.stat().st_size for file in Path(exported["folder"]).iterdir())
    assert "past_key_values.1.value" in exported["inputs"]


def test_a_decoders_folder_is_complete(exported: dict[str, Any]) -> None:
    names = {file.name for file in Path(exported["folder"]).iterdir()}
    assert names == set(exported["files"])
    assert names >= {"model.onnx", "genai_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert not any(name.endswith(".safetensors") for name in names)


def test_a_folder_generates_by_itself(run_json: RunJson, trained_llama: Path, exported: dict[str, Any]) -> None:
    """The folder holds tokenizer, end tokens and file: nothing of the model's directory is read."""
    by_torch = run_json("generate", trained_llama, PROMPT, "--max-new-tokens", 32)
    by_folder = run_json("generate", exported["folder"], PROMPT, "--max-new-tokens", 32, "--runtime", "ort")
    assert by_folder["tokens"] == by_torch["tokens"]
    assert by_folder["text"] == by_torch["text"]


@pytest.mark.slow
def test_a_model_is_exported_for_the_occasion(run: Run, run_json: RunJson, llama: Path) -> None:
    before = sorted(file.name for file in llama.iterdir())
    by_torch = run_json("generate", llama, PROMPT, "--max-new-tokens", 8)
    result = run("generate", llama, PROMPT, "--max-new-tokens", 8, "--runtime", "ort")
    assert result.stdout == by_torch["text"] + "\n"
    assert "export --kv-cache keeps the file" in result.stderr
    assert sorted(file.name for file in llama.iterdir()) == before


def test_an_exported_classifier_equals_torch(run: Run, trained_bert: Path, tmp_path: Path) -> None:
    result = run("export", trained_bert, tmp_path / "model.onnx", "--dynamic-axes", "batch")
    assert result.exit_code == 0, result.stderr
    assert "2 SparseFFN nodes" in result.stdout
    difference = float(result.stdout.rpartition(":")[2])
    assert difference < 1e-4


def test_a_dense_model_is_exported_on_request(run: Run, run_json: RunJson, vit: Path, tmp_path: Path) -> None:
    refused = run("export", vit, tmp_path / "model.onnx")
    assert refused.exit_code == 2
    assert "--dense" in refused.stderr
    assert not list(tmp_path.iterdir())
    document = run_json("export", vit, tmp_path / "model.onnx", "--dense", "--dtype", "fp16", "--dynamic-axes", "none")
    assert document["sparse"] == []
    assert document["max_abs_diff"] < 0.02  # 10 bits of mantissa, logits of about 1


@pytest.mark.parametrize(
    "options",
    [
        ("--dtype", "int8"),
        ("--dynamic-axes", "all"),
        ("--opset", 3),
        ("--target", "torchserve"),
        ("--target", "triton-server"),  # of a folder, and model.onnx is a file
        ("--custom-ops", "missing.so"),
    ],
)
def test_export_refuses_bad_options(run: Run, trained_bert: Path, tmp_path: Path, options: tuple[object, ...]) -> None:
    assert run("export", trained_bert, tmp_path / "model.onnx", *options).exit_code == 2
    assert not list(tmp_path.iterdir())


def test_export_refuses_a_cache_for_an_encoder(run: Run, trained_bert: Path, tmp_path: Path) -> None:
    result = run("export", trained_bert, tmp_path / "model.onnx", "--kv-cache")
    assert result.exit_code == 2
    assert "no causal language model" in result.stderr


@pytest.mark.slow
def test_bfloat16_is_written_and_said_not_to_be_run(run: Run, trained_bert: Path, tmp_path: Path) -> None:
    result = run("export", trained_bert, tmp_path / "model.onnx", "--dtype", "bf16")
    assert result.exit_code == 0, result.stderr
    assert "CPU provider has no bfloat16 kernels" in result.stdout


@pytest.mark.slow
def test_an_encoder_for_triton(run_json: RunJson, run: Run, trained_bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "repository" / "encoder"
    document = run_json("export", trained_bert, out, "--target", "triton-server")
    assert document["files"] == ["1/model.onnx", "config.pbtxt"]
    assert document["file"] == str(out / "1" / "model.onnx")
    assert document["max_abs_diff"] < 1e-4  # float32 in another order of summation
    again = run("export", trained_bert, out, "--target", "triton-server")
    assert again.exit_code == 2
    assert "--overwrite" in again.stderr


def test_both_runtimes_generate_the_same(run_json: RunJson, trained_llama: Path, exported: dict[str, Any]) -> None:
    by_torch = run_json("generate", trained_llama, PROMPT, "--max-new-tokens", 12)
    by_ort = run_json(
        "generate", trained_llama, PROMPT, "--max-new-tokens", 12, "--runtime", "ort", "--onnx", exported["file"]
    )
    assert by_torch["tokens"] == by_ort["tokens"]
    assert by_torch["text"] == by_ort["text"]
    assert 0.0 < by_torch["density"] < 1.0


def test_text_is_all_that_goes_to_stdout(run: Run, run_json: RunJson, llama: Path) -> None:
    expected = run_json("generate", llama, PROMPT, "--max-new-tokens", 6)
    result = run("generate", llama, PROMPT, "--max-new-tokens", 6)
    assert result.stdout == expected["text"] + "\n"
    assert "tokens in" in result.stderr
    assert expected["density"] is None


def test_generation_ends_at_the_end_token(
    run_json: RunJson, trained_llama: Path, exported: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_json("generate", trained_llama, PROMPT, "--max-new-tokens", 1)["tokens"][0]
    monkeypatch.setattr("lte_compile.cli.generating_ort._end_tokens", lambda path: [first])
    options = ("--runtime", "ort", "--onnx", exported["file"])
    assert run_json("generate", trained_llama, PROMPT, *options)["tokens"] == [first]


@pytest.mark.parametrize(
    "options, says",
    [
        (("--custom-ops", "missing.so"), "no missing.so"),
        (("--onnx", __file__), "add it, or leave them out"),
        (("--runtime", "tensorrt"), "torch, ort"),
        (("--runtime", "ort", "--onnx", "missing.onnx"), "no such file"),
        (("--max-new-tokens", 0), "at least 1"),
    ],
)
def test_generate_refuses_bad_options(run: Run, llama: Path, options: tuple[object, ...], says: str) -> None:
    result = run("generate", llama, PROMPT, *options)
    assert result.exit_code == 2
    assert says in result.stderr


def test_generate_says_how_to_run_what_export_wrote(run: Run, exported: dict[str, Any], tmp_path: Path) -> None:
    in_torch = run("generate", exported["folder"], PROMPT)
    assert (in_torch.exit_code, "is an export, which torch does not run; add --runtime ort" in in_torch.stderr) == (
        2,
        True,
    )
    file = run("generate", exported["file"], PROMPT, "--runtime", "ort")
    assert (file.exit_code, "name the folder it was exported to" in file.stderr) == (2, True)
    (tmp_path / "model.onnx").write_bytes(Path(exported["file"]).read_bytes())
    (tmp_path / "genai_config.json").write_text("{")
    damaged = run("generate", tmp_path, PROMPT, "--runtime", "ort")
    assert (damaged.exit_code, "genai_config.json is not JSON" in damaged.stderr) == (2, True)
    (tmp_path / "model.onnx").rename(tmp_path / "decoder_model.onnx")
    pair = run("generate", tmp_path, PROMPT, "--runtime", "ort")
    assert (pair.exit_code, "is an encoder-decoder; OrtSeq2SeqGenerator runs it" in pair.stderr) == (2, True)


def test_a_folder_is_run_with_the_library_that_it_names(run: Run, exported: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "served"
    shutil.copytree(exported["folder"], folder)
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"]["custom_ops_library"] = "kernels.so"
    (folder / "genai_config.json").write_text(json.dumps(config))
    refused = run("generate", folder, PROMPT, "--runtime", "ort")
    assert (refused.exit_code, f"{folder / 'kernels.so'}: no such library" in refused.stderr) == (2, True)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "gpu"])
def test_onnx_runtime_is_asked_for_the_device_and_not_torch(run: Run, exported: dict[str, Any], device: str) -> None:
    refused = run("generate", exported["folder"], PROMPT, "--runtime", "ort", "--device", device)
    assert refused.exit_code == 2
    says = "has no CUDAExecutionProvider" if device == "cuda" else "device must be one of cpu, cuda"
    assert says in refused.stderr


def test_a_library_that_cannot_be_loaded_is_refused_before_the_export(
    run: Run, trained_llama: Path, tmp_path: Path
) -> None:
    library = tmp_path / "library.so"
    library.write_bytes(b"no library")
    refused = run("export", trained_llama, tmp_path / "served", "--kv-cache", "--custom-ops", library)
    assert refused.exit_code == 2
    assert f"cannot load {library}" in refused.stderr
    assert list(tmp_path.iterdir()) == [library]


def test_generate_refuses_an_encoder_and_an_empty_prompt(run: Run, bert: Path, llama: Path) -> None:
    encoder = run("generate", bert, PROMPT)
    assert encoder.exit_code == 2
    assert "no causal language model" in encoder.stderr
    empty = run("generate", llama, "")
    assert empty.exit_code == 2
    assert "prompt" in empty.stderr


def test_generation_is_greedy(run_json: RunJson, llama: Path) -> None:
    model, tokenizer = load_causal_lm(llama)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    expected = []
    with torch.no_grad():
        for _ in range(3):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
            expected.append(int(ids[0, -1]))
    assert run_json("generate", llama, PROMPT, "--max-new-tokens", 3)["tokens"] == expected
