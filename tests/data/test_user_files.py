"""Files that users have: texts of any script, odd lines, rows that lack something, prose without paragraphs."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest

from lte_compile.data.tasks import Corpus, load_corpus, load_task
from lte_compile.data.user_files import PIECE_CHARACTERS
from lte_compile.evaluation.tasks import TaskKind, named_kind, open_task


def _write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8", newline="")
    return str(path)


def _texts(corpus: Corpus) -> list[str]:
    return [*corpus.train, *corpus.valid, *corpus.test]


@pytest.mark.parametrize("mark", ["\u2028", "\u0085", "\x0c", "\x1e"])
def test_only_line_ends_end_a_row_of_a_csv(tmp_path: Path, mark: str) -> None:
    rows = "".join(f"left{mark}right {i},{i % 2}\n" for i in range(20))
    task = load_task(_write(tmp_path / "mine.csv", "text,label\n" + rows))
    texts = {text for split in (task.train, task.valid, task.test) for text, _ in split}
    assert texts == {f"left{mark}right {i}" for i in range(20)}


def test_cells_of_a_csv_may_be_long(tmp_path: Path) -> None:
    rows = "".join(f"{'word ' * 40_000}{i},{i % 2}\n" for i in range(10))
    assert len(load_task(_write(tmp_path / "long.csv", "text,label\n" + rows)).train) == 7


def test_a_row_without_a_label_is_refused_with_its_line(tmp_path: Path) -> None:
    path = _write(tmp_path / "mine.csv", "\ntext,label\na,x\nb, \n")
    with pytest.raises(ValueError, match=r"mine\.csv, line 4: the label is empty; give every row a label"):
        load_task(path)


def test_the_kind_is_told_by_names_not_by_texts(tmp_path: Path) -> None:
    blank = _write(tmp_path / "a.jsonl", '\n{"text": "a", "label": "x"}\n')
    assert named_kind(blank) is TaskKind.CLASSIFICATION
    spoken = _write(tmp_path / "b.jsonl", json.dumps({"text": "label"}) + "\n")
    assert named_kind(spoken) is TaskKind.LANGUAGE_MODEL
    quoted = _write(tmp_path / "c.csv", '"a, prompt",prompt,completion\nx,y,z\n')
    assert named_kind(quoted) is TaskKind.GENERATION


def test_a_file_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_bytes("text,label\nä,b\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"mine\.csv is not UTF-8 text"):
        open_task(str(tmp_path / "mine.csv"))


def test_no_document_is_in_two_splits(tmp_path: Path) -> None:
    rows = "".join(f"document {i % 20}\n" for i in range(200))
    corpus = load_corpus(_write(tmp_path / "mine.csv", "text\n" + rows))
    splits = [set(corpus.train), set(corpus.valid), set(corpus.test)]
    assert all(a.isdisjoint(b) for a, b in combinations(splits, 2))
    assert len(_texts(corpus)) == 20


@pytest.mark.parametrize("end", ["\n", " ", ""])
def test_prose_without_paragraphs_is_cut_at_lines_or_words(tmp_path: Path, end: str) -> None:
    text = end.join(f"sentence-{i:05}." for i in range(3000))
    pieces = _texts(load_corpus(_write(tmp_path / "mine.txt", text)))
    assert max(map(len, pieces)) <= PIECE_CHARACTERS
    assert sum(len("".join(piece.split())) for piece in pieces) == len("".join(text.split()))
    if end:  # no word is cut
        assert {word for piece in pieces for word in piece.split()} == set(text.split())
