"""Models written as text, with what an FFN search must find in them known by construction.

A generated model is the source of an nn.Module, so that a failing example prints as code that can be run by hand.
`generated_ffns` writes FFNs, `generated_decoys` what only looks like one; `programs` joins blocks of both.

Shapes: B batch, T tokens, D model width, F neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from textwrap import indent
from typing import Any

import torch
from torch import Tensor, nn

from lte_compile.passes.ir import FfnSite, Fusion


@dataclass(frozen=True)
class Sizes:
    batch: int
    tokens: int
    width: int
    hidden: int


@dataclass(frozen=True)
class Expected:
    """What a site must say. `gate` is the projection that is known to pass the activation; None leaves that open."""

    projections: frozenset[str]
    down: str
    sizes: Sizes
    fusions: frozenset[Fusion] = frozenset((Fusion.SEPARATE,))
    gate: str | None = None
    activation: str | None = None
    added: frozenset[str] = frozenset()  # biases and per-neuron parameters; one may be read as the other

    def describes(self, site: FfnSite) -> bool:
        """Whether `site` is this one, in every field that the construction determines."""
        added = {site.up_bias, site.gate_bias, site.down_bias} - {None}
        return (
            {site.up, site.gate or site.up} == self.projections
            and site.down == self.down
            and (site.width, site.hidden) == (self.sizes.width, self.sizes.hidden)
            and site.fusion in self.fusions
            and self.gate in (None, site.gate)
            and self.activation in (None, site.activation)
            and added | set(site.hidden_parameters) == self.added
        )


@dataclass
class Block:
    """One method of the model under construction: members it needs, statements, and the site it is (None: a decoy)."""

    name: str
    sizes: Sizes
    members: dict[str, str] = field(default_factory=dict)
    statements: list[str] = field(default_factory=list)
    expected: Expected | None = None
    kind: str = "ffn"

    def member(self, kind: str, construction: str) -> str:
        """Declares a parameter or module; returns how the forward pass spells it."""
        name = f"{self.name}_{kind}{sum(known.startswith(f'{self.name}_{kind}') for known in self.members)}"
        self.members[name] = construction
        return f"self.{name}"

    def parameter(self, kind: str, *shape: int) -> str:
        """Positive values, for scales."""
        return self.member(kind, f"nn.Parameter(0.3 + 0.4 * torch.rand({shape}))")

    def weight(self, kind: str, *shape: int) -> str:
        return self.member(kind, f"nn.Parameter(0.3 * torch.randn({shape}))")

    def let(self, expression: str) -> str:
        """Adds a statement; returns the variable that holds its value."""
        variable = f"v{len(self.statements)}"
        self.statements.append(f"{variable} = {expression}")
        return variable

    def source(self, result: str) -> str:
        lines = [f"def {self.name}(self, x, z):  # {self.kind}", *(f"    {line}" for line in self.statements)]
        return "\n".join([*lines, f"    return {result}"])


@dataclass(frozen=True)
class Program:
    """A generated model: its source, its sizes, and the sites an FFN search must find, no more and no less."""

    source: str
    sizes: Sizes
    expected: tuple[Expected, ...]
    places: int  # how often one of them runs

    def __repr__(self) -> str:
        truth = "\n".join(f"  {expected}" for expected in self.expected) or "  none"
        shape = [self.sizes.batch, self.sizes.tokens, self.sizes.width]
        return f"\n{self.source}\n\n# x and z: {shape}\n# sites:\n{truth}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # how hypothesis prints a failing example
        printer.text(repr(self))

    def build(self) -> nn.Module:
        """The model in float64, with seeded weights."""
        scope: dict[str, Any] = {}
        exec(f"import torch\nimport torch.nn.functional as F\nfrom torch import nn\n\n{self.source}", scope)
        torch.manual_seed(0)
        model: nn.Module = scope["Generated"]()
        return model.double().eval()

    def inputs(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        shape = (self.sizes.batch, self.sizes.tokens, self.sizes.width)
        x, z = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        return x, z


def program(sizes: Sizes, blocks: Sequence[tuple[Block, str]], calls: Sequence[int]) -> Program:
    """The model that runs `blocks` (each with the expression it returns) in the order of `calls`, which may repeat."""
    members = {name: text for block, _ in blocks for name, text in block.members.items()}
    lines = [f"self.{name} = {text}" for name, text in members.items()]
    init = "def __init__(self):\n    super().__init__()\n" + indent("\n".join(lines), "    ")
    steps = "\n".join(f"x = self.{blocks[index][0].name}(x, z)" for index in calls)
    forward = "def forward(self, x, z):\n" + indent(f"{steps}\nreturn x", "    ")
    methods = [init, *(block.source(result) for block, result in blocks), forward]
    used = [blocks[index][0] for index in dict.fromkeys(calls)]
    expected = tuple(block.expected for block in used if block.expected is not None)
    places = sum(blocks[index][0].expected is not None for index in calls)
    return Program("class Generated(nn.Module):\n" + indent("\n\n".join(methods), "    "), sizes, expected, places)
