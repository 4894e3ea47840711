"""The matcher on hand-written modules: spellings that are FFNs, and near misses with the reason each is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor, nn

from lte_compile.capture.capture import Call, capture, capture_by_dynamo, capture_by_export
from lte_compile.passes.ir import CapturedGraph, FfnSite, Fusion, WeightLayout
from lte_compile.passes.match import FfnSearch, find_ffns

D, H, T = 16, 48, 5  # H neurons; T tokens


class Ffn(nn.Module):
    """Holds whatever an FFN may need; `compute` says what it does with it."""

    def __init__(self, compute: Callable[[Ffn, Tensor], Tensor | tuple[Tensor, ...]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.gate, self.down = nn.Linear(D, H), nn.Linear(D, H, bias=False), nn.Linear(H, D)
        self.both = nn.Linear(D, 2 * H)
        self.narrow, self.widen = nn.Linear(D, 4), nn.Linear(4, D)
        self.even, self.back = nn.Linear(D, D), nn.Linear(D, D)
        self.head = nn.Linear(H, 7)
        self.norm, self.norm_hidden = nn.LayerNorm(D), nn.LayerNorm(H)
        self.scale = nn.Parameter(torch.randn(H))
        self.w_up, self.w_down = nn.Parameter(torch.randn(D, H)), nn.Parameter(torch.randn(H, D))
        self.experts = nn.Parameter(torch.randn(2, D, H))
        self.conv_up, self.conv_down = nn.Conv1d(D, H, 1), nn.Conv1d(H, D, 1)
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.compute(self, x)


def example() -> Tensor:
    return torch.randn(2, T, D, generator=torch.Generator().manual_seed(1))


def by_export(model: nn.Module) -> CapturedGraph:
    return capture_by_export(model, Call((example(),), {}))


def by_dynamo(model: nn.Module) -> CapturedGraph:
    (graph,) = capture_by_dynamo(model, Call((example(),), {}))
    return graph


def by_fx(model: nn.Module) -> CapturedGraph:
    return capture(fx.symbolic_trace(model), example())


TRACERS = [by_export, by_dynamo, by_fx]


def one_site(search: FfnSearch) -> FfnSite:
    assert len(search.sites) == 1, [r.reason for r in search.rejections]
    return search.sites[0]


def gelu_written_out(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))))


PLAIN: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "relu": (torch.relu, "relu"),
    "in-place relu": (lambda h: F.relu(h, inplace=True), "relu"),
    "method": (lambda h: h.sigmoid(), "sigmoid"),
    "gelu": (F.gelu, "gelu"),
    "gelu written out": (gelu_written_out, "gelu_tanh"),
    "erf": (lambda h: h * 0.5 * (1 + torch.erf(h / 2**0.5)), "gelu"),
    "swish": (lambda h: h * torch.sigmoid(h), "silu"),
    "quick gelu": (lambda h: h * torch.sigmoid(1.702 * h), "quick_gelu"),
    "squared": (lambda h: F.relu(h) ** 2, "relu_squared"),
    "dropout": (lambda h: F.dropout(F.relu(h), 0.1, training=True), "relu"),
    "cast": (lambda h: F.silu(h.to(torch.float64)).to(torch.float32), "silu"),
    "unfamiliar": (lambda h: torch.sin(h) + h, "unknown"),
    "clipped": (lambda h: h.clamp(0, 6), "unknown"),
}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("tracer", TRACERS)
def test_plain(name: str, tracer: Callable[[nn.Module], CapturedGraph]) -> None:
    activation, expected = PLAIN[name]
    site = one_site(find_ffns(tracer(Ffn(lambda m, x: m.down(activation(m.up(x)))))))
    assert (site.up, site.gate, site.down) == ("up.weight", None, "down.weight")
    assert (site.up_bias, site.down_bias) == ("up.bias", "down.bias")
    assert (site.width, site.hidden, site.activation, site.gated) == (D, H, expected, False)
    assert site.first_projection == "up.weight"


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("gate_first", [True, False])
def test_gated(tracer: Callable[[nn.Module], CapturedGraph], gate_first: bool) -> None:
    """Which projection is the gate is told by what it computes, not by the order of the operands."""

    def compute(m: Ffn, x: Tensor) -> Tensor:
        hidden = F.silu(m.gate(x)) * m.up(x) if gate_first else m.up(x) * F.silu(m.gate(x))
        y: Tensor = m.down(hidden)
        return y

    site = one_site(find_ffns(tracer(Ffn(compute))))
    assert (site.up, site.gate, site.gated, site.activation) == ("up.weight", "gate.weight", True, "silu")
    assert (site.up_bias, site.gate_bias) == ("up.bias", None)
    assert site.first_projection == ("gate.weight" if gate_first else "up.weight")


def test_gated_with_an_unknown_activation_still_knows_its_gate() -> None:
    site = one_site(find_ffns(by_export(Ffn(lambda m, x: m.down(m.up(x) * torch.sin(m.gate(x)))))))
    assert (site.up, site.gate, site.activation) == ("up.weight", "gate.weight", "unknown")


def halves(m: Ffn, x: Tensor) -> tuple[Tensor, Tensor]:
    first, second = m.both(x).chunk(2, dim=-1)
    return first, second


def sliced(m: Ffn, x: Tensor) -> tuple[Tensor, Tensor]:
    both = m.both(x)
    return both[..., :H], both[..., H:]


def split(m: Ffn, x: Tensor) -> tuple[Tensor, Tensor]:
    first, second = m.both(x).split([H, H], dim=-1)
    return first, second


def viewed(m: Ffn, x: Tensor) -> tuple[Tensor, Tensor]:
    first, second = m.both(x).view(2, T, 2, H).unbind(2)
    return first, second


def strided(m: Ffn, x: Tensor) -> tuple[Tensor, Tensor]:
    both = m.both(x)
    return both[..., ::2], both[..., 1::2]


def paired(m: Ffn, x: Tensor) -> tuple[Tensor, Tensor]:
    pairs = m.both(x).view(2, T, H, 2)
    return pairs[..., 0], pairs[..., 1]


@pytest.mark.parametrize(
    ("take", "gate_first", "up_first"),
    [(take, Fusion.GATE_THEN_UP, Fusion.UP_THEN_GATE) for take in (halves, sliced, split, viewed)]
    + [(take, Fusion.INTERLEAVED_GATE_FIRST, Fusion.INTERLEAVED_UP_FIRST) for take in (strided, paired)],
)
@pytest.mark.parametrize("tracer", [by_export, by_dynamo])
def test_fused(
    take: Callable[[Ffn, Tensor], tuple[Tensor, Tensor]],
    gate_first: Fusion,
    up_first: Fusion,
    tracer: Callable[[nn.Module], CapturedGraph],
) -> None:
    def first_gates(m: Ffn, x: Tensor) -> Tensor:
        first, second = take(m, x)
        y: Tensor = m.down(F.gelu(first) * second)
        return y

    def second_gates(m: Ffn, x: Tensor) -> Tensor:
        first, second = take(m, x)
        y: Tensor = m.down(F.gelu(second) * first)
        return y

    for compute, fusion in ((first_gates, gate_first), (second_gates, up_first)):
        site = one_site(find_ffns(tracer(Ffn(compute))))
        assert (site.up, site.gate, site.up_bias) == ("both.weight", "both.weight", "both.bias")
        assert (site.fusion, site.hidden, site.activation) == (fusion, H, "gelu")


SPELLINGS: dict[str, Callable[[Ffn, Tensor], Tensor]] = {
    "matmul": lambda m, x: F.relu(x @ m.w_up) @ m.w_down,
    "einsum": lambda m, x: torch.einsum("...h,hd->...d", F.relu(torch.einsum("btd,dh->bth", x, m.w_up)), m.w_down),
    "addmm": lambda m, x: torch.mm(F.relu(torch.mm(x.reshape(-1, D), m.w_up)), m.w_down).view(2, T, D),
}


@pytest.mark.parametrize("tracer", TRACERS)
def test_pointwise_convolutions(tracer: Callable[[nn.Module], CapturedGraph]) -> None:
    """Linear layers over axis 1: the same site, only that its layers say so."""
    search = find_ffns(tracer(Ffn(lambda m, x: m.conv_down(F.gelu(m.conv_up(x.transpose(1, 2)))).transpose(1, 2))))
    site = one_site(search)
    assert (site.up, site.down, site.up_bias) == ("conv_up.weight", "conv_down.weight", "conv_up.bias")
    assert (site.width, site.hidden, site.activation) == (D, H, "gelu")
    assert not any(linear.is_last_axis for linear in search.matches[0].linears)


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("tracer", TRACERS)
def test_raw_parameters(name: str, tracer: Callable[[nn.Module], CapturedGraph]) -> None:
    site = one_site(find_ffns(tracer(Ffn(SPELLINGS[name]))))
    assert (site.up, site.down) == ("w_up", "w_down")
    assert (site.up_layout, site.down_layout) == (WeightLayout.IN_OUT, WeightLayout.IN_OUT)
    assert (site.width, site.hidden, site.activation) == (D, H, "relu")


@pytest.mark.parametrize("tracer", TRACERS)
def test_dropout_that_is_off_is_its_input(tracer: Callable[[nn.Module], CapturedGraph]) -> None:
    """torch 2.14's export has later readers of x read the dropout instead, which returned x itself."""
    model = Ffn(lambda m, x: m.down(F.silu(m.gate(x)) * m.up(F.dropout(x, 0.1, False))))
    assert one_site(find_ffns(tracer(model))).gate == "gate.weight"
    model = Ffn(lambda m, x: m.down(F.silu(m.gate(x)) * m.up(F.dropout(x, 0.1, True))))
    search = find_ffns(tracer(model))
    assert not search.sites
    assert "read different tensors" in {r.parameter: r.reason for r in search.rejections}["down.weight"]


