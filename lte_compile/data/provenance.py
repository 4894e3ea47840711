"""Where weights came from: a small record beside them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

RECORD = "provenance.json"


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Which weights these are.

    Args:
        model: the name that was asked for.
        source: "hub", "package" or "directory".
        detail: package name and version, hub revision, or path.
        licence: of the weights; "" when not known.
        note: how they differ from the weights of that name, if they do.
    """

    model: str
    source: str
    detail: str
    licence: str = ""
    note: str = ""


def write_provenance(provenance: Provenance, directory: Path) -> None:
    """Write the record into a directory that is still being built."""
    (directory / RECORD).write_text(json.dumps(asdict(provenance), indent=1), encoding="utf-8")


def read_provenance(directory: Path) -> Provenance:
    """The record of a model directory; hub snapshots and plain directories tell theirs by their path."""
    record = directory / RECORD
    if record.is_file():
        return Provenance(**json.loads(record.read_text(encoding="utf-8")))
    if directory.parent.name == "snapshots":
        # The hub's cache: models--OWNER--NAME/snapshots/REVISION.
        model = directory.parent.parent.name.removeprefix("models--").replace("--", "/")
        return Provenance(model=model, source="hub", detail=directory.name)
    return Provenance(model=directory.name, source="directory", detail=str(directory))
