"""What lte_compile sees in a model: `print(inspect(model))` lists its FFN sites and why nothing else is one."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from torch import nn
from torch.export import ExportedProgram

from lte_compile.capture.capture import Inputs, capture_all
from lte_compile.passes.draw import draw_match
from lte_compile.passes.ir import CapturedGraph, FfnSite, Fusion, Rejection, SiteKind
from lte_compile.passes.match import FfnMatch, FfnSearch, find_ffns

_TABLE_WIDTH = 160


@dataclass(frozen=True)
class Inspection:
    """The FFN sites of a model, the linear layers that are none of theirs and why, and which tracer saw the model.

    Sites of kind "native_moe" are experts that the model has of itself; they are shown and never rewritten. `str()` is
    a readable table, `to_dict()` the JSON-able form, `draw()` a picture of one site.
    """

    sites: tuple[FfnSite, ...]
    rejections: tuple[Rejection, ...]
    route: str
    graphs: tuple[CapturedGraph, ...] = field(repr=False, default=())
    matches: tuple[tuple[CapturedGraph, FfnMatch], ...] = field(repr=False, default=())

    @property
    def ffn_sites(self) -> tuple[FfnSite, ...]:
        """The sites that can be rewritten."""
        return tuple(site for site in self.sites if site.kind is SiteKind.FFN)

    @property
    def native_moe_sites(self) -> tuple[FfnSite, ...]:
        """The experts that the model has of itself."""
        return tuple(site for site in self.sites if site.kind is SiteKind.NATIVE_MOE)

    def __str__(self) -> str:
        parts = (self._heading(), _site_table(self.ffn_sites), self._native_moe(), _refusals(self.rejections))
        return "\n\n".join(part for part in parts if part)

    def _heading(self) -> str:
        graphs = "" if len(self.graphs) == 1 else f" in {len(self.graphs)} graphs"
        others = f"other linear layers: {len(self.rejections)}"
        return f"FFN sites: {len(self.ffn_sites)} (traced by {self.route}{graphs}), {others}"

    def _native_moe(self) -> str:
        if not self.native_moe_sites:
            return ""
        heading = f"native_moe sites: {len(self.native_moe_sites)}, experts of the model itself, left alone"
        return f"{heading}\n{_site_table(self.native_moe_sites)}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: sites, rejections and route."""
        return {
            "route": self.route,
            "sites": [site.to_dict() for site in self.sites],
            "rejections": [asdict(rejection) for rejection in self.rejections],
        }

    def draw(self, path: str | Path, site: int = 0) -> Path:
        """Writes the graph region of one site as a picture (.svg, .png or .pdf by the path's ending); returns the path.

        Raises:
            ValueError: there is no site of that index.
        """
        if not 0 <= site < len(self.sites):
            raise ValueError(f"there is no site {site}: this model has {len(self.sites)} (counted from 0)")
        graph, match = next(pair for pair in self.matches if pair[1].site == self.sites[site])
        return draw_match(graph, match, Path(path))


def inspect(model: nn.Module | ExportedProgram, example_inputs: Inputs | None = None) -> Inspection:
    """Captures the model and searches it for FFNs. The model is left as it was.

    Args:
        model: an nn.Module, fx.GraphModule or ExportedProgram.
        example_inputs: see `lte_compile.capture.capture.capture`; transformers models need none.
    """
    graphs = capture_all(model, example_inputs)
    searches = [find_ffns(graph) for graph in graphs]
    foreign = _used_in_other_graphs(graphs, searches)
    matches = tuple(
        (graph, match)
        for graph, search in zip(graphs, searches, strict=True)
        for match in (*search.matches, *search.native_moe)
        if match.site not in foreign
    )
    rejections = [rejection for search in searches for rejection in search.rejections]
    rejections += [Rejection(node=site.name, parameter=site.down, reason=why) for site, why in foreign.items()]
    rejections += _never_traced(model, graphs)
    sites = sorted(dict.fromkeys(match.site for _, match in matches), key=lambda site: site.kind is not SiteKind.FFN)
    return Inspection(tuple(sites), tuple(rejections), graphs[0].route, graphs, matches)