def test_a_separately_added_bias_belongs_to_its_projection() -> None:
    model = Ffn(lambda m, x: F.relu(x @ m.up.weight.T + m.up.bias) @ m.down.weight.T + m.down.bias)
    site = one_site(find_ffns(by_export(model)))
    assert (site.up_bias, site.down_bias, site.activation) == ("up.bias", "down.bias", "relu")
    assert (site.up_layout, site.hidden_parameters) == (WeightLayout.OUT_IN, ())


def test_per_neuron_parameters_are_listed() -> None:
    """They must be permuted along with the neurons; the activation then is no plain one."""
    site = one_site(find_ffns(by_export(Ffn(lambda m, x: m.down(F.relu(m.up(x)) * m.scale)))))
    assert site.hidden_parameters == ("scale",)
    assert site.activation == "unknown"


def test_transposed_tokens_are_followed() -> None:
    """Hidden units stay apart when the token axis moves around them."""
    model = Ffn(lambda m, x: m.down(F.relu(m.up(x).transpose(1, 2)).transpose(1, 2)))
    assert one_site(find_ffns(by_export(model))).activation == "relu"


def test_the_anchor_is_seen_through() -> None:
    def compute(m: Ffn, x: Tensor) -> Tensor:
        gates = (torch.sigmoid(x[..., :3]) > 0.5).to(x.dtype)
        y: Tensor = m.down(torch.ops.lte.gate_hidden(F.silu(m.gate(x)) * m.up(x), gates, 16))
        return y

    import lte_compile.kernels.ops  # noqa: F401  (registers lte::gate_hidden)

    search = find_ffns(by_export(Ffn(compute)))
    assert one_site(search).activation == "silu"
    anchor = search.matches[0].anchor
    assert anchor is not None
    assert anchor in search.matches[0].region


