"""Where arrows may point: the rooms know nothing of the hall, the hall's packages have an order, files stay short."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("kernels", "passes", "exporters")
# What each room may import of this package beside itself (CONTRIBUTING.md); the hall may import all of them.
ROOM_MAY_IMPORT = {"kernels": set[str](), "passes": {"kernels"}, "exporters": {"kernels", "passes"}}
# From the bottom up: each may import those before it.
HALL = (
    "config", "backend_options", "data", "grouping", "capture", "routing", "reports", "running", "rewriting",
    "backend", "bench", "inspection", "calibration", "training", "evaluation", "huggingface", "transform", "baselines",
    "checkpoints", "comparison", "serving", "demo", "cli",
)  # fmt: skip
MOST_LINES = 450


def _sources() -> dict[str, Path]:
    """Modules by dotted name below the package; a room's files are found where they really are."""
    found = {}
    for folder, prefix in [(ROOT / "lte_compile", ""), *((ROOT / room, f"{room}.") for room in ROOMS)]:
        for path in folder.rglob("*.py"):
            inside = path.relative_to(folder)
            if not prefix and inside.parts[0] in ROOMS:
                continue  # the link to a room
            found[prefix + ".".join(inside.with_suffix("").parts)] = path
    return found


SOURCES = _sources()


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name.removeprefix("lte_compile.") for name in names if name.startswith("lte_compile."))


def _home(name: str) -> str:
    return name.split(".")[0]


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_know_nothing_of_the_hall(room: str) -> None:
    allowed = ROOM_MAY_IMPORT[room] | {room}
    broken = [
        (module, imported)
        for module, path in SOURCES.items()
        if _home(module) == room
        for imported in _imports(path)
        if _home(imported) not in allowed
    ]
    assert not broken


def test_packages_of_the_hall_import_what_is_below_them() -> None:
    rank = {name: number for number, name in enumerate(HALL)}
    in_hall = {name: path for name, path in SOURCES.items() if _home(name) not in {*ROOMS, "__init__"}}
    assert {_home(name) for name in in_hall} == set(HALL)
    broken = [
        (module, imported)
        for module, path in in_hall.items()
        for imported in _imports(path)
        if _home(imported) in rank and rank[_home(imported)] > rank[_home(module)]
    ]
    assert not broken


def test_no_module_imports_itself_by_a_detour() -> None:
    graph = nx.DiGraph()
    for module, path in SOURCES.items():
        for imported in _imports(path):
            target = imported if imported in SOURCES else imported.rpartition(".")[0]
            if target in SOURCES:
                graph.add_edge(module, target)
    assert not list(nx.simple_cycles(graph))


def test_files_are_short() -> None:
    lines = {name: len(path.read_text().splitlines()) for name, path in SOURCES.items()}
    assert not {name: count for name, count in lines.items() if count > MOST_LINES}
