"""Writing what only looks like an FFN: every block here must be refused, whatever else it is made of."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st

from tests.passes.generated import Block
from tests.passes.generated_ffns import (
    BENDING,
    Draw,
    Hidden,
    Projection,
    chain,
    draw_steps,
    gated,
    one_of,
    plain,
    project,
)

# What is done to the hidden value [B, T, F] of an FFN otherwise true. {x} is its input, {z} another tensor.
SPOILERS = {
    # neurons read one another
    "softmax": "{h}.softmax(-1)",
    "log softmax": "F.log_softmax({h}, dim=-1)",
    "layer norm": "F.layer_norm({h}, ({F},))",
    "rms norm": "{h} * torch.rsqrt({h}.pow(2).mean(-1, keepdim=True) + 1e-6)",
    "rms norm function": "F.rms_norm({h}, ({F},))",
    "normalised": "F.normalize({h}, dim=-1)",
    "group norm": "F.group_norm({h}.transpose(1, 2), 2).transpose(1, 2)",
    "response norm": "{h} + {h} * ({h}.norm(dim=1, keepdim=True) / (1 + {h}.norm(dim=1, keepdim=True).mean(-1, True)))",
    "centred": "{h} - {h}.mean(-1, keepdim=True)",
    "over maximum": "{h} / (1.0 + {h}.amax(-1, keepdim=True).abs())",
    "top two": "{h} * ({h} >= {h}.topk(2, -1).values[..., -1:])",
    "gated by its sum": "{h} * torch.sigmoid({h}.sum(-1, keepdim=True))",
    "cumulative": "{h}.cumsum(-1)",
    "sorted": "{h}.sort(-1).values",
    "added neighbour": "{h} + F.pad({h}[..., 1:], (0, 1))",
    "mixed by a matrix": "{h} @ {mixer}",
    "mixed by a constant": "{h} @ {constant}",
    "pairs swapped": "{h}.view({B}, {T}, {F} // 2, 2).flip(-1).reshape({B}, {T}, {F})",
    # neurons change places
    "flipped": "{h}.flip(-1)",
    "rolled": "{h}.roll(1, -1)",
    "rotated": "torch.cat([{h}[..., 1:], {h}[..., :1]], -1)",
    "halves swapped": "torch.cat([{h}[..., {F} // 2 :], {h}[..., : {F} // 2]], -1)",
    "heads mixed": "{h}.view({B}, {T}, 4, {F} // 4).transpose(2, 3).reshape({B}, {T}, {F})",
    "heads over tokens": "{h}.view({B}, {T}, 2, {F} // 2).transpose(1, 2).reshape({B}, {T}, {F})",
    "axes reshaped": "{h}.reshape({B}, {F}, {T}).transpose(1, 2)",
    "axes read wrongly": "{h}.transpose(1, 2).reshape({B}, {T}, {F})",
    "indexed": "{h}[..., {order}]",
    "selected": "{h}.index_select(-1, {order})",
    # tokens read one another or change places
    "tokens cumulative": "{h}.cumsum(1)",
    "tokens rolled": "{h}.roll(1, 1)",
    "tokens flipped": "{h}.flip(1)",
    "tokens centred": "{h} - {h}.mean(1, keepdim=True)",
    "tokens softmax": "{h}.softmax(1)",
    "tokens shifted": "F.pad({h}, (0, 0, 1, 0))[:, :-1]",
    "tokens convolved": "F.conv1d({h}.transpose(1, 2), {kernel}, padding=1, groups={F}).transpose(1, 2)",
    "tokens averaged": "F.avg_pool1d({h}.transpose(1, 2), 3, 1, 1).transpose(1, 2)",
    "first token": "{h} + {h}[:, :1]",
    "batch centred": "{h} - {h}.mean(0)",
    "tokens regrouped": "{h}.transpose(0, 1).reshape({B}, {T}, {F})",
    "token pairs": "({h}.unsqueeze(1) * {h}.unsqueeze(2)).mean(1)",
    "attended": "({z} @ {z}.transpose(1, 2)).softmax(-1) @ {h}",
    # something else flows in
    "scaled from outside": "{h} * {z}.mean(-1, keepdim=True)",
    "masked from outside": "torch.where({z}[..., :1] > 0, {h}, 0.0)",
    "per position": "{h} * {table}",
    "buffer": "{h} * {buffer}",
    "constant per neuron from all": "{h} * ({scale} / {scale}.norm())",
}


def decoy(draw: Draw, block: Block, x: str, z: str) -> str:
    """Writes a decoy on `x` [B, T, D] into `block` and returns its output of the same shape."""
    kind = one_of(draw, [*SPOILERS, *STRUCTURES])
    block.kind = kind
    if kind in STRUCTURES:
        return STRUCTURES[kind](draw, block, x, z)
    hidden = true_hidden(draw, block, x)
    return project_down(draw, block, spoil(block, kind, hidden.value, x, z))


def true_hidden(draw: Draw, block: Block, x: str) -> Hidden:
    return one_of_writers(draw)(draw, block, x, "batched")


def one_of_writers(draw: Draw) -> Callable[[Draw, Block, str, str], Hidden]:
    return plain if draw(st.booleans()) else gated


def project_down(draw: Draw, block: Block, h: str) -> str:
    return project(draw, block, h, "batched", block.sizes.hidden, block.sizes.width, "down").value


def project_up(draw: Draw, block: Block, x: str) -> Projection:
    return project(draw, block, x, "batched", block.sizes.width, block.sizes.hidden, "up")


def spoil(block: Block, kind: str, h: str, x: str, z: str) -> str:
    text, sizes = SPOILERS[kind], block.sizes
    members = {
        "mixer": f"nn.Parameter(torch.randn({sizes.hidden}, {sizes.hidden}))",
        "constant": f"nn.Buffer(torch.randn({sizes.hidden}, {sizes.hidden}))",
        "order": f"nn.Buffer(torch.arange({sizes.hidden}).roll(3))",
        "kernel": f"nn.Parameter(torch.randn({sizes.hidden}, 1, 3))",
        "table": f"nn.Parameter(torch.rand({sizes.tokens}, {sizes.hidden}))",
        "buffer": f"nn.Buffer(torch.rand({sizes.hidden}))",
        "scale": f"nn.Parameter(torch.rand({sizes.hidden}))",
    }
    wanted = {name: block.member(name, made) for name, made in members.items() if f"{{{name}}}" in text}
    letters = {"B": sizes.batch, "T": sizes.tokens, "F": sizes.hidden}
    return block.let(text.format(h=h, x=x, z=z, **letters, **wanted))


def _escapes(draw: Draw, block: Block, x: str, z: str) -> str:
    """The hidden value is read by something beside the down-projection."""
    hidden = true_hidden(draw, block, x)
    y = project_down(draw, block, hidden.value)
    uses = ("{y} + {h}.mean(-1, keepdim=True)", "{y} * torch.sigmoid({h}[..., :1])", "{y} + {h}.amax()")
    return block.let(draw(st.sampled_from(uses)).format(y=y, h=hidden.value))


def _escapes_before_the_activation(draw: Draw, block: Block, x: str, z: str) -> str:
    up = project_up(draw, block, x)
    h = chain(draw, block, up.value, "batched", draw_steps(draw, "batched", bending=True)).value
    return block.let(f"{project_down(draw, block, h)} + {up.value}.mean(-1, keepdim=True)")


def _two_downs(draw: Draw, block: Block, x: str, z: str) -> str:
    hidden = true_hidden(draw, block, x).value
    return block.let(f"{project_down(draw, block, hidden)} + {project_down(draw, block, hidden)}")


def _different_inputs(draw: Draw, block: Block, x: str, z: str) -> str:
    other = block.let(draw(st.sampled_from((z, f"torch.tanh({x})", f"F.layer_norm({x}, ({block.sizes.width},))"))))
    up, gate = project_up(draw, block, x), project_up(draw, block, other)
    bend = chain(draw, block, gate.value, "batched", (one_of(draw, BENDING),)).value
    return project_down(draw, block, block.let(f"{up.value} * {bend}"))


def _narrow(draw: Draw, block: Block, x: str, z: str) -> str:
    """An adapter, or a square layer behind a square layer."""
    width = block.sizes.width
    inner = draw(st.sampled_from((2, width - 1, width)))
    up = project(draw, block, x, "batched", width, inner, "up")
    h = block.let(f"F.gelu({up.value})")
    return project(draw, block, h, "batched", inner, width, "down").value


def _another_width(draw: Draw, block: Block, x: str, z: str) -> str:
    width = block.sizes.width
    h = true_hidden(draw, block, x).value
    more = draw(st.sampled_from((1, 3)))
    y = project(draw, block, h, "batched", block.sizes.hidden, width + more, "down").value
    return block.let(f"{y}[..., :{width}]")


def _computed_weight(draw: Draw, block: Block, x: str, z: str) -> str:
    sizes = block.sizes
    w = block.weight("computed", sizes.width, sizes.hidden)
    left = block.weight("left", sizes.width, sizes.width)
    mask = block.member("mask", f"nn.Buffer((torch.rand({sizes.width}, {sizes.hidden}) > 0.5).float())")
    texts = (f"{w} * 0.5", f"{w} * {mask}", f"{w} / {w}.norm(dim=0)", f"{left} @ {w}", f"{w}.flip(0)", f"{w}.round()")
    h = true_hidden(draw, block, x).value
    return block.let(f"F.linear({h}, {draw(st.sampled_from(texts))})")


def _buffer_weight(draw: Draw, block: Block, x: str, z: str) -> str:
    sizes = block.sizes
    h = true_hidden(draw, block, x).value
    shape = f"{sizes.width}, {sizes.hidden}"
    held = draw(
        st.sampled_from((f"nn.Buffer(torch.randn({shape}))", f"0.1 * torch.ones({shape}, dtype=torch.float64)"))
    )
    return block.let(f"F.linear({h}, {block.member('held', held)})")


def _weight_used_elsewhere(draw: Draw, block: Block, x: str, z: str) -> str:
    sizes = block.sizes
    up, down = block.weight("up", sizes.hidden, sizes.width), block.weight("down", sizes.width, sizes.hidden)
    h = chain(draw, block, block.let(f"F.linear({x}, {up})"), "batched", draw_steps(draw, "batched", bending=True))
    uses = (f"F.linear({z}, {up}).mean(-1, keepdim=True)", f"{up}.mean(0)", f"{down}[:, 0]", f"{z} @ {down}[:, :1]")
    return block.let(f"F.linear({h.value}, {down}) + {draw(st.sampled_from(uses))}")


def _no_activation(draw: Draw, block: Block, x: str, z: str) -> str:
    up = project_up(draw, block, x)
    steps = draw_steps(draw, "batched", bending=False)
    h = chain(draw, block, up.value, "batched", steps).value
    if draw(st.booleans()):
        h = block.let(f"{h} - {project_up(draw, block, x).value}")
    return project_down(draw, block, h)


def _attention(draw: Draw, block: Block, x: str, z: str) -> str:
    q, k, v = (project_up(draw, block, x).value for _ in range(3))
    way = draw(st.booleans())
    scores = f"({q} @ {k}.transpose(1, 2)).softmax(-1) @ {v}"
    mixed = block.let(scores if way else f"F.scaled_dot_product_attention({q}, {k}, {v})")
    return project_down(draw, block, mixed)


def _linear_attention(draw: Draw, block: Block, x: str, z: str) -> str:
    q, k, v = (project_up(draw, block, x).value for _ in range(3))
    return project_down(draw, block, block.let(f"F.relu({q}) @ (F.relu({k}).transpose(1, 2) @ {v})"))


def _three_projections(draw: Draw, block: Block, x: str, z: str) -> str:
    a, b, c = (project_up(draw, block, x).value for _ in range(3))
    join = draw(st.sampled_from((f"{a} * {b} * {c}", f"F.relu({a}) * {b} + {c}", f"torch.where({a} > 0, {b}, {c})")))
    return project_down(draw, block, block.let(join))


def _not_a_parameter(draw: Draw, block: Block, x: str, z: str) -> str:
    """Fast weights: one of the matrices is computed from data."""
    sizes = block.sizes
    if draw(st.booleans()):
        return block.let(f"F.gelu({x} @ {z}.transpose(1, 2)) @ {z}")
    h = true_hidden(draw, block, x).value
    made = block.let(f"{block.weight('fast', sizes.hidden, sizes.tokens)} @ {z}")  # [B, F, D]
    return block.let(f"{h} @ {made}")


def _half_turned_round(draw: Draw, block: Block, x: str, z: str) -> str:
    """A fused projection whose second half meets the first in another order."""
    sizes = block.sizes
    both = project(draw, block, x, "batched", sizes.width, 2 * sizes.hidden, "both").value
    first, second = f"{both}[..., :{sizes.hidden}]", f"{both}[..., {sizes.hidden}:]"
    turned = draw(st.sampled_from((f"{second}.flip(-1)", f"{second}.roll(1, -1)", f"{second}.sort(-1)[0]")))
    return project_down(draw, block, block.let(f"F.silu({first}) * {turned}"))


STRUCTURES: dict[str, Callable[[Draw, Block, str, str], str]] = {
    "escape": _escapes,
    "escape before the activation": _escapes_before_the_activation,
    "two down-projections": _two_downs,
    "different inputs": _different_inputs,
    "narrow": _narrow,
    "another width": _another_width,
    "computed weight": _computed_weight,
    "buffer weight": _buffer_weight,
    "weight used elsewhere": _weight_used_elsewhere,
    "no activation": _no_activation,
    "attention": _attention,
    "linear attention": _linear_attention,
    "three projections": _three_projections,
    "not a parameter": _not_a_parameter,
    "half turned round": _half_turned_round,
}
