"""lte-compile inspect: which FFNs a model has, and why nothing else is one."""

from __future__ import annotations

from pathlib import Path

from lte_compile.checkpoints.loading import load_model, load_on_meta
from lte_compile.cli.output import Outcome
from lte_compile.cli.preparing import find_model
from lte_compile.inspection.sites import Inspection, inspect
from lte_compile.training.progress import TrainingProgress


def inspect_model(name: str, graph: Path | None, site: int) -> Outcome:
    """Sites and rejections; with `graph`, also a picture of one site.

    Raises:
        ValueError: an unknown model or site, or a picture format that is not known.
    """
    with TrainingProgress() as progress:
        path = find_model(name, progress)
        with progress.working("tracing"):
            found = _inspect(path, progress)
    drawn = None if graph is None else found.draw(graph, site)
    document = {"model": name, **found.to_dict(), "graph": None if drawn is None else str(drawn)}
    return Outcome(document, [str(found), *([f"drawn: {drawn}"] if drawn else [])])


def _inspect(path: Path, progress: TrainingProgress) -> Inspection:
    """On the meta device, where weights take no memory, unless the way through the model depends on data."""
    model, _ = load_on_meta(path)
    try:
        return inspect(model)
    except RuntimeError as error:
        progress.say(f"loading the weights, as the model cannot be traced without ({str(error).splitlines()[0]})")
        return inspect(load_model(path))
