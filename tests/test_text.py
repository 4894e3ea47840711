"""Splitting and batching text: own files with their errors, known formats, and batches that resume exactly."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lte_compile.data.batches import (
    Example,
    TextBatches,
    classification_batches,
    encode_rows,
    encode_windows,
    evaluation_batches,
    language_model_batches,
)
from lte_compile.data.tasks import load_corpus, load_task

# ---- tasks and corpora


def _csv(path: Path, columns: list[str], rows: list[list[str]]) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([columns, *rows])
    return str(path)


ROWS = [[f"text {i}, with a comma\nand a line", "yes" if i % 3 else "no"] for i in range(40)]


def test_own_csv_is_split_without_loss(tmp_path: Path) -> None:
    task = load_task(_csv(tmp_path / "mine.csv", ["text", "label"], [*ROWS, ROWS[0]]))
    assert (task.name, task.labels) == ("mine", ("no", "yes"))
    assert [len(split) for split in (task.train, task.valid, task.test)] == [28, 4, 8]
    everything = {*task.train, *task.valid, *task.test}
    assert everything == {(text, task.labels.index(label)) for text, label in ROWS}


def test_splits_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    forward = load_task(_csv(tmp_path / "a.csv", ["text", "label"], ROWS))
    backward = load_task(_csv(tmp_path / "b.csv", ["label", "text"], [row[::-1] for row in ROWS[::-1]]))
    assert (forward.train, forward.test) == (backward.train, backward.test)


def test_own_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in ROWS) + "\n\n")
    assert load_task(str(path)).train == load_task(_csv(tmp_path / "mine.csv", ["text", "label"], ROWS)).train


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("missing.csv", None, "no such file"),
        ("empty.csv", "", "no rows"),
        ("header.csv", "text,label\n", "no rows"),
        ("column.csv", "text,class\na,b\n", r"line 2: no column 'label'; found \['class', 'text'\]"),
        ("short.csv", "text,label\na\n", "line 2: no column 'label'"),
        ("one.csv", "text,label\n" + "".join(f"t{i},x\n" for i in range(20)), "1 distinct labels"),
        ("few.csv", "text,label\na,x\nb,y\n", "too few"),
        ("broken.jsonl", '{"text": "a", "label": "x"}\n{', "line 2: not JSON"),
        ("list.jsonl", "[1]", "line 1: expected an object"),
        ("prose.txt", "a", "a labelled task is a .csv or .jsonl file"),
    ],
)
def test_bad_files_are_refused_with_their_place(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_task(str(tmp_path / name))


def test_file_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.csv").write_bytes("text,label\nä,b\n".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8"):
        load_task(str(tmp_path / "latin.csv"))


@pytest.mark.parametrize("load", [load_task, load_corpus])
def test_unknown_names_list_the_known(load: Callable[[str], object]) -> None:
    with pytest.raises(ValueError, match=r"'nothing'; give one of (trec, trec-fine|sotu, shakespeare)"):
        load("nothing")


def test_own_prose_is_split_by_paragraphs(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {i}. " + "word " * 150 for i in range(60)]
    (tmp_path / "prose.txt").write_text("\n\n".join(paragraphs))
    corpus = load_corpus(str(tmp_path / "prose.txt"))
    pieces = [*corpus.train, *corpus.valid, *corpus.test]
    assert all(len(piece) <= 2000 for piece in pieces)
    for paragraph in paragraphs:
        assert sum(paragraph.strip() in piece for piece in pieces) == 1


# ---- batches


class _WordTokenizer:
    """One id a word: its length. Enough of a tokenizer for batches."""

    pad_token_id: int | None = 0
    eos_token_id: int | None = 99

    def __call__(self, text: str | list[str], *, max_length: int = 512, **_: Any) -> dict[str, Any]:
        if isinstance(text, list):
            return {"input_ids": [self._ids(one)[:max_length] for one in text]}
        return {"input_ids": self._ids(text)}

    def _ids(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]


def _rows(count: int) -> list[tuple[str, int]]:
    return [("x" * (i + 1) + " y" * (i * 7 % 13), i % 3) for i in range(count)]


def _first_tokens(batches: TextBatches) -> list[int]:
    return sorted(int(token) for batch in batches for token in batch["input_ids"][:, 0])


def test_an_epoch_holds_every_example_once() -> None:
    batches = classification_batches(_rows(50), _WordTokenizer(), batch_size=8)
    assert len(batches) == 7
    assert _first_tokens(batches) == list(range(1, 51))
    assert batches.state_dict()["epoch"] == 1
    assert _first_tokens(batches) == list(range(1, 51))


def test_batches_are_padded_on_the_right_and_masked() -> None:
    batch = next(evaluation_batches(encode_rows([("aa b", 1), ("c", 2)], _WordTokenizer()), _WordTokenizer()))
    assert batch["input_ids"].tolist() == [[2, 1], [1, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [1, 2]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_sorting_by_length_saves_padding() -> None:
    examples = encode_rows(_rows(320), _WordTokenizer())

    def padding(by_length: bool) -> int:
        batches = TextBatches(examples, batch_size=8, pad_token_id=0, seed=0, by_length=by_length)
        return sum(int((batch["attention_mask"] == 0).sum()) for batch in batches)

    assert padding(True) < padding(False) / 4


def test_batches_of_few_lengths() -> None:
    """Padded to multiples of four, but not beyond what a model has to be ready for anyway."""
    rows = [("x " * length, 0) for length in range(1, 11)]
    batches = classification_batches(rows, _WordTokenizer(), batch_size=1, length_multiple=4)
    lengths = {int(batch["attention_mask"].sum()): batch["input_ids"].shape[1] for batch in batches}
    assert lengths == {1: 4, 2: 4, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8, 9: 10, 10: 10}


def test_evaluation_keeps_the_order() -> None:
    examples = encode_rows(_rows(10), _WordTokenizer())
    labels = [int(x) for batch in evaluation_batches(examples, _WordTokenizer(), batch_size=4) for x in batch["labels"]]
    assert labels == [label for _, label in _rows(10)]


def test_seed_and_epoch_change_the_order() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        batches = classification_batches(_rows(40), _WordTokenizer(), batch_size=4, seed=seed)
        batches.load_state_dict({**batches.state_dict(), "epoch": epoch})
        return [batch["input_ids"][:, 0].tolist() for batch in batches]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


@pytest.mark.parametrize("taken", [0, 3, 5, 12])
def test_training_resumes_with_the_next_batch(taken: int) -> None:
    def fresh() -> TextBatches:
        return classification_batches(_rows(40), _WordTokenizer(), batch_size=8, seed=3)

    straight = fresh()
    for _ in range(taken):
        straight.next_batch()
    resumed = fresh()
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    for _ in range(8):  # past the end of an epoch of 5
        expected, got = straight.next_batch(), resumed.next_batch()
        assert all(torch.equal(expected[key], got[key]) for key in expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": 1}, r"seed 1 \(now 0\)"),
        ({"examples": 7}, r"examples 7 \(now 40\)"),
        ({"index": 99}, "an epoch has 5"),
        ({"epoch": -1}, "no batch at epoch -1"),
    ],
)
def test_foreign_positions_are_refused(change: dict[str, int], message: str) -> None:
    batches = classification_batches(_rows(40), _WordTokenizer(), batch_size=8)
    with pytest.raises(ValueError, match=message):
        batches.load_state_dict({**batches.state_dict(), **change})


def test_windows_cover_the_stream_in_order() -> None:
    documents = ["a bb ccc", "dddd", "eeeee ffffff"]  # ids 1 2 3 end 4 end 5 6 end
    windows = encode_windows(documents, _WordTokenizer(), window=4)
    assert [example.tokens for example in windows] == [(1, 2, 3, 99), (4, 99, 5, 6)]


def test_language_model_batches_predict_their_own_input() -> None:
    batches = language_model_batches(["a bb ccc"] * 10, _WordTokenizer(), batch_size=4, window=5)
    for batch in batches:
        assert batch["input_ids"].shape[1] == 5
        assert torch.equal(batch["labels"], batch["input_ids"])
        assert batch["attention_mask"].all()


def test_useless_requests_are_refused() -> None:
    tokenizer = _WordTokenizer()
    with pytest.raises(ValueError, match="do not fill one window"):
        encode_windows(["a"], tokenizer, window=16)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        encode_windows(["a b c"], tokenizer, window=1)
    with pytest.raises(ValueError, match="batch_size"):
        TextBatches([Example((1,))], batch_size=0, pad_token_id=0, seed=0, by_length=False)
    with pytest.raises(ValueError, match="no examples"):
        classification_batches([], tokenizer)


def test_tokenizer_without_padding_pads_with_its_end() -> None:
    tokenizer = _WordTokenizer()
    tokenizer.pad_token_id = None
    batch = next(evaluation_batches(encode_rows([("aa b", 1), ("c", 2)], tokenizer), tokenizer))
    assert batch["input_ids"].tolist() == [[2, 1], [1, 99]]
    tokenizer.eos_token_id = None
    with pytest.raises(ValueError, match="neither a padding nor an end-of-text token"):
        classification_batches(_rows(4), tokenizer)


def test_a_text_of_no_tokens_still_makes_a_batch() -> None:
    [batch] = evaluation_batches(encode_rows([("", 1), (" ", 0)], _WordTokenizer()), _WordTokenizer())
    assert batch["input_ids"].tolist() == [[0], [0]]
    assert batch["attention_mask"].tolist() == [[1], [1]]
