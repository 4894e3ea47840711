"""A generation task out of source code: from what a function's documentation explains, its first line.

The sources are parsed, never imported.
"""

from __future__ import annotations

import ast
import json
import tempfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from lte_compile.data.cache import cached_directory
from lte_compile.data.packages import Kind, PackageFile, unpack_package

Pair = tuple[str, str]

SYMPY = PackageFile(
    kind=Kind.WHEEL,
    name="sympy",
    version="1.14.0",
    filename="sympy-1.14.0-py3-none-any.whl",
    sha256="e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
    members=("sympy/*.py",),
    licence="BSD-3-Clause",
)
NETWORKX = PackageFile(
    kind=Kind.WHEEL,
    name="networkx",
    version="3.5",
    filename="networkx-3.5-py3-none-any.whl",
    sha256="0030d386a9a06dee3565298b4a734b68589749a544acbb6c412dc9e2489ec6ec",
    members=("networkx/*.py",),
    licence="BSD-3-Clause",
)
DJANGO = PackageFile(
    kind=Kind.WHEEL,
    name="django",
    version="5.2",
    filename="Django-5.2-py3-none-any.whl",
    sha256="91ceed4e3a6db5aedced65e3c8f963118ea9ba753fc620831c77074e620e7d83",
    members=("django/*.py",),
    licence="BSD-3-Clause",
)
SOURCES = (SYMPY, NETWORKX, DJANGO)
# Shorter explanations say nothing that the summary could be made of, longer ones are mostly examples.
EXPLANATION_CHARACTERS = (80, 600)
SUMMARY_WORDS = (3, 25)
# Of `read_pairs`: raised when the same sources are to give other pairs, so that caches are built anew.
VERSION = 1


def docstrings() -> list[Pair]:
    """(prompt, summary) of every function, method and class with both, without duplicates, in a fixed order."""
    wanted = sha256("\n".join([str(VERSION), *(source.sha256 for source in SOURCES)]).encode()).hexdigest()
    lines = (cached_directory(f"pairs/docstrings-{wanted[:12]}", _build) / "pairs.jsonl").read_text(encoding="utf-8")
    return [(prompt, summary) for prompt, summary in map(json.loads, lines.splitlines())]


def _build(into: Path) -> None:
    """The sources are forty megabytes, the pairs five: only these are kept."""
    pairs: set[Pair] = set()
    for source in SOURCES:
        with tempfile.TemporaryDirectory(prefix="lte_compile-") as temporary:
            unpack_package(source, Path(temporary))
            for path in Path(temporary).rglob("*.py"):
                if "tests" not in path.parts:
                    pairs.update(read_pairs(path.read_text(encoding="utf-8")))
    lines = [json.dumps(pair, ensure_ascii=False) for pair in sorted(pairs)]
    (into / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_pairs(source: str) -> Iterator[Pair]:
    """Those of one file of Python source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            summary, _, explanation = (ast.get_docstring(node) or "").partition("\n\n")
            summary, explanation = " ".join(summary.split()), explanation.strip()
            shortest, longest = EXPLANATION_CHARACTERS
            if SUMMARY_WORDS[0] <= len(summary.split()) <= SUMMARY_WORDS[1] and len(explanation) >= shortest:
                yield f"Name: {node.name}\n\n{explanation[:longest]}\n\nSummary:", f" {summary}"
