"""Experts that a model has of itself: found on every route, told from FFNs, left alone by transform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

from lte_compile.capture.capture import Call, capture, capture_by_dynamo, capture_by_export
from lte_compile.inspection.sites import inspect, require_sites
from lte_compile.passes.ir import CapturedGraph, FfnSite, SiteKind, WeightLayout
from lte_compile.passes.match import find_ffns
from lte_compile.routing.router import routers
from lte_compile.transform import transform

EXPERTS, WIDTH, HIDDEN, TOKENS = 4, 16, 24, 6


class Bank(nn.Module):
    """Stacked weights, and a function that says how they are used."""

    def __init__(self, compute: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(EXPERTS, *s) / 4) for s in ((WIDTH, HIDDEN), (HIDDEN, WIDTH)))
        self.up_bias = nn.Parameter(torch.randn(EXPERTS, HIDDEN))
        self.router, self.compute = nn.Linear(WIDTH, EXPERTS), compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


def every_expert(m: Bank, x: Tensor) -> Tensor:
    """All experts on all tokens, as einsum products."""
    hidden = F.silu(torch.einsum("td,edf->etf", x, m.up))
    return torch.einsum("etf,efd->etd", hidden, m.down).sum(0)


def copied_tokens(m: Bank, x: Tensor) -> Tensor:
    hidden = torch.bmm(x.expand(EXPERTS, -1, -1), m.up) + m.up_bias[:, None]
    return torch.bmm(F.silu(hidden), m.down).sum(0)


def loop(m: Bank, x: Tensor) -> Tensor:
    weights = m.router(x).softmax(-1)
    parts = (weights[:, e, None] * (F.silu(x @ m.up[e] + m.up_bias[e]) @ m.down[e]) for e in range(EXPERTS))
    return sum(parts, torch.zeros_like(x))


def picked_per_token(m: Bank, x: Tensor) -> Tensor:
    ids = m.router(x).argmax(-1)
    hidden = F.silu(torch.bmm(x[:, None], m.up[ids]).squeeze(1) + m.up_bias[ids])
    return torch.bmm(hidden[:, None], m.down[ids]).squeeze(1)


def masked_tokens(m: Bank, x: Tensor) -> Tensor:
    """Tokens without an expert are set to zero on the way, as transformers does for experts on other devices."""
    ids = m.router(x).argmax(-1)
    lost = (ids >= EXPERTS)[:, None]
    hidden = torch.bmm(x[:, None], m.up[ids]).squeeze(1).masked_fill(lost, 0.0)
    return torch.bmm(F.silu(hidden)[:, None], m.down[ids]).squeeze(1).masked_fill(lost, 0.0)


def by_export(model: nn.Module) -> CapturedGraph:
    return capture_by_export(model, Call((torch.randn(TOKENS, WIDTH),), {}))


def by_dynamo(model: nn.Module) -> CapturedGraph:
    (graph,) = capture_by_dynamo(model, Call((torch.randn(TOKENS, WIDTH),), {}))
    return graph


def by_fx(model: nn.Module) -> CapturedGraph:
    return capture(fx.symbolic_trace(model), torch.randn(TOKENS, WIDTH))


@pytest.mark.parametrize("tracer", [by_export, by_dynamo, by_fx])
@pytest.mark.parametrize("compute", [every_expert, copied_tokens, loop, picked_per_token, masked_tokens])
def test_banks_are_native_sites(compute: Callable[[Any, Tensor], Tensor], tracer: Any) -> None:
    search = find_ffns(tracer(Bank(compute)))
    (site,) = {match.site for match in search.native_moe}
    assert search.sites == ()
    assert (site.kind, site.experts) == (SiteKind.NATIVE_MOE, EXPERTS)
    assert (site.up, site.gate, site.down) == ("up", None, "down")
    assert (site.width, site.hidden) == (WIDTH, HIDDEN)
    assert (site.up_layout, site.down_layout) == (WeightLayout.IN_OUT, WeightLayout.IN_OUT)
    assert not {r.parameter for r in search.rejections} & {"up", "down"}
    assert FfnSite.from_dict(site.to_dict()) == site


def test_a_stack_feeding_a_matrix_is_refused() -> None:
    """Gate and up stacked in one parameter are no experts: a plain matrix reads them."""

    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.down = nn.Parameter(torch.randn(2, WIDTH, HIDDEN)), nn.Linear(HIDDEN, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.down(F.silu(x @ self.both[0]) * (x @ self.both[1]))
            return y

    search = find_ffns(by_export(Stacked()))
    assert search.sites == ()
    assert search.native_moe == ()
    assert any("stacks 2 matrices" in r.reason for r in search.rejections)


def sorted_tokens(m: Bank, x: Tensor) -> Tensor:
    """Tokens in the order of their experts, two to each, as JetMoE has them."""
    order = m.router(x[: 2 * EXPERTS]).argmax(-1).argsort()
    hidden = torch.cat([part @ m.up[e] for e, part in enumerate(torch.chunk(x[order], EXPERTS))])
    return torch.cat([part @ m.down[e] for e, part in enumerate(torch.chunk(F.silu(hidden), EXPERTS))])


def test_experts_that_are_not_followed_are_called_experts() -> None:
    model = Bank(sorted_tokens)
    search = find_ffns(capture_by_export(model, Call((torch.randn(2 * EXPERTS, WIDTH),), {})))
    reasons = [r.reason for r in search.rejections if r.parameter in ("up", "down")]
    assert not search.sites
    assert len(reasons) == 2 * EXPERTS
    assert all(f"one of {EXPERTS} experts, which are not brought together" in reason for reason in reasons)


def mixture(implementation: str = "grouped_mm", dense_layers: tuple[int, ...] = ()) -> nn.Module:
    config = tf.Qwen3MoeConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=80,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=list(dense_layers),
        experts_implementation=implementation,
        pad_token_id=0,
    )
    model: nn.Module = tf.Qwen3MoeForCausalLM(config).eval()
    return model


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_implementation_of_experts_is_traced(implementation: str) -> None:
    """A loop over the experts that were hit depends on the data: it is traced in another form, then put back."""
    model = mixture(implementation, dense_layers=(0,))
    inspection = inspect(model)
    assert inspection.route == "export"
    assert len(inspection.graphs) == 1
    assert [site.down for site in inspection.ffn_sites] == ["model.layers.0.mlp.down_proj.weight"]
    (native,) = inspection.native_moe_sites
    assert (native.up, native.down) == (
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
    )
    assert (native.gated, native.activation, native.experts, native.hidden) == (True, "silu", 4, 24)
    assert model.config._experts_implementation == implementation  # type: ignore[union-attr]


def test_the_table_shows_them_apart() -> None:
    text = str(inspect(mixture(dense_layers=(0,))))
    assert "FFN sites: 1 " in text
    assert "native_moe sites: 1, experts of the model itself, left alone" in text
    assert "4 experts" in text


def test_transform_leaves_native_experts_alone_and_says_so() -> None:
    model = mixture("batched_mm", dense_layers=(0,)).double()
    ids = {"input_ids": torch.arange(2 * 8).view(2, 8) + 3}
    before = {name: value.clone() for name, value in model.state_dict().items() if "experts" in name}
    with torch.no_grad():
        expected = model(**ids).logits
    with pytest.warns(UserWarning, match=r"1 sites of kind native_moe.*stay as they are; only its 1 dense FFN"):
        transform(model, example_inputs=ids)
    assert [router.site.down for router in routers(model)] == ["model.layers.0.mlp.down_proj.weight"]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    with torch.no_grad():
        torch.testing.assert_close(model(**ids).logits, expected, rtol=1e-9, atol=1e-9)


def test_a_model_of_native_experts_only_has_nothing_to_rewrite() -> None:
    with pytest.raises(ValueError, match="no FFN found to rewrite, only experts of the model itself"):
        require_sites(inspect(mixture()))