NEAR_MISSES: dict[str, tuple[Callable[[Ffn, Tensor], Tensor | tuple[Tensor, ...]], str, str]] = {
    "hidden returned as well": (
        lambda m, x: (lambda h: (m.down(h), h))(F.relu(m.up(x))),
        "down.weight",
        "hidden value `.*` has another user",
    ),
    "hidden read by a head": (
        lambda m, x: (lambda h: (m.down(h), m.head(h)))(F.relu(m.up(x))),
        "down.weight",
        "hidden value `.*` has another user",
    ),
    "pre-activation used elsewhere": (
        lambda m, x: (lambda h: (m.down(F.relu(h)), h.sum()))(m.up(x)),
        "down.weight",
        "hidden value `.*` has another user",
    ),
    "softmax over the hidden units": (
        lambda m, x: m.down(m.up(x).softmax(-1)),
        "down.weight",
        "it passes `softmax`, which is not element-wise",
    ),
    "norm over the hidden units": (
        lambda m, x: m.down(m.norm_hidden(F.relu(m.up(x)))),
        "down.weight",
        "it passes `layer_?norm`, which is not element-wise",
    ),
    "hidden units scaled by their mean": (
        lambda m, x: (lambda h: m.down(h * h.mean(-1, keepdim=True)))(F.relu(m.up(x))),
        "down.weight",
        "hidden units interact: .*computed from all of them",
    ),
    "cumulative sum over hidden units": (
        lambda m, x: m.down(F.relu(m.up(x)).cumsum(-1)),
        "down.weight",
        "`cumsum`, which is not element-wise",
    ),
    "two different inputs": (
        lambda m, x: m.down(F.silu(m.gate(m.norm(x))) * m.up(x)),
        "down.weight",
        "read different tensors: `gate.weight` reads .* and `up.weight` reads|read different tensors: `up.weight`",
    ),
    "gated by another layer's hidden": (
        lambda m, x: m.down(F.relu(m.up(x)) * F.relu(m.gate(torch.sin(x)))),
        "down.weight",
        "read different tensors",
    ),
    "gated by something per token": (
        lambda m, x: m.down(F.relu(m.up(torch.sin(x))) * x.mean(-1, keepdim=True)),
        "down.weight",
        "also depends on `.*`, which does not come from the FFN's input",
    ),
    "product of two activations": (
        lambda m, x: m.down((m.up(x).transpose(1, 2) @ m.gate(x)).sum(1)),
        "down.weight",
        "`(matmul|__matmul__)`|`sum`",
    ),
    "narrow adapter": (
        lambda m, x: x + m.widen(F.relu(m.narrow(x))),
        "widen.weight",
        f"adapter: its hidden width 4 is narrower than the model width {D}",
    ),
    "no wider than the model": (
        lambda m, x: m.back(F.relu(m.even(x))),
        "back.weight",
        f"hidden width {D} does not exceed the model width {D}",
    ),
    "no activation": (lambda m, x: m.down(m.up(x)), "down.weight", "no activation between"),
    "another output width": (
        lambda m, x: m.head(F.relu(m.up(x))),
        "head.weight",
        f"output width 7 differs from the model width {D}",
    ),
    "computed weight": (
        lambda m, x: F.linear(F.relu(F.linear(x, m.up.weight * 2)), m.down.weight),
        "down.weight",
        "its weight is not a parameter but computed",
    ),
    "weight with a second use": (
        lambda m, x: m.down(F.relu(m.up(x))) * m.up.weight.sum(),
        "down.weight",
        "`up.weight` is also used by",
    ),
    "one projection of two FFNs": (
        lambda m, x: m.down(F.relu(m.up(x))) + m.w_down.t().t().new_zeros(1) + F.gelu(m.up(torch.sin(x))) @ m.w_down,
        "down.weight",
        "`up.(weight|bias)` is also used by",
    ),
    "reordered hidden units": (
        lambda m, x: m.down(F.relu(m.up(x)).view(2, T, 6, 8).transpose(2, 3).reshape(2, T, H)),
        "down.weight",
        "splits or merges the hidden axis",
    ),
    "shifted tokens": (
        lambda m, x: m.down(F.relu(m.up(x))[:, 1:]),
        "down.weight",
        "picks tokens|tokens picked",
    ),
    "summed projections": (
        lambda m, x: m.down(m.up(x) + m.gate(x)),
        "down.weight",
        "no activation between",
    ),
    "unmerged low-rank update": (
        lambda m, x: m.back(F.relu(m.even(x) + m.widen(m.narrow(x)))),
        "back.weight",
        "unmerged LoRA: `narrow.weight` and `widen.weight`",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
@pytest.mark.parametrize("tracer", [by_export, by_dynamo])
def test_near_miss(name: str, tracer: Callable[[nn.Module], CapturedGraph]) -> None:
    compute, layer, reason = NEAR_MISSES[name]
    search = find_ffns(tracer(Ffn(compute)))
    assert search.sites == ()
    (rejection,) = (r for r in search.rejections if r.parameter == layer)
    with pytest.raises(ValueError, match=reason):  # the regex of `match` searches, as a reader would
        raise ValueError(rejection.reason)


def test_a_refused_ffn_names_itself_to_its_projections() -> None:
    search = find_ffns(by_export(Ffn(lambda m, x: (lambda h: (m.down(h), h))(F.relu(m.up(x))))))
    reasons = {r.parameter: r.reason for r in search.rejections}
    assert reasons["up.weight"].startswith("projection into `down.weight`, which is refused: its hidden value")
