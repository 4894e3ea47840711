"""graph: the traced graph of a model as text, before and after each pass.

print(lte_compile.graph(model))
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from torch.export import ExportedProgram

from lte_compile.capture.capture import Inputs, capture_all
from lte_compile.passes.anchors import is_lte, level_of
from lte_compile.passes.copying import copy_captured
from lte_compile.passes.fuse import FuseExperts
from lte_compile.passes.ir import CapturedGraph, Level, Pass
from lte_compile.passes.lower import LowerSparse
from lte_compile.passes.match import find_ffns
from lte_compile.passes.pipeline import PipelineStep, run_pipeline
from lte_compile.passes.rendering import excerpt, render_lines

_WHOLE_UP_TO = 60  # lines; longer graphs are shown around their FFNs only, to stay readable in a terminal


@dataclass(frozen=True)
class GraphStage:
    """The graph as captured or after one pass: its whole text, what `str()` shows of it, and what the pass reported."""

    title: str
    text: str
    shown: str
    note: str = ""

    def __str__(self) -> str:
        return "\n".join([f"=== {self.title} ===", self.shown, *(["", self.note] if self.note else [])])


@dataclass(frozen=True)
class GraphTrace:
    """What `graph` returns: `str()` is for reading; `stages` hold each stage's whole text."""

    stages: tuple[GraphStage, ...]

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.stages))


def graph(
    model: nn.Module | ExportedProgram, example_inputs: Inputs | None = None, *, lower: bool = True
) -> GraphTrace:
    """The model's traced graph and what each pass makes of it. The model is left as it was.

    A transformed model shows lte.route, lte.select and lte.gate_hidden, then lte.expert_ffn, then lte.sparse_ffn; a
    model that was not transformed shows the FFNs that were found.

    Args:
        model: an nn.Module, fx.GraphModule or ExportedProgram, in any stage.
        example_inputs: see `lte_compile.capture.capture.capture`; transformers models need none.
        lower: include the pass that makes lte.sparse_ffn, as in inference; without it the graph stays trainable.
    """
    captured = [copy_captured(each) for each in capture_all(model, example_inputs)]
    stages: list[GraphStage] = []
    for index, each in enumerate(captured):
        prefix = f"graph {index + 1} of {len(captured)}, " if len(captured) > 1 else ""
        stages += _dense_stages(each, prefix) if level_of(each) is Level.DENSE else _pass_stages(each, prefix, lower)
    return GraphTrace(tuple(stages))


def _dense_stages(captured: CapturedGraph, prefix: str) -> list[GraphStage]:
    search = find_ffns(captured)
    members = {node for match in search.matches for node in match.region}
    members |= {linear.node for match in search.matches for linear in match.linears}
    lines = render_lines(captured)
    kept = [index for index, node in enumerate(lines) if node in members]
    found = [f"  {match.site.name or match.site.down}" for match in search.matches]
    note = f"{len(found)} FFNs found, none has a router; lte_compile.transform adds them"
    return [_stage(f"{prefix}captured (dense)", list(lines.values()), kept, "\n".join([note, *found]))]


def _pass_stages(captured: CapturedGraph, prefix: str, lower: bool) -> list[GraphStage]:
    level = level_of(captured)
    lines = render_lines(captured)
    passes: tuple[Pass, ...] = ()
    if level is Level.ROUTED:
        passes = (FuseExperts(), LowerSparse()) if lower else (FuseExperts(),)
    steps: list[PipelineStep] = []
    lte_lines = [index for index, node in enumerate(lines) if is_lte(node)]
    run_pipeline(captured, passes, steps.append)
    before = list(lines.values())
    changed = _changed(before, steps[0].after.splitlines()) if steps else []
    stages = [_stage(f"{prefix}captured ({level.value})", before, [*lte_lines, *changed])]
    for step, run in zip(steps, passes, strict=True):
        after = step.after.splitlines()
        kept = [*_changed(after, step.before.splitlines()), *_mentions_lte(after)]
        stages.append(_stage(f"{prefix}after {run.name} ({run.ensures.value})", after, kept, str(step.report)))
    return stages


def _stage(title: str, lines: list[str], kept: Iterable[int], note: str = "") -> GraphStage:
    whole = "\n".join(lines)
    shown = whole if len(lines) <= _WHOLE_UP_TO else excerpt(lines, set(kept))
    return GraphStage(title, whole, shown, note)


def _changed(lines: list[str], others: list[str]) -> list[int]:
    """Indices of the lines that `others` lacks."""
    known = set(others)
    return [index for index, line in enumerate(lines) if line not in known]


def _mentions_lte(lines: list[str]) -> list[int]:
    return [index for index, line in enumerate(lines) if " = lte." in line]
