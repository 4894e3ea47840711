"""lte-compile inspect: which FFNs a model has, and why nothing else is one."""

from __future__ import annotations

from pathlib import Path

from lte_compile.cli.output import Outcome
from lte_compile.cli.preparing import find_model
from lte_compile.inspection import inspect
from lte_compile.loading import load_model
from lte_compile.progress import TrainingProgress


def inspect_model(name: str, graph: Path | None, site: int) -> Outcome:
    """Sites and rejections; with `graph`, also a picture of one site.

    Raises:
        ValueError: an unknown model or site, or a picture format that is not known.
    """
    with TrainingProgress() as progress:
        path = find_model(name, progress)
        with progress.working("tracing"):
            found = inspect(load_model(path))
    drawn = None if graph is None else found.draw(graph, site)
    document = {"model": name, **found.to_dict(), "graph": None if drawn is None else str(drawn)}
    return Outcome(document, [str(found), *([f"drawn: {drawn}"] if drawn else [])])
