"""The table of refusals (docs/capture.md): one near miss per reason, and the words in which each is refused.

Every model also holds an FFN that is one, `mlp`: refusing its neighbour must not lose it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte_compile.capture.capture import Call, capture_by_dynamo, capture_by_export
from lte_compile.inspection.sites import Inspection, inspect
from lte_compile.passes.match import find_ffns
from lte_compile.transform import transform
from tests.passes.generated_decoys import SPOILERS, STRUCTURES

D, H, T, HEADS = 16, 48, 5, 4  # model width, neurons, tokens, heads


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.relu(self.up(x)))
        return y


class Model(nn.Module):
    """`mlp`, and beside it whatever a near miss is made of; `compute` says how it is put together."""

    def __init__(self, compute: Callable[[Model, Tensor], Tensor | tuple[Tensor, ...]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp = Mlp()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.up, self.gate, self.down = nn.Linear(D, H), nn.Linear(D, H, bias=False), nn.Linear(H, D)
        self.narrow, self.widen = nn.Linear(D, 4, bias=False), nn.Linear(4, D, bias=False)
        self.table, self.head = nn.Embedding(31, D), nn.Linear(D, 31, bias=False)
        self.pooler, self.classifier = nn.Linear(D, D), nn.Linear(D, 3)
        self.norm, self.norm_hidden = nn.LayerNorm(D), nn.LayerNorm(H)
        self.conv = nn.Conv1d(H, H, 3, padding=1, groups=H)
        self.scale = nn.Parameter(torch.rand(H))
        self.positions = nn.Parameter(torch.rand(T, H))
        self.register_buffer("frozen", torch.randn(D, H))
        self.register_buffer("frozen_scale", torch.rand(H))
        self.compute = compute

    frozen: Tensor
    frozen_scale: Tensor

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.compute(self, x + self.mlp(x))


def attention(m: Model, x: Tensor) -> Tensor:
    q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (m.q, m.k, m.v))
    mixed = F.scaled_dot_product_attention(q, k, v)
    y: Tensor = m.o(mixed.transpose(1, 2).flatten(2))
    return y


def written_out_attention(m: Model, x: Tensor) -> Tensor:
    scores = m.q(x) @ m.k(x).transpose(1, 2) / D**0.5
    y: Tensor = m.o(scores.softmax(-1) @ m.v(x))
    return y


def hidden(m: Model, x: Tensor) -> Tensor:
    h: Tensor = F.silu(m.gate(x)) * m.up(x)
    return h


# name: (what is computed, the layer that is refused, the reason)
REFUSALS: dict[str, tuple[Callable[[Model, Tensor], Tensor | tuple[Tensor, ...]], str, str]] = {
    "attention output": (attention, "o.weight", "attention output projection: .*which mixes tokens"),
    "attention output, written out": (written_out_attention, "o.weight", "attention output projection: .*mixes tokens"),
    "query, key and value": (attention, "k.weight", r"attention input projection \(query, key or value\)"),
    "language-model head": (
        lambda m, x: m.head(m.norm(x)),
        "head.weight",
        "language-model head or classifier: its output width 31 differs from the model width 16",
    ),
    "pooler": (
        lambda m, x: torch.tanh(m.pooler(x[:, 0])),
        "pooler.weight",
        "pooler or head: it reads tokens picked by",
    ),
    "classifier": (
        lambda m, x: m.classifier(torch.tanh(m.pooler(x[:, 0]))),
        "classifier.weight",
        "classifier: its output width 3 differs",
    ),
    "adapter": (
        lambda m, x: x + m.widen(F.gelu(m.narrow(x))),
        "widen.weight",
        "low-rank pair or adapter: its hidden width 4 is narrower than the model width 16",
    ),
    "low-rank update on attention": (
        lambda m, x: m.o(F.scaled_dot_product_attention(m.q(x) + m.widen(m.narrow(x)), m.k(x), m.v(x))),
        "widen.weight",
        "low-rank (pair|update)",
    ),
    "hidden narrower than the model": (
        lambda m, x: m.widen(F.relu(m.narrow(x))),
        "widen.weight",
        "hidden width 4 is narrower than the model width 16",
    ),
    "hidden as wide as the model": (
        lambda m, x: m.v(F.relu(m.q(x))),
        "v.weight",
        "hidden width 16 does not exceed the model width 16",
    ),
    "no activation": (lambda m, x: m.down(0.5 * m.up(x)), "down.weight", "no activation between"),
    "normalised hidden value": (
        lambda m, x: m.down(m.norm_hidden(hidden(m, x))),
        "down.weight",
        "passes `layer_?norm`, which is not element-wise",
    ),
    "root mean square over neurons": (
        lambda m, x: (lambda h: m.down(h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)))(hidden(m, x)),
        "down.weight",
        "hidden units interact: .* which is computed from all of them",
    ),
    "softmax over neurons": (
        lambda m, x: m.down(m.up(x).softmax(-1)),
        "down.weight",
        "passes `softmax`, which is not element-wise",
    ),
    "largest neurons only": (
        lambda m, x: (lambda h: m.down(h * (h >= h.topk(4, -1)[0][..., -1:])))(hidden(m, x)),
        "down.weight",
        "hidden units interact",
    ),
    "neurons in another order": (
        lambda m, x: m.down(hidden(m, x).view(-1, T, 6, 8).transpose(2, 3).flatten(2)),
        "down.weight",
        "splits or merges the hidden axis",
    ),
    "tokens convolved": (
        lambda m, x: m.down(F.gelu(m.conv(m.up(x).transpose(1, 2))).transpose(1, 2)),
        "down.weight",
        "passes `(conv1d|convolution)`, which is not element-wise",
    ),
    "tokens summed up": (
        lambda m, x: m.down(hidden(m, x).cumsum(1)),
        "down.weight",
        "passes `cumsum`, which is not element-wise",
    ),
    "tokens in another order": (
        lambda m, x: m.down(hidden(m, x).transpose(0, 1).reshape(2, T, H)),
        "down.weight",
        "the tokens are reordered",
    ),
    "hidden value returned": (
        lambda m, x: (lambda h: (m.down(h), h))(hidden(m, x)),
        "down.weight",
        "its hidden value `.*` has another user",
    ),
    "hidden value read elsewhere": (
        lambda m, x: (lambda h: m.down(h) * h.mean(-1, keepdim=True).sigmoid())(hidden(m, x)),
        "down.weight",
        "its hidden value `.*` has another user",
    ),
    "two producers, two inputs": (
        lambda m, x: m.down(F.silu(m.gate(m.norm(x))) * m.up(x)),
        "down.weight",
        "read different tensors: `.*` reads `.*` and `.*` reads",
    ),
    "something else flows in": (
        lambda m, x: m.down(hidden(m, torch.sin(x)) * x.mean(-1, keepdim=True)),
        "down.weight",
        "also depends on `.*`, which does not come from the FFN's input",
    ),
    "three producers": (
        lambda m, x: m.down(hidden(m, x) * (x @ m.frozen)),
        "down.weight",
        r"`frozen` is a buffer or constant, not a parameter|projections of widths \[48, 48, 48\]",
    ),
    "weight is a buffer": (
        lambda m, x: F.linear(hidden(m, x), m.frozen),
        "frozen",
        "`frozen` is a buffer or constant, not a parameter",
    ),
    "weight is computed": (
        lambda m, x: F.linear(hidden(m, x), m.down.weight * m.scale),
        "gate.weight",
        "its weight is not a parameter but computed in the graph",
    ),
    "per-neuron buffer": (
        lambda m, x: m.down(hidden(m, x) * m.frozen_scale),
        "down.weight",
        "the per-neuron constant `.*` is not a parameter with one value per neuron",
    ),
    "per-neuron and per-token parameter": (
        lambda m, x: m.down(hidden(m, x) * m.positions),
        "down.weight",
        "the per-neuron constant `.*` is not a parameter with one value per neuron",
    ),
    "weight with another reader": (
        lambda m, x: m.down(hidden(m, x)) + m.up.weight.mean(0),
        "down.weight",
        "`up.weight` is also used by `.*`: reordering its neurons would change that",
    ),
    "per-neuron scale with another reader": (
        lambda m, x: m.down(hidden(m, x) * m.scale) * m.scale[0],
        "down.weight",
        "`scale` is also used by",
    ),
}


def reasons_of(found: Inspection, layer: str) -> list[str]:
    names = {r.parameter: r.reason for r in found.rejections}
    return [reason for name, reason in names.items() if name == layer or (name or "").startswith(f"{layer}.")]


@pytest.mark.parametrize("route", ["export", "dynamo"])
@pytest.mark.parametrize("name", REFUSALS)
def test_refused_with_its_reason(name: str, route: str) -> None:
    compute, layer, reason = REFUSALS[name]
    call = Call((torch.randn(2, T, D),), {})
    model = Model(compute)
    (graph,) = (capture_by_export(model, call),) if route == "export" else capture_by_dynamo(model, call)
    found = find_ffns(graph)
    assert [site.down for site in found.sites] == ["mlp.down.weight"]
    given = {r.parameter: r.reason for r in found.rejections}
    assert layer in given
    assert re.search(reason, given[layer]), given[layer]


def test_a_product_with_data_is_no_layer() -> None:
    """Neither matrix is a parameter: there is nothing to refuse, and nothing is found."""
    model = Model(lambda m, x: F.gelu(x @ x.transpose(1, 2)) @ x)
    found = inspect(model, torch.randn(2, T, D))
    assert [site.down for site in found.sites] == ["mlp.down.weight"]
    assert found.rejections == ()


class Branching(nn.Module):
    """FFNs before, inside and after a branch that depends on data; `decide` is what the branch looks like."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.taken, self.other, self.after = (Mlp() for _ in range(4))


