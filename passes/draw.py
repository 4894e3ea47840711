"""A picture of one FFN site: its nodes from x to the down-projection, laid out in rows by depth, coloured by role."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import networkx as nx
import torch.fx as fx
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from lte_compile.passes.dataflow import GraphView, is_tensor, op_name, shape_of
from lte_compile.passes.ir import CapturedGraph
from lte_compile.passes.linear import Linear
from lte_compile.passes.shared import FfnMatch

FORMATS = (".svg", ".png", ".pdf")
COLOURS = {
    "input x": "#e0e0e0",
    "gate projection": "#fdd49e",
    "gate and up projection": "#fee391",
    "up projection": "#a6cee3",
    "activation region": "#c7e9c0",
    "router gates": "#fbb4ae",
    "down projection": "#cab2d6",
}
_BOX_WIDTH, _BOX_HEIGHT, _COLUMN, _ROW = 2.5, 0.78, 2.9, 1.2  # inches
_FONT_SIZE = 9
_LINE_COLOUR = "#444444"


class _Box(NamedTuple):
    """One node of the picture: its lines of text, and its role (a key of `COLOURS`)."""

    lines: tuple[str, ...]
    role: str


def draw_match(captured: CapturedGraph, match: FfnMatch, path: Path) -> Path:
    """Writes the picture in the format of the path's ending, to a temporary name first.

    Raises:
        ValueError: the ending is none of `FORMATS`.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"cannot draw to {path.name!r}; end the name in one of {', '.join(FORMATS)}")
    graph = _picture_graph(captured, match)
    figure = _figure(graph, match)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": match.site.name}
    ):  # text stays text, same bytes every time
        figure.savefig(partial, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None)
    os.replace(partial, path)
    return path


def _picture_graph(captured: CapturedGraph, match: FfnMatch) -> nx.DiGraph[fx.Node]:
    """x, projections, region, gates and down as a graph whose nodes carry a `box`."""
    view = GraphView.of(captured)
    boxes = {match.x: _Box(("input x", match.x.name, _shape(match.x)), "input x")}
    for linear in match.projections:
        boxes |= _linear_boxes(view, linear, match, _projection_role(linear, match))
    for node in match.region:
        boxes[node] = _Box((op_name(view, node), _shape(node)), "activation region")
    if match.anchor is not None:
        gates = match.anchor.all_input_nodes[1]
        boxes[match.anchor] = _Box(("lte::gate_hidden", _shape(match.anchor)), "router gates")
        boxes[gates] = _Box((f"gates: {op_name(view, gates)}", _shape(gates)), "router gates")
    boxes |= _linear_boxes(view, match.down, match, "down projection")
    graph: nx.DiGraph[fx.Node] = nx.DiGraph()
    for node, box in sorted(boxes.items(), key=lambda item: view.order[item[0]]):
        graph.add_node(node, box=box)
    graph.add_edges_from((source, node) for node in boxes if node is not match.x for source in _sources(node, boxes))
    graph.add_edges_from((match.x, linear.node) for linear in match.projections)
    return graph


def _sources(node: fx.Node, boxes: Mapping[fx.Node, _Box]) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if source in boxes]


def _projection_role(linear: Linear, match: FfnMatch) -> str:
    if match.gate is None:
        return "up projection"
    if match.gate is match.up:
        return "gate and up projection"
    return "gate projection" if linear is match.gate else "up projection"


def _linear_boxes(view: GraphView, linear: Linear, match: FfnMatch, role: str) -> dict[fx.Node, _Box]:
    owner = f"{match.site.name}."
    bias = " + bias" if linear.result is linear.node and linear.bias is not None else ""
    lines = (role, op_name(view, linear.node) + bias, (linear.weight or "").removeprefix(owner))
    boxes = {linear.node: _Box((*lines, _shape(linear.node)), role)}
    if linear.result is not linear.node:
        boxes[linear.result] = _Box(("add", (linear.bias or "").removeprefix(owner), _shape(linear.result)), role)
    return boxes


def _shape(node: fx.Node) -> str:
    return " x ".join(str(size) for size in shape_of(node)) if is_tensor(node) else "tuple"