def require_sites(inspection: Inspection) -> tuple[FfnSite, ...]:
    """The sites to rewrite, or a ValueError that lists every candidate and why it was refused."""
    if inspection.ffn_sites:
        return inspection.ffn_sites
    if inspection.native_moe_sites:
        raise ValueError(f"no FFN found to rewrite, only experts of the model itself:\n{inspection}")
    if not inspection.rejections:
        raise ValueError("no FFN found: the traced graph has no linear layer at all")
    raise ValueError(f"no FFN found; every candidate was refused:\n{_refusals(inspection.rejections)}")


def _used_in_other_graphs(graphs: Sequence[CapturedGraph], searches: Sequence[FfnSearch]) -> dict[FfnSite, str]:
    """Sites whose weights another graph of a broken-up model uses as something else."""
    return {
        site: f"`{name}` is also used in another graph of the model, in which it is no part of this FFN"
        for site in dict.fromkeys(site for search in searches for site in search.sites)
        for graph, search in zip(graphs, searches, strict=True)
        if site not in search.sites
        for name in site.parameters
        if name != site.down_bias and name in graph.parameters.values()
    }


def _never_traced(model: object, graphs: Sequence[CapturedGraph]) -> Iterator[Rejection]:
    """Matrices of a broken-up model that none of its graphs reads: an untaken branch may hold an FFN."""
    if len(graphs) == 1 or not isinstance(model, nn.Module):
        return
    traced = {name for graph in graphs for name in graph.parameters.values()}
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and name not in traced:
            reason = "not reached while tracing: it lies in a branch that the example inputs do not take, or is unused"
            yield Rejection(node="not traced", parameter=name, reason=reason)


def _site_table(sites: Sequence[FfnSite]) -> str:
    if not sites:
        return ""
    table = Table("count", "FFN", "D", "F", "activation", "gated", "layout", "up", "gate", "down", box=None)
    for (pattern, *columns), count in _grouped(_site_row(site) for site in sites).items():
        table.add_row(str(count), pattern, *columns)
    return _rendered(table)


def _site_row(site: FfnSite) -> tuple[str, ...]:
    layout = site.up_layout.value if site.fusion is Fusion.SEPARATE else f"{site.up_layout.value}, {site.fusion.value}"
    layout += "" if site.kind is SiteKind.FFN else f", {site.experts} experts"
    names = (_below(name, site.name) for name in (site.up, site.gate, site.down))
    flags = (site.activation, "yes" if site.gated else "no", layout)
    return (_pattern(site.name), str(site.width), str(site.hidden), *flags, *(_pattern(name) for name in names))


def _below(name: str | None, owner: str) -> str:
    return "-" if name is None else name.removeprefix(f"{owner}.")


def _refusals(rejections: Sequence[Rejection]) -> str:
    if not rejections:
        return ""
    table = Table("count", Column("not in an FFN", overflow="fold"), "reason", box=None)
    rows = ((_pattern(r.parameter or r.node), _pattern_in_reason(r.reason)) for r in rejections)
    for (name, reason), count in _grouped(rows).items():
        table.add_row(str(count), name, reason)
    return _rendered(table)


def _pattern(name: str) -> str:
    """Layer numbers become *, so that the layers of a stack share a line."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _pattern_in_reason(reason: str) -> str:
    """The same for names quoted in a reason; the numbers FX puts behind node names go as well."""
    return re.sub(r"`([^`]*)`", lambda quoted: "`" + re.sub(r"_\d+$", "", _pattern(quoted[1])) + "`", reason)


def _grouped(rows: Any) -> Counter[tuple[str, ...]]:
    return Counter(rows)


def _rendered(table: Table) -> str:
    text = io.StringIO()
    Console(file=text, width=_TABLE_WIDTH, color_system=None, force_terminal=False, markup=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())
