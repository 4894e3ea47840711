"""Tiny random models on disk, each with a tokenizer, and tasks small enough to train on in a second."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from lte_compile.cli.app import app
from tests.zoo import VOCAB, build

ANIMALS = ("cat", "dog", "cow", "hen")
TOOLS = ("saw", "axe", "nail", "file")
FILLERS = tuple(f"w{number}" for number in range(VOCAB - 4 - len(ANIMALS) - len(TOOLS)))

# Enough for the classes to be told apart and the density to settle; a few seconds.
BERT_RUN = (
    *("--finetune-steps", 24, "--stage1-steps", 24, "--stage2-steps", 8, "--batch-size", 16),
    *("--expert-size", 8, "--learning-rate", 1e-3, "--checkpoint-every", 5),
)
LLAMA_RUN = ("--stage1-steps", 6, "--stage2-steps", 2, "--window", 16, "--batch-size", 4, "--expert-size", 8)

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run lte-compile with these arguments, offline; the result keeps stdout and stderr apart."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    runner = CliRunner()

    def invoke(*arguments: object) -> Result:
        return runner.invoke(app, [str(argument) for argument in arguments])

    return invoke


@pytest.fixture
def run_json(run: Run) -> Callable[..., Any]:
    """The same with --json: the document that stdout consists of."""

    def invoke(*arguments: object) -> Any:
        result = run(*arguments, "--json")
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    return invoke


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense encoder with a classifier of three unnamed labels."""
    return _saved("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense decoder."""
    return _saved("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a tokenizer."""
    directory = tmp_path_factory.mktemp("vit")
    build("vit")[0].save_pretrained(directory)  # type: ignore[operator]
    return directory


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts about animals or tools: two classes, told apart by one word."""
    draw = random.Random(0)
    rows = ["text,label"]
    for number in range(160):
        subject, label = (draw.choice(ANIMALS), "animal") if number % 2 else (draw.choice(TOOLS), "tool")
        words = [*draw.sample(FILLERS, draw.randint(2, 6)), subject]
        draw.shuffle(words)
        rows.append(f"{' '.join(words)},{label}")
    path = tmp_path_factory.mktemp("data") / "things.csv"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Paragraphs that count up, so that a next word can be learned."""
    draw = random.Random(0)
    starts = [draw.randrange(len(FILLERS)) for _ in range(60)]
    paragraphs = [" ".join(FILLERS[(start + i) % len(FILLERS)] for i in range(300)) for start in starts]
    path = tmp_path_factory.mktemp("data") / "counting.txt"
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def converted(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The decoder with routers, in the dense stage."""
    out = tmp_path_factory.mktemp("converted") / "llama"
    return _made_by("convert", llama, out, "--expert-size", 8)


@pytest.fixture(scope="session")
def trained_bert(bert: Path, labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoder, fine-tuned and sparse, with its checkpoints."""
    out = tmp_path_factory.mktemp("trained") / "bert"
    return _made_by("train", bert, out, "--task", labelled, *BERT_RUN)


@pytest.fixture(scope="session")
def trained_llama(llama: Path, prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The decoder, sparse."""
    out = tmp_path_factory.mktemp("trained") / "llama"
    return _made_by("train", llama, out, "--task", prose, *LLAMA_RUN)


def _made_by(command: str, model: Path, out: Path, *options: object) -> Path:
    result = CliRunner().invoke(app, [command, str(model), str(out), *map(str, options)])
    assert result.exit_code == 0, result.stderr
    return out


@pytest.fixture
def unwritable(tmp_path: Path) -> Path:
    """A path below a file: nobody, not even root, can make a directory there."""
    (tmp_path / "file").write_text("not a directory")
    return tmp_path / "file" / "out"


def _saved(family: str, directory: Path) -> Path:
    model, _ = build(family)
    model.save_pretrained(directory)  # type: ignore[operator]
    words = ["<pad>", "<s>", "</s>", "<unk>", *ANIMALS, *TOOLS, *FILLERS]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    wrapped.save_pretrained(directory)
    return directory
