"""Results go to stdout, as a table or as one JSON document; everything else goes to stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

# Where stdout is no terminal, tables are as wide as they need to be, up to this.
PIPE_WIDTH = 160


@dataclass(frozen=True)
class Outcome:
    """What a command found: a JSON-able document, and the same for people (strings are printed as they are)."""

    document: Mapping[str, Any]
    shown: Sequence[RenderableType] = field(default=())


def messages() -> Console:
    """The console of progress, warnings and errors."""
    return Console(stderr=True)


def emit(outcome: Outcome, *, as_json: bool) -> None:
    """Write a result to stdout."""
    if as_json:
        sys.stdout.write(json.dumps(finite(outcome.document), indent=1, allow_nan=False) + "\n")
        return
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    for item in outcome.shown:
        console.print(item, markup=False, highlight=False, soft_wrap=isinstance(item, str))


@contextmanager
def only_result_on_stdout(as_json: bool) -> Iterator[None]:
    """Inside the block of a --json run, whatever libraries print goes to stderr."""
    if not as_json:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


def finite(value: Any) -> Any:
    """The value with null for numbers that JSON has not: NaN and the infinities."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def facts_table(title: str, facts: Mapping[str, object]) -> Table:
    """Two columns: what, and its value."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, str(value))
    return table