class Jump(Branching):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.before(x)
        if x.sum() > 0:
            x = x + self.taken(x)
            x = torch.sin(x)
        else:
            x = x - self.other(x)
        y: Tensor = x + self.after(x)
        return y


class Conditional(Branching):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.before(x)
        x = (
            self.taken(x)
            if x.sum() > 0
            else self.other(x)
        )  # fmt: skip
        y: Tensor = x + self.after(x)
        return y


class ByNumber(Branching):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.before(x)
        total = x.sum().item()
        x = x + self.after(x)
        if total > 0:
            return torch.add(x, self.taken(x))
        return torch.sub(x, self.other(x))


class Loop(Branching):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.before(x)
        while x.abs().max() < 100:
            x = 10 * x + self.taken(x)
        y: Tensor = x + self.after(x)
        return y


class EarlyReturn(Branching):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.before(x)
        if x.sum() < -1e6:
            return torch.sub(x, self.other(x))
        y: Tensor = x + self.after(x)
        return y


@pytest.mark.parametrize("kind", [Jump, Conditional, ByNumber, Loop, EarlyReturn])
def test_data_dependent_branches_neither_lose_nor_invent_sites(kind: type[Branching]) -> None:
    x = torch.ones(2, T, D)
    model = kind()
    found = inspect(model, x)
    assert {site.down for site in found.sites} == {"before.down.weight", "after.down.weight"}
    for reason in reasons_of(found, "taken"):
        assert re.search(r"data-dependent control flow: `.*` \(test_refusals.py:\d+\) decides|not reached", reason)
    assert len(reasons_of(found, "other")) == 2
    assert all(re.search("not reached while tracing: it lies in a branch", r) for r in reasons_of(found, "other"))

    expected = model(x)
    torch.testing.assert_close(transform(model, example_inputs=x)(x), expected)