def _routed(graph: nx.DiGraph[fx.Node]) -> tuple[nx.DiGraph[object], list[list[object]]]:
    """The graph with a bend point in every row an edge crosses, and each edge as the list of points it visits."""
    rows = {node: depth for depth, row in enumerate(nx.topological_generations(graph)) for node in row}
    points: nx.DiGraph[object] = nx.DiGraph()
    points.add_nodes_from((node, {"row": row}) for node, row in rows.items())
    routes: list[list[object]] = []
    for source, target in graph.edges:
        bends = [(source, target, row) for row in range(rows[source] + 1, rows[target])]
        points.add_nodes_from((bend, {"row": bend[-1]}) for bend in bends)
        route = [source, *bends, target]
        nx.add_path(points, route)
        routes.append(route)
    return points, routes


def _positions(points: nx.DiGraph[object]) -> dict[object, tuple[float, float]]:
    """Row by row: each point below what leads to it, moved apart only as far as its neighbours need."""
    columns: dict[object, float] = {}
    for row in nx.topological_generations(points):
        wanted = {point: _mean([columns[source] for source in points.predecessors(point)]) for point in row}
        ordered = sorted(row, key=lambda point: wanted[point])
        placed: list[float] = []
        for place, point in enumerate(ordered):
            nearest = placed[-1] + _distance(ordered[place - 1], point) if placed else wanted[point]
            placed.append(max(wanted[point], nearest))
        shift = _mean([wanted[point] - column for point, column in zip(ordered, placed, strict=True)])
        columns |= {point: column + shift for point, column in zip(ordered, placed, strict=True)}
    return {point: (column, -points.nodes[point]["row"] * _ROW) for point, column in columns.items()}


def _distance(left: object, right: object) -> float:
    """Between the centres of two neighbours in a row; bend points are slim."""
    boxes = isinstance(left, fx.Node) + isinstance(right, fx.Node)
    return (0.3, (_COLUMN + 0.3) / 2, _COLUMN)[boxes]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _figure(graph: nx.DiGraph[fx.Node], match: FfnMatch) -> Figure:
    points, routes = _routed(graph)
    positions = _positions(points)
    columns, rows = zip(*positions.values(), strict=True)
    left, right = min(columns) - _BOX_WIDTH * 0.75, max(columns) + _BOX_WIDTH * 0.75
    bottom, top = min(rows) - _BOX_HEIGHT, max(rows) + _ROW
    figure = Figure(figsize=(right - left, top - bottom), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.set_axis_off()
    for route in routes:
        _draw_route(axes, [positions[point] for point in route])
    for node in graph:
        _draw_box(axes, graph.nodes[node]["box"], *positions[node])
    _draw_title(axes, match, (left + right) / 2, top)
    return figure


def _draw_title(axes: Axes, match: FfnMatch, column: float, top: float) -> None:
    site = match.site
    kind = "gated" if site.gated else "plain"
    axes.text(column, top - 0.25, site.name, ha="center", weight="bold", fontsize=_FONT_SIZE + 1)
    facts = f"D = {site.width}, F = {site.hidden}, {site.activation}, {kind}"
    axes.text(column, top - 0.5, facts, ha="center", fontsize=_FONT_SIZE)


def _draw_box(axes: Axes, box: _Box, column: float, row: float) -> None:
    corner = (column - _BOX_WIDTH / 2, row - _BOX_HEIGHT / 2)
    colour = COLOURS[box.role]
    patch = FancyBboxPatch(
        corner,
        _BOX_WIDTH,
        _BOX_HEIGHT,
        boxstyle="round,pad=0,rounding_size=0.08",
        facecolor=colour,
        edgecolor=_LINE_COLOUR,
    )
    patch.set_gid(box.role.replace(" ", "-"))
    axes.add_patch(patch)
    axes.text(column, row, "\n".join(box.lines), ha="center", va="center", fontsize=_FONT_SIZE, linespacing=1.25)


def _draw_route(axes: Axes, points: list[tuple[float, float]]) -> None:
    """From the bottom of the first box through the bend points to the top of the last."""
    (first, first_row), *bends, (last, last_row) = points
    corners = [(first, first_row - _BOX_HEIGHT / 2)]
    for column, row in bends:
        corners += [(column, row + _BOX_HEIGHT / 2), (column, row - _BOX_HEIGHT / 2)]
    axes.plot(*zip(*corners, strict=True), color=_LINE_COLOUR, linewidth=1)
    arrow = {"arrowstyle": "-|>", "color": _LINE_COLOUR, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=(last, last_row + _BOX_HEIGHT / 2), xytext=corners[-1], arrowprops=arrow)
