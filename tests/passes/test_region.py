"""Region questions on small graphs, written as functions and traced."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
import torch.fx as fx
from torch import Tensor

from lte_compile.capture.capture import capture
from lte_compile.passes.dataflow import GraphView
from lte_compile.passes.region import between, escape, reachable, second_entry


def view_of(function: Callable[..., object], inputs: int = 1) -> tuple[GraphView, dict[str, fx.Node]]:
    graph = capture(fx.symbolic_trace(function), tuple(torch.randn(2, 4) for _ in range(inputs)))
    return GraphView.of(graph), {node.name: node for node in graph.module.graph.nodes}


def names(nodes: frozenset[fx.Node]) -> set[str]:
    return {node.name for node in nodes}


def diamond(x: Tensor) -> tuple[Tensor, Tensor]:
    left, right = torch.sin(x), torch.cos(x)
    aside = torch.exp(left)
    return left * right, aside


def test_between_holds_every_path_and_nothing_else() -> None:
    view, node = view_of(diamond)
    assert names(between(view, node["x"], node["mul"])) == {"x", "sin", "cos", "mul"}
    assert names(between(view, node["sin"], node["mul"])) == {"sin", "mul"}


def test_reachable_stops_at_the_end() -> None:
    view, node = view_of(diamond)
    assert names(reachable(view, [node["sin"]], node["mul"])) == {"exp"}
    assert names(reachable(view, [node["x"]], node["mul"])) == {"sin", "cos", "exp"}


def test_escape_names_the_value_and_its_user() -> None:
    view, node = view_of(diamond)
    assert escape(view, {node["sin"], node["cos"]}, {node["mul"]}) == (node["sin"], node["exp"])
    assert escape(view, {node["cos"]}, {node["mul"]}) is None


def test_reading_a_size_is_no_escape() -> None:
    def sized(x: Tensor) -> Tensor:
        hidden = torch.sin(x)
        return torch.cos(hidden).view(hidden.size(0), -1)

    view, node = view_of(sized)
    assert escape(view, {node["sin"]}, {node["cos"]}) is None


def test_a_part_that_nobody_reads_is_no_escape() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    halves = graph.call_function(torch.chunk, (x, 2, -1))
    first, second = (graph.call_function(operator.getitem, (halves, index)) for index in range(2))
    graph.output(graph.call_function(torch.sin, (first,)))
    view = GraphView.of(capture(fx.GraphModule(torch.nn.Module(), graph), (torch.randn(2, 4),)))
    assert escape(view, {halves, first}, {*first.users}) is None
    with graph.inserting_after(second):
        graph.call_function(torch.cos, (second,))
    assert escape(view, {halves, first}, {*first.users}) == (halves, second)


def test_a_region_entered_through_x_alone() -> None:
    view, node = view_of(diamond)
    assert second_entry(view, node["x"], node["mul"], ignored=()) is None


def test_a_second_entry_is_named() -> None:
    def masked(x: Tensor, mask: Tensor) -> Tensor:
        return torch.sin(x) * torch.exp(mask)

    view, node = view_of(masked, inputs=2)
    assert second_entry(view, node["x"], node["mul"], ignored=()) is node["exp"]
    assert second_entry(view, node["x"], node["mul"], ignored=(node["exp"],)) is None


def test_a_value_from_before_x_enters_around_it() -> None:
    def around(x: Tensor) -> Tensor:
        inner = torch.sin(x)
        return torch.cos(inner) * torch.exp(x)

    view, node = view_of(around)
    assert second_entry(view, node["x"], node["mul"], ignored=()) is None
    assert second_entry(view, node["sin"], node["mul"], ignored=()) is node["exp"]
