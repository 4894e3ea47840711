"""The user's own .csv, .jsonl and .txt files, with errors that name the file and the line."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

# A document of this many characters is about 500 tokens of English: enough context for a language model.
PIECE_CHARACTERS = 2000
_Row = TypeVar("_Row")
_TABLES = (".csv", ".jsonl")


def is_user_file(name: str) -> bool:
    """Whether a task or corpus name means a file, by its suffix."""
    return Path(name).suffix.lower() in (*_TABLES, ".txt")


def read_labelled(path: Path) -> list[tuple[str, str]]:
    """(text, label) rows of a .csv or .jsonl file."""
    if path.suffix.lower() not in _TABLES:
        raise ValueError(f"{path}: a labelled task is a .csv or .jsonl file with the columns text and label")
    rows = [(record["text"], record["label"]) for record in _records(path, ("text", "label"))]
    return _not_empty(path, rows)


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """(prompt, completion) rows of a .csv or .jsonl file."""
    if path.suffix.lower() not in _TABLES:
        raise ValueError(f"{path}: a generation task is a .csv or .jsonl file with the columns prompt and completion")
    columns = ("prompt", "completion")
    return _not_empty(path, [(record["prompt"], record["completion"]) for record in _records(path, columns)])


def read_documents(path: Path) -> list[str]:
    """Documents of a .csv or .jsonl file (column text), or pieces of a .txt file."""
    if path.suffix.lower() in _TABLES:
        return _not_empty(path, [record["text"] for record in _records(path, ("text",)) if record["text"].strip()])
    return _not_empty(path, _pieces(_read(path)))


def _read(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return path.read_text(encoding="utf-8-sig")  # -sig: a byte order mark would become part of the first column
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def _not_empty(path: Path, rows: list[_Row]) -> list[_Row]:
    if not rows:
        raise ValueError(f"{path} holds no rows or text")
    return rows


def _records(path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    text = _read(path)
    rows = _csv_rows(text) if path.suffix.lower() == ".csv" else _jsonl_rows(path, text)
    for line, row in rows:
        if missing := [column for column in columns if row.get(column) is None]:
            raise ValueError(f"{path}, line {line}: no column {missing[0]!r}; found {sorted(map(str, row))}")
        yield {column: str(row[column]) for column in columns}


def _csv_rows(text: str) -> Iterator[tuple[int, dict[str, object]]]:
    reader = csv.DictReader(text.splitlines(keepends=True))
    for row in reader:
        yield reader.line_num, {key: value for key, value in row.items() if key is not None}


def _jsonl_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, object]]]:
    for line, raw in enumerate(text.split("\n"), start=1):
        if not raw.strip():
            continue
        try:
            row = json.loads(raw)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {line}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f'{path}, line {line}: expected an object such as {{"text": ...}}')
        yield line, row


def _pieces(text: str) -> list[str]:
    """Consecutive paragraphs gathered into pieces of about `PIECE_CHARACTERS`."""
    pieces: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
        if not paragraph.strip():
            continue
        if pieces and len(pieces[-1]) + len(paragraph) <= PIECE_CHARACTERS:
            pieces[-1] += "\n\n" + paragraph.strip()
        else:
            pieces.append(paragraph.strip())
    return pieces
