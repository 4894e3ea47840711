"""Labelled tasks and prose corpora, split once and for all: known ones out of packages, or a file of yours."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias, TypeVar

from lte_compile.data.brown import brown
from lte_compile.data.docstrings import docstrings
from lte_compile.data.labelled_texts import (
    read_brown_genres,
    read_movie,
    read_newsgroups,
    read_reuters,
    read_trec,
    read_trec_fine,
    read_wordnet,
)
from lte_compile.data.prose_texts import read_prose, read_shakespeare, read_sotu
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

    def in_order(self, labels: Sequence[str]) -> LabelledTask:
        """The same with its labels numbered in another order."""
        number = {label: index for index, label in enumerate(labels)}

        def numbered(rows: tuple[Row, ...]) -> tuple[Row, ...]:
            return tuple((text, number[self.labels[label]]) for text, label in rows)

        return LabelledTask(self.name, numbered(self.train), numbered(self.valid), numbered(self.test), tuple(labels))


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
    """The pairs of a known name (`PAIRS`), or the prompts and completions of your .csv or .jsonl file.

    Without duplicates, split like a corpus. Raises as `load_task`.
    """
    reader = PAIRS.get(name)
    if reader is None and not is_user_file(name):
        raise ValueError(f"no pairs {name!r}; give one of {', '.join(PAIRS)} or the path of a .csv or .jsonl file")
    rows = sorted(set(reader() if reader else read_pairs(Path(name))))
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

    A .txt file counts as one text and is cut into pieces of whole paragraphs. Documents of yours that are equal count
    once: none is in two splits. Raises as `load_task`.
    """
    if is_user_file(name):
        documents = tuple(dict.fromkeys(read_documents(Path(name))))
        return Corpus(Path(name).stem, *_three_way(documents, PROSE_SHARES))
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


TASKS: MappingProxyType[str, Callable[[], list[tuple[str, str]]]] = MappingProxyType(
    {
        "trec": read_trec,
        "trec-fine": read_trec_fine,
        "movie": read_movie,
        "newsgroups": read_newsgroups,
        "reuters": read_reuters,
        "wordnet": read_wordnet,
        "brown-genres": read_brown_genres,
    }
)
CORPORA: MappingProxyType[str, Callable[[], list[str]]] = MappingProxyType(
    {"sotu": read_sotu, "shakespeare": read_shakespeare, "brown": brown, "prose": read_prose}
)
PAIRS: MappingProxyType[str, Callable[[], list[tuple[str, str]]]] = MappingProxyType({"docstrings": docstrings})
