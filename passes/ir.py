"""What every pass speaks: captured graphs, FFN sites, refusals, levels and the pass protocol.

A graph moves through three levels (docs/design.md): DENSE as captured, ROUTED with router, selection and anchor
nodes, LOWERED with kernels chosen. A pass is a frozen value that takes a graph from one level to another and reports
what it did.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any, ClassVar, Protocol

import torch.fx as fx


class Level(StrEnum):
    DENSE = "dense"
    ROUTED = "routed"
    LOWERED = "lowered"


class SiteKind(StrEnum):
    FFN = "ffn"
    NATIVE_MOE = "native_moe"  # experts the model has of itself, stacked in 3-d parameters: reported, never rewritten


class WeightLayout(StrEnum):
    """How a projection's 2-d parameter lies: nn.Linear stores [out, in], GPT-2's Conv1D [in, out]."""

    OUT_IN = "out_in"
    IN_OUT = "in_out"


class Fusion(StrEnum):
    """How gate and up share one parameter, if they do."""

    SEPARATE = "separate"
    GATE_THEN_UP = "gate_then_up"  # rows [0, F) gate, [F, 2F) up
    UP_THEN_GATE = "up_then_gate"
    INTERLEAVED_GATE_FIRST = "interleaved_gate_first"  # rows 0, 2, 4 ... gate
    INTERLEAVED_UP_FIRST = "interleaved_up_first"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where in a model an FFN runs: names of modules, "" being the model itself.

    `first` and `down` are called with the FFN's input and with its hidden value and do nothing to them but project;
    None where a forward multiplies by the weight itself. `wrapper` is a module around `down` that hands the hidden
    value on to `down` and to a low-rank update. `scope` runs the whole FFN and owns its weights, perhaps in submodules.
    """

    scope: str
    first: str | None
    down: str | None
    wrapper: str | None = None


@dataclass(frozen=True, kw_only=True)
class FfnSite:
    """One feed-forward network, described by the names of its parameters.

    `up`, `gate` and `down` are the fully qualified names of the weights; `gate` is the projection that goes through the
    activation in a gated FFN and None in a plain one. Where one parameter holds both halves, `up == gate` and `fusion`
    says how. `width` is the model width D, `hidden` the neuron count F. `activation` is a name of
    `lte_compile.kernels.activations.ACTIVATIONS`, or "unknown" when the element-wise region matches none of them.
    """

    up: str
    gate: str | None
    down: str
    width: int
    hidden: int
    activation: str
    gated: bool
    up_bias: str | None = None
    gate_bias: str | None = None
    down_bias: str | None = None
    up_layout: WeightLayout = WeightLayout.OUT_IN
    gate_layout: WeightLayout = WeightLayout.OUT_IN
    down_layout: WeightLayout = WeightLayout.OUT_IN
    fusion: Fusion = Fusion.SEPARATE
    hidden_parameters: tuple[str, ...] = ()  # per-neuron parameters (length F) inside the element-wise region
    first_projection: str = ""  # weight of whichever of up and gate runs first: its module hosts the router
    kind: SiteKind = SiteKind.FFN
    experts: int = 1  # how many matrices each weight stacks: 1 but for native MoE
    up_start: int = 0  # first of the FFN's rows in `up`, where that weight also projects to something else
    gate_start: int = 0
    down_start: int = 0  # first of the FFN's columns in `down`, where that also reads something else (attention)
    up_low_rank: tuple[str, ...] = ()  # second factors of low-rank updates (LoRA's B) that are added to up's result
    gate_low_rank: tuple[str, ...] = ()
    down_low_rank: tuple[str, ...] = ()  # first factors (LoRA's A) of updates that read the hidden value beside `down`
    places: tuple[Place, ...] = ()  # empty: `first_projection` and `down` are weights of modules called to project
    router: str = ""  # where its router lives, if not under the module of `first_projection`

    @property
    def name(self) -> str:
        """The innermost module path that all of the site's parameters share; the down weight's owner if none."""
        owners = [p.rpartition(".")[0].split(".") for p in (self.up, self.down)]
        shared = []
        for left, right in zip(*owners, strict=False):
            if left != right:
                break
            shared.append(left)
        return ".".join(shared) or self.down.rpartition(".")[0]

    @property
    def parameters(self) -> tuple[str, ...]:
        """Every parameter name of the site, weights first, without repeats."""
        names = (self.up, self.gate, self.down, self.up_bias, self.gate_bias, self.down_bias, *self.hidden_parameters)
        low_rank = (*self.up_low_rank, *self.gate_low_rank, *self.down_low_rank)
        return tuple(dict.fromkeys(name for name in (*names, *low_rank) if name is not None))

    @property
    def router_path(self) -> str:
        """The name of the router module: of its own, or `router` beside the first projection's weight."""
        owner = self.first_projection.rpartition(".")[0]
        return self.router or (f"{owner}.router" if owner else "router")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; `from_dict` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> FfnSite:
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(record) - known):
            raise ValueError(f"FFN site record has unknown fields {unknown}; known are {sorted(known)}")
        values = dict(record)
        values.setdefault("gate_layout", values.get("up_layout", WeightLayout.OUT_IN))  # older records say it once
        for key, enum in _SITE_ENUMS:
            if key in values:
                values[key] = enum(values[key])
        for key in ("hidden_parameters", "up_low_rank", "gate_low_rank", "down_low_rank"):
            values[key] = tuple(values.get(key, ()))
        values["places"] = tuple(Place(**place) for place in values.get("places", ()))
        return cls(**values)


_SITE_ENUMS = (
    ("up_layout", WeightLayout),
    ("gate_layout", WeightLayout),
    ("down_layout", WeightLayout),
    ("fusion", Fusion),
    ("kind", SiteKind),
)


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """A candidate that is not (or cannot be) an FFN site: the graph node, its weight's name if known, and why."""

    node: str
    reason: str
    parameter: str | None = None


@dataclass(frozen=True, kw_only=True)
class CapturedGraph:
    """A traced graph with fake values on its nodes (`meta["val"]` or `meta["example_value"]`).

    `parameters` maps the name of a placeholder or get_attr node to the fully qualified name of the parameter or buffer
    it stands for. Tied parameters map to one name each.
    """

    module: fx.GraphModule
    parameters: Mapping[str, str]
    route: str  # "export", "dynamo" or "fx": which tracer made it


@dataclass(frozen=True, kw_only=True)
class PassReport:
    """What one pass did to one graph: a line per change, and every site it left alone with the reason."""

    name: str
    changes: tuple[str, ...] = ()
    refusals: tuple[Rejection, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.name}: {len(self.changes)} changed, {len(self.refusals)} left alone"]
        lines += [f"  + {change}" for change in self.changes]
        lines += [f"  - {r.node}: {r.reason}" for r in self.refusals]
        return "\n".join(lines)


class Pass(Protocol):
    """A named, frozen graph-to-graph step. It edits `graph.module` in place and says what it did."""

    name: ClassVar[str]
    requires: ClassVar[Level]
    ensures: ClassVar[Level]

    def __call__(self, graph: CapturedGraph) -> PassReport: ...
