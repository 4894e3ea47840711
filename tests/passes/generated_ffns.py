"""Writing FFNs whose truth is known: spellings of projections, fused layouts, element-wise chains, token layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st

from lte_compile.passes.ir import Fusion
from tests.passes.generated import Block, Expected

Draw = Callable[[st.SearchStrategy[Any]], Any]

# How the tokens lie when the FFN runs: [B, T, D], [B * T, D], [T, B, D], [B, D, T].
ARRANGEMENTS = ("batched", "flat", "sequence first", "channels first")

# Element-wise chains. Each is written with the value so far, as {h}; {scale} asks for a per-neuron parameter.
BENDING = {
    "relu": "F.relu({h})",
    "relu in place": "F.relu({h} + 0.0, inplace=True)",
    "relu module": "{relu_module}({h})",
    "gelu": "F.gelu({h})",
    "gelu new": "0.5 * {h} * (1.0 + torch.tanh(0.7978845608028654 * ({h} + 0.044715 * torch.pow({h}, 3.0))))",
    "gelu erf": "{h} * 0.5 * (1.0 + torch.erf({h} / 2**0.5))",
    "quick gelu": "{h} * torch.sigmoid(1.702 * {h})",
    "silu": "F.silu({h})",
    "swish": "{h} * {h}.sigmoid()",
    "squared relu": "F.relu({h}) ** 2",
    "square": "torch.square({h})",
    "tanh": "torch.tanh({h})",
    "leaky": "F.leaky_relu({h}, 0.1)",
    "leaky where": "torch.where({h} > 0, {h}, 0.1 * {h})",
    "masked": "{h}.masked_fill({h} < 0, 0.0)",
    "clamp": "{h}.clamp(-3.0, 3.0)",
    "relu6": "F.hardtanh({h}, 0.0, 6.0)",
    "softcap": "3.0 * torch.tanh({h} / 3.0)",
    "softplus": "F.softplus({h})",
    "snake": "{h} + torch.sin({scale} * {h}) ** 2 / {scale}",
    "xielu": "torch.where({h} > 0, {scalar} * {h} * {h}, torch.expm1({h}) * {scalar})",
    "prelu": "{prelu}({h})",
}
# The named activation of a chain that is nothing but one of these.
NAMED = {
    "relu": "relu",
    "relu in place": "relu",
    "relu module": "relu",
    "gelu": "gelu",
    "gelu new": "gelu_tanh",
    "gelu erf": "gelu",
    "quick gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "squared relu": "relu_squared",
    "tanh": "tanh",
}
STRAIGHT = {
    "half": "0.5 * {h}",
    "shift": "{h} + 0.1",
    "in place": "{h}.mul(2.0).add_(0.1)",
    "scale": "{h} * {scale}",
    "exponential scale": "{h} * torch.exp({scale})",
    "bias": "{h} + {scale}",
    "scalar": "{h} * {scalar}",
    "dropout": "F.dropout({h}, 0.1, self.training)",
    "dropout module": "{dropout}({h})",
    "cast": "{h}.to(torch.float64)",
    "cast method": "{h}.double().contiguous()",
}
LAYOUTS = {  # on [B, T, F] and [T, B, F]
    "transposed pair": "{h}.transpose(1, 2).contiguous().transpose(1, 2)",
    "permuted pair": "{h}.permute(2, 0, 1).permute(1, 2, 0)",
    "flattened": "{h}.reshape(-1, {F}).view({h}.shape)",
    "unsqueezed": "{h}.unsqueeze(1).squeeze(1)",
    "unsqueezed last": "{h}.unsqueeze(-1).squeeze(-1)",
}


PRODUCTS = ("{gate} * {up}", "{up} * {gate}", "torch.mul({gate}, {up})")
JOINS = ("torch.maximum({gate}, {up})", "torch.tanh({gate} + {up})", "torch.where({gate} > {up}, {gate}, 0.1 * {up})")

# A projection of width 2F taken apart, {v} being its value and {lead} the sizes in front of its last axis.
HALVES = {
    "chunk": ("{v}.chunk(2, -1)[0]", "{v}.chunk(2, -1)[1]"),
    "split": ("{v}.split({F}, dim=-1)[0]", "{v}.split([{F}, {F}], -1)[1]"),
    "slices": ("{v}[..., :{F}]", "{v}[..., {F}:]"),
    "narrow": ("{v}.narrow(-1, 0, {F})", "torch.narrow({v}, -1, {F}, {F})"),
    "viewed": ("{v}.view({lead}, 2, {F}).unbind(-2)[0]", "{v}.view({lead}, 2, {F}).unbind(-2)[1]"),
    "unflattened": ("{v}.unflatten(-1, (2, {F})).select(-2, 0)", "{v}.unflatten(-1, (2, {F}))[..., 1, :]"),
}
INTERLEAVED = {
    "strided": ("{v}[..., ::2]", "{v}[..., 1::2]"),
    "pairs": ("{v}.view({lead}, {F}, 2)[..., 0]", "{v}.view({lead}, {F}, 2).select(-1, 1)"),
    "unbound pairs": ("{v}.reshape({lead}, {F}, 2).unbind(-1)[0]", "{v}.reshape({lead}, {F}, 2).unbind(-1)[1]"),
}
CHANNELS = {
    "chunk": ("{v}.chunk(2, 1)[0]", "{v}.chunk(2, 1)[1]"),
    "slices": ("{v}[:, :{F}]", "{v}[:, {F}:]"),
}


MODULES = {"relu_module": "nn.ReLU()", "prelu": "nn.PReLU()", "dropout": "nn.Dropout(0.1)"}


@dataclass(frozen=True)
class Projection:
    """A layer as written: the value it gives and the names of its parameters."""

    value: str
    weight: str
    bias: str | None


@dataclass(frozen=True)
class Hidden:
    """What the down-projection reads, and what the region before it says of the site."""

    value: str
    projections: tuple[Projection, ...]
    fusions: frozenset[Fusion]
    gate: str | None = None
    activation: str | None = None
    parameters: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Chain:
    """Element-wise steps as written: names of the steps, the value after them, per-neuron parameters used."""

    steps: tuple[str, ...]
    value: str
    parameters: frozenset[str]

    @property
    def bends(self) -> bool:
        return any(step in BENDING for step in self.steps)

    @property
    def activation(self) -> str | None:
        return NAMED.get(self.steps[0]) if len(self.steps) == 1 else None


def one_of(draw: Draw, items: Any) -> Any:
    return draw(st.sampled_from(sorted(items)))


def name_of(member: str) -> str:
    return member.removeprefix("self.")


def ffn(draw: Draw, block: Block, x: str) -> str:
    """Writes an FFN on `x` [B, T, D] into `block`, sets what a search must say of it, and returns its output."""
    arrangement = one_of(draw, ARRANGEMENTS)
    source = arranged(block, x, arrangement)
    write = {"plain": plain, "gated": gated, "fused": fused}[one_of(draw, ("plain", "gated", "fused"))]
    hidden = write(draw, block, source, arrangement)
    down = project(draw, block, hidden.value, arrangement, block.sizes.hidden, block.sizes.width, "down")
    block.expected = expected_of(block, hidden, down)
    return restored(block, down.value, arrangement)


def expected_of(block: Block, hidden: Hidden, down: Projection) -> Expected:
    biases = {layer.bias for layer in (*hidden.projections, down)} - {None}
    return Expected(
        projections=frozenset(layer.weight for layer in hidden.projections),
        down=down.weight,
        sizes=block.sizes,
        fusions=hidden.fusions,
        gate=hidden.gate,
        activation=hidden.activation,
        added=frozenset(str(bias) for bias in biases) | hidden.parameters,
    )


def arranged(block: Block, x: str, arrangement: str) -> str:
    expressions = {
        "flat": f"{x}.reshape(-1, {block.sizes.width})",
        "sequence first": f"{x}.transpose(0, 1)",
        "channels first": f"{x}.transpose(1, 2)",
    }
    return block.let(expressions[arrangement]) if arrangement in expressions else x


def restored(block: Block, y: str, arrangement: str) -> str:
    sizes = block.sizes
    expressions = {
        "flat": f"{y}.view({sizes.batch}, {sizes.tokens}, {sizes.width})",
        "sequence first": f"{y}.transpose(0, 1)",
        "channels first": f"{y}.transpose(1, 2)",
    }
    return block.let(expressions[arrangement]) if arrangement in expressions else y


def leading(block: Block, arrangement: str) -> str:
    batch, tokens = block.sizes.batch, block.sizes.tokens
    return {"flat": f"{batch * tokens}", "sequence first": f"{tokens}, {batch}"}.get(arrangement, f"{batch}, {tokens}")


def project(draw: Draw, block: Block, x: str, arrangement: str, d_in: int, d_out: int, kind: str) -> Projection:
    """A linear layer in one of the spellings that the arrangement allows."""
    biased = draw(st.booleans())
    if arrangement == "channels first":
        return _channel_layer(draw, block, x, d_in, d_out, kind, biased)
    spelling = one_of(draw, ("module", "module", "functional", "matmul", "transposed", "einsum", "addmm"))
    if spelling == "module":
        layer = block.member(kind, f"nn.Linear({d_in}, {d_out}, bias={biased})")
        return Projection(
            block.let(f"{layer}({x})"), f"{name_of(layer)}.weight", f"{name_of(layer)}.bias" if biased else None
        )
    in_out = spelling in ("matmul", "einsum", "addmm")
    weight = block.weight(kind, *((d_in, d_out) if in_out else (d_out, d_in)))
    bias = block.weight(f"{kind}_bias", d_out) if biased else None
    if spelling == "functional":
        value = f"F.linear({x}, {weight}, {bias})"
    elif spelling == "addmm":
        product = f"torch.addmm({bias}, {{}}, {weight})" if bias else f"torch.mm({{}}, {weight})"
        flat = arrangement == "flat"
        value = product.format(x if flat else f"{x}.reshape(-1, {d_in})")
        value = value if flat else f"{value}.view({leading(block, arrangement)}, {d_out})"
    else:
        products = {
            "matmul": f"{x} @ {weight}",
            "transposed": f"torch.matmul({x}, {weight}.t())",
            "einsum": f"torch.einsum('...i,io->...o', {x}, {weight})",
        }
        value = products[spelling] + (f" + {bias}" if bias else "")
    return Projection(block.let(value), name_of(weight), name_of(bias) if bias else None)


def _channel_layer(draw: Draw, block: Block, x: str, d_in: int, d_out: int, kind: str, biased: bool) -> Projection:
    spelling = one_of(draw, ("module", "functional", "left matmul"))
    if spelling == "module":
        layer = block.member(kind, f"nn.Conv1d({d_in}, {d_out}, 1, bias={biased})")
        return Projection(
            block.let(f"{layer}({x})"), f"{name_of(layer)}.weight", f"{name_of(layer)}.bias" if biased else None
        )
    if spelling == "left matmul":
        weight = block.weight(kind, d_out, d_in)
        return Projection(block.let(f"{weight} @ {x}"), name_of(weight), None)
    weight = block.weight(kind, d_out, d_in, 1)
    bias = block.weight(f"{kind}_bias", d_out) if biased else None
    return Projection(block.let(f"F.conv1d({x}, {weight}, {bias})"), name_of(weight), name_of(bias) if bias else None)


def chain(draw: Draw, block: Block, h: str, arrangement: str, steps: tuple[str, ...]) -> Chain:
    """Applies element-wise steps, each a statement, with the parameters they ask for."""
    parameters: list[str] = []
    shapes = [(block.sizes.hidden, 1)] if arrangement == "channels first" else [(block.sizes.hidden,)]
    for step in steps:
        text = (BENDING | STRAIGHT | LAYOUTS)[step]
        wanted = {"h": h, "F": str(block.sizes.hidden)}
        if "{scale}" in text:
            wanted["scale"] = block.parameter("scale", *draw(st.sampled_from(shapes)))
            parameters.append(name_of(wanted["scale"]))
        if "{scalar}" in text:
            wanted["scalar"] = block.parameter("scalar", *draw(st.sampled_from([(), (1,)])))
        for kind, module in MODULES.items():
            if f"{{{kind}}}" in text:
                wanted[kind] = block.member(kind, module)
        h = block.let(text.format(**wanted))
    return Chain(steps, h, frozenset(parameters))


def draw_steps(draw: Draw, arrangement: str, *, bending: bool | None = None, most: int = 3) -> tuple[str, ...]:
    """Names of steps; with `bending` true at least one is not affine, with false none is."""
    layouts = [] if arrangement in ("flat", "channels first") else sorted(LAYOUTS)
    straight = sorted(STRAIGHT) + layouts
    allowed = straight if bending is False else straight + sorted(BENDING)
    steps = draw(st.lists(st.sampled_from(allowed), max_size=most))
    if bending and not any(step in BENDING for step in steps):
        steps.insert(draw(st.integers(0, len(steps))), one_of(draw, BENDING))
    return tuple(steps)


def plain(draw: Draw, block: Block, x: str, arrangement: str) -> Hidden:
    up = project(draw, block, x, arrangement, block.sizes.width, block.sizes.hidden, "up")
    region = chain(draw, block, up.value, arrangement, draw_steps(draw, arrangement, bending=True))
    return Hidden(
        region.value,
        (up,),
        frozenset((Fusion.SEPARATE,)),
        activation=region.activation,
        parameters=region.parameters,
    )


def gated(draw: Draw, block: Block, x: str, arrangement: str) -> Hidden:
    """Two layers; which of them is written first varies."""
    kinds = draw(st.permutations(("gate", "up")))
    layers = {kind: project(draw, block, x, arrangement, block.sizes.width, block.sizes.hidden, kind) for kind in kinds}
    hidden = _joined(draw, block, layers["gate"].value, layers["up"].value, arrangement)
    gate = layers["gate"].weight if hidden.gate else None
    return replace(hidden, projections=tuple(layers.values()), fusions=frozenset((Fusion.SEPARATE,)), gate=gate)


def fused(draw: Draw, block: Block, x: str, arrangement: str) -> Hidden:
    """One layer of width 2F, in halves or interleaved, gate first or second."""
    both = project(draw, block, x, arrangement, block.sizes.width, 2 * block.sizes.hidden, "both")
    before = draw(st.sampled_from(((), ("half",), ("dropout",), ("clamp",))))
    value = chain(draw, block, both.value, "flat", before).value
    interleaved = arrangement != "channels first" and draw(st.booleans())
    ways = CHANNELS if arrangement == "channels first" else INTERLEAVED if interleaved else HALVES
    gate_first = draw(st.booleans())
    texts = ways[one_of(draw, ways)]
    first, second = (
        block.let(text.format(v=value, F=block.sizes.hidden, lead=leading(block, arrangement))) for text in texts
    )
    hidden = _joined(draw, block, *((first, second) if gate_first else (second, first)), arrangement)
    orders = _INTERLEAVED_ORDERS if interleaved else _HALVES_ORDERS
    known = value == both.value and hidden.gate is not None
    fusions = frozenset((orders[0 if gate_first else 1],)) if known else frozenset(orders)
    plain_split = value == both.value
    return replace(
        hidden,
        projections=(both,),
        fusions=fusions,
        gate=both.weight,
        activation=hidden.activation if plain_split else None,
    )


_HALVES_ORDERS = (Fusion.GATE_THEN_UP, Fusion.UP_THEN_GATE)
_INTERLEAVED_ORDERS = (Fusion.INTERLEAVED_GATE_FIRST, Fusion.INTERLEAVED_UP_FIRST)


def _joined(draw: Draw, block: Block, gate: str, up: str, arrangement: str) -> Hidden:
    """act(gate) * up, or another function of two operands; chains on each operand and on the result.

    `gate` of the result says whether the construction fixes which operand a search must call the gate.
    """
    join = draw(st.sampled_from(PRODUCTS + JOINS))
    gate_chain = chain(draw, block, gate, arrangement, draw_steps(draw, arrangement, most=2))
    up_chain = chain(draw, block, up, arrangement, draw_steps(draw, arrangement, most=1))
    value = block.let(join.format(gate=gate_chain.value, up=up_chain.value))
    after = chain(draw, block, value, arrangement, draw_steps(draw, arrangement, most=1))
    fixed = join in PRODUCTS and gate_chain.bends and not up_chain.bends and not after.bends
    bare = fixed and not up_chain.steps and not after.steps
    return Hidden(
        after.value,
        (),
        frozenset(),
        gate="gate" if fixed else None,
        activation=gate_chain.activation if bare else None,
        parameters=gate_chain.parameters | up_chain.parameters | after.parameters,
    )
