"""Labelled texts as their packages hold them: every reader on a small file of its format."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from lte_compile.data.labelled_texts import GENRES, SUPERSENSES
from lte_compile.data.tasks import LabelledTask, load_task


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What every package of labelled texts unpacks to."""
    monkeypatch.setattr("lte_compile.data.labelled_texts.fetch_package", lambda package: tmp_path)
    return tmp_path


def _write(path: Path, lines: Iterable[str], encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding=encoding)


def _rows(task: LabelledTask) -> set[tuple[str, str]]:
    return {(text, task.labels[label]) for text, label in (*task.train, *task.valid, *task.test)}


@pytest.mark.parametrize("name, labels", [("trec", ("DESC", "NUM")), ("trec-fine", ("DESC:def", "NUM:date"))])
def test_questions(package: Path, name: str, labels: tuple[str, str]) -> None:
    questions = [f"{label} Où est {i} ?" for i, label in enumerate(["DESC:def", "NUM:date"] * 10)]
    _write(package / "question_labels.txt", [*questions, "no label here", questions[0]], "latin-1")
    task = load_task(name)
    assert (task.labels, len(task.train), len(task.valid), len(task.test)) == (labels, 14, 2, 4)
    assert _rows(task) == {(f"Où est {i} ?", labels[i % 2]) for i in range(20)}


def test_movie_reviews_without_a_leaning_are_left_out(package: Path) -> None:
    ratings = [("1.5", "a ''fine''\tfilm"), ("-0.5", "dull"), ("0", "neither")]
    lines = [f"{i}\t{rating}\t{text} {i}" for i in range(10) for rating, text in ratings]
    _write(package / "hutto_ICWSM_2014" / "movieReviewSnippets_GroundTruth.txt", ["id\tsentiment\ttext", *lines])
    rows = _rows(load_task("movie"))
    assert len(rows) == 20
    assert {('a "fine"\tfilm 0', "positive"), ("dull 0", "negative")} <= rows


@pytest.mark.parametrize("name, stem", [("newsgroups", "20newsgroups"), ("reuters", "reuters-r52")])
def test_orange_tables_are_read_whole(package: Path, name: str, stem: str) -> None:
    header = ["Category\tText", "d\tstring", "class\t"]
    _write(package / f"{stem}-train.tab", [*header, *(f"tea\tcup {i}" for i in range(8)), "tea\t "])
    _write(package / f"{stem}-test.tab", [*header, *(f"gold\tbar\x85 {i}" for i in range(8))])
    teas, golds = ({(f"{text} {i}", label) for i in range(8)} for text, label in (("cup", "tea"), ("bar\x85", "gold")))
    assert _rows(load_task(name)) == teas | golds


def test_wordnet_definitions_have_supersenses(package: Path) -> None:
    licence = "  1 This software | is provided  "
    nouns = [f'0000{i} 05 n 01 cat{i} 0 001 @ 1 n 0000 | feline {i}; has claws; "the cat sat"  ' for i in range(8)]
    verbs = [f'0000{i} 43 v 01 rain{i} 0 000 01 + 02 00 | precipitate {i};"it rains"; "rain"' for i in range(8)]
    _write(package / "data.noun", [licence, *nouns])
    _write(package / "data.verb", [licence, *verbs])
    animals = {(f"feline {i}; has claws", "noun.animal") for i in range(8)}
    assert _rows(load_task("wordnet")) == animals | {(f"precipitate {i}", "verb.weather") for i in range(8)}


def test_supersenses_are_wordnets() -> None:
    """lexnames(5WN): 03 noun.Tops, 18 noun.person, 28 noun.time, 29 verb.body, 42 verb.stative."""
    assert len(SUPERSENSES) == 41
    known = {3: "noun.Tops", 18: "noun.person", 28: "noun.time", 29: "verb.body", 42: "verb.stative"}
    assert {number: SUPERSENSES[number - 3] for number in known} == known


def test_brown_paragraphs_have_the_genre_of_their_text(package: Path) -> None:
    paragraph = "\n\n\tIt/pps rained/vbd {} times/nns ./.\n``/`` No/rb ''/'' ,/, and/or/cc he/pps left/vbd ./.\n"
    for name in ("ca01", "cr09"):
        text = "".join(paragraph.format(f"{number}/cd") for number in range(10))
        (package / name).write_text(text.replace("and/or", "and" if name == "ca01" else "or"), encoding="latin-1")
    rows = _rows(load_task("brown-genres"))
    assert len(rows) == 20
    assert ('It rained 3 times. "No", and he left.', "news") in rows
    assert ('It rained 3 times. "No", or he left.', "humor") in rows
    assert len(set(GENRES.values())) == 15