def test_an_ffn_on_both_sides_of_a_branch_is_refused() -> None:
    """Its weights run outside as well, so that rewriting it there would change it in the branch."""

    class Shared(Branching):
        def forward(self, x: Tensor) -> Tensor:
            x = x + self.before(x)
            if x.sum() > 0:
                x = x + self.before(x)
            y: Tensor = x + self.after(x)
            return y

    found = inspect(Shared(), torch.ones(2, T, D))
    assert [site.down for site in found.sites] == ["after.down.weight"]
    assert any("another graph of the model" in reason for reason in reasons_of(found, "before"))


def test_branches_of_torch_cond_are_named() -> None:
    class Cond(Branching):
        def forward(self, x: Tensor) -> Tensor:
            x = x + self.before(x)
            x = torch.cond(x.sum() > 0, lambda x: x + self.taken(x), lambda x: x - self.other(x), (x,))
            y: Tensor = x + self.after(x)
            return y

    found = inspect(Cond(), torch.ones(2, T, D))
    assert {site.down for site in found.sites} == {"before.down.weight", "after.down.weight"}
    for layer in ("taken", "other"):
        assert len(reasons_of(found, layer)) == 2
        assert all(re.search("read inside a branch of `cond`", reason) for reason in reasons_of(found, layer))


def test_the_generator_knows_every_decoy_by_a_name() -> None:
    assert not set(SPOILERS) & set(STRUCTURES)
    assert len(SPOILERS) + len(STRUCTURES) >= 50
