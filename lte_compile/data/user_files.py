"""The user's own .csv, .jsonl and .txt files, with errors that name the file and the line."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
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
    rows = []
    for line, record in _records(path, ("text", "label")):
        if not record["label"].strip():
            raise ValueError(f"{path}, line {line}: the label is empty; give every row a label, or leave the row out")
        rows.append((record["text"], record["label"]))
    return _not_empty(path, rows)


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """(prompt, completion) rows of a .csv or .jsonl file."""
    if path.suffix.lower() not in _TABLES:
        raise ValueError(f"{path}: a generation task is a .csv or .jsonl file with the columns prompt and completion")
    columns = ("prompt", "completion")
    return _not_empty(path, [(record["prompt"], record["completion"]) for _, record in _records(path, columns)])


def read_documents(path: Path) -> list[str]:
    """Documents of a .csv or .jsonl file (column text), or pieces of a .txt file."""
    if path.suffix.lower() in _TABLES:
        return _not_empty(path, [record["text"] for _, record in _records(path, ("text",)) if record["text"].strip()])
    return _not_empty(path, _pieces(_read(path)))


def columns_of(path: Path) -> set[str]:
    """The names of a table's columns, by its header or first row; none for a .txt file."""
    if path.suffix.lower() not in _TABLES:
        return set()
    _, first = next(_rows(path), (0, {}))
    return {str(name).strip() for name in first}


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


def _records(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line numbers and the values of these columns."""
    for line, row in _rows(path):
        if missing := [column for column in columns if row.get(column) is None]:
            found = sorted(str(name) for name, value in row.items() if value is not None)
            raise ValueError(f"{path}, line {line}: no column {missing[0]!r}; found {found}")
        values = {column: str(row[column]) for column in columns}
        if broken := [column for column, value in values.items() if not _is_text(value)]:
            raise ValueError(f"{path}, line {line}: {broken[0]!r} holds half of a surrogate pair, which is no text")
        yield line, values


def _is_text(value: str) -> bool:
    """Whether it can be written as UTF-8: JSON may escape single surrogates."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _rows(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    text = _read(path)
    return _csv_rows(path, text) if path.suffix.lower() == ".csv" else _jsonl_rows(path, text)


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, object]]]:
    """Only line feeds and carriage returns end a line: texts may hold what str.splitlines cuts at, such as U+2028."""
    csv.field_size_limit(sys.maxsize)  # 128 KB otherwise, less than many a document
    blank = len(text) - len(text.lstrip("\r\n"))
    skipped = text.count("\n", 0, blank)
    reader = csv.DictReader(io.StringIO(text[blank:], newline=""))
    try:
        for row in reader:
            yield skipped + reader.line_num, {key: value for key, value in row.items() if key is not None}
    except csv.Error as error:
        raise ValueError(f"{path}, line {skipped + reader.line_num}: not CSV: {error}") from None


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
    """Consecutive paragraphs gathered into pieces of about `PIECE_CHARACTERS`; longer paragraphs are cut."""
    pieces: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
        for number, part in enumerate(_cut(paragraph.strip())):
            if pieces and not number and len(pieces[-1]) + len(part) <= PIECE_CHARACTERS:
                pieces[-1] += "\n\n" + part
            else:
                pieces.append(part)
    return pieces


def _cut(paragraph: str) -> Iterator[str]:
    """A paragraph, or parts of at most `PIECE_CHARACTERS` that end with a line, or else with a word, where one does."""
    start = 0
    while start < len(paragraph):
        last = end = start + PIECE_CHARACTERS
        if last < len(paragraph):
            ends = (paragraph.rfind(mark, start + 1, last + 1) for mark in ("\n", " "))
            end = next((found for found in ends if found > 0), last)
        if part := paragraph[start:end].strip():
            yield part
        start = end
