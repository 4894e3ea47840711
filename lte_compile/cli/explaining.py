"""lte-compile bench --explain: which kernel serves each FFN of a model, and why no faster one does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.table import Column, Table
from torch import nn

from lte_compile.bench import FfnShape, kernel_choice
from lte_compile.checkpoints.loading import load_model
from lte_compile.cli.benching import BenchSettings, given_shape
from lte_compile.cli.converting import pick_dtype
from lte_compile.cli.output import Outcome
from lte_compile.cli.preparing import find_model
from lte_compile.config import Grouping, TransformConfig
from lte_compile.inspection.kernels import TOKENS, KernelOfSite, explain
from lte_compile.kernels.selection import check_density
from lte_compile.rewriting.layouts import set_layout
from lte_compile.routing.router import routers
from lte_compile.training.progress import TrainingProgress
from lte_compile.transform import transform

_DEVICES = ("auto", "cpu", "cuda")


def explain_kernels(
    settings: BenchSettings, tokens: Sequence[int] | None, densities: Sequence[float] | None
) -> Outcome:
    """The device need not be there: nothing runs on it. A dense model is explained as `transform` would make it.

    Densities are those that were calibrated, unless some are given.
    """
    device = _device(settings.device)
    counts = tokens or TOKENS
    expected: Sequence[float | None] = densities or (None,)
    dtype = pick_dtype(settings.dtype)
    shape = given_shape(settings)
    with TrainingProgress() as progress:
        if shape is None:
            model = _routed_model(settings, progress)
            with progress.working("tracing"):
                found = [
                    each
                    for density in expected
                    for each in explain(model, tokens=counts, device=device, dtype=dtype, density=density)
                ]
        else:
            pairs = [(density, count) for density in expected for count in counts]
            found = [_of_shape(settings.subject, shape, count, device, dtype, density) for density, count in pairs]
    kind = str(dtype).removeprefix("torch.")
    document = {"subject": settings.subject, "device": device, "dtype": kind, "sites": [f.to_dict() for f in found]}
    return Outcome(document, [_table(found, f"Kernels on {device}, {kind}"), *_reasons(found)])


def _of_shape(
    name: str, shape: FfnShape, tokens: int, device: str, dtype: torch.dtype | None, density: float | None
) -> KernelOfSite:
    check_density(density)
    choice = kernel_choice(shape, dtype or torch.float32, device, tokens, density)
    return KernelOfSite(name, tokens, density, choice.lowering.name, choice.refusals)


def _routed_model(settings: BenchSettings, progress: TrainingProgress) -> nn.Module:
    path = find_model(settings.subject, progress)
    with progress.working("loading"):
        model = load_model(path)
        if not any(routers(model)):
            progress.say(f"{settings.subject} has no routers: as converted, experts of {settings.expert_size}")
            # Grouping takes time, and which neurons make an expert changes no choice.
            transform(model, TransformConfig(expert_size=settings.expert_size, grouping=Grouping.CONTIGUOUS))
            set_layout(model, "neuron_major")
    return model


def _device(name: str) -> str:
    if name not in _DEVICES:
        raise ValueError(f"--device must be {', '.join(_DEVICES)} with --explain; got {name!r}")
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def _table(found: Sequence[KernelOfSite], title: str) -> Table:
    """A row a site and density, a column a number of tokens."""
    counts = list(dict.fromkeys(each.tokens for each in found))
    plural = [f"{count} token{'s' if count > 1 else ''}" for count in counts]
    table = Table(Column("Down-projection", overflow="fold"), "Density", *plural, title=title, title_justify="left")
    rows: dict[tuple[str, float | None], dict[int, KernelOfSite]] = {}
    for each in found:
        rows.setdefault((each.site, each.density), {})[each.tokens] = each
    for (site, density), kernels in rows.items():
        shown = "not calibrated" if density is None else f"{100 * density:.0f} %"
        table.add_row(site, shown, *(kernels[count].kernel for count in counts))
    return table


def _reasons(found: Sequence[KernelOfSite]) -> list[str]:
    """Each choice once, with what speaks against the kernels above it in the table."""
    lines: dict[str, None] = {}
    for each in found:
        why = "; ".join(f"not {name}: {reason}" for name, reason in each.refusals.items())
        lines[f"{each.tokens} token{'s' if each.tokens > 1 else ''}, {each.kernel}" + (f"  ({why})" if why else "")] = (
            None
        )
    return list(lines)
