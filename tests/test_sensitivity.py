"""Routers fitted to effects on a model's outputs: what nothing reads gets nothing, and layers share one budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lte_compile.calibration.density import evaluate_routers
from lte_compile.calibration.effects import fit_routers_to_effects, watch_weighted
from lte_compile.calibration.fitting import fit_routers
from lte_compile.config import TransformConfig
from lte_compile.rewriting.naming import current_sites
from lte_compile.routing.router import require_routers, set_stage
from lte_compile.running.tracing import trace_routers
from lte_compile.transform import transform
from tests.routed import routed

WIDTH, HIDDEN, SIZE = 12, 48, 4


class Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class FirstTokenClassifier(nn.Module):
    """Two FFNs and a head that reads the first token alone; tokens never meet."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(WIDTH, HIDDEN) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(HIDDEN, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Output:
        x = x + self.down[0](torch.relu(self.up[0](x)))
        x = x + 0.1 * self.down[1](torch.relu(self.up[1](x)))
        return Output(self.head(x[:, 0]))


def _classifier() -> tuple[nn.Module, list[dict[str, Any]]]:
    """The first token is told from the others by a sign."""
    torch.manual_seed(0)
    x = torch.randn(64, 6, WIDTH)
    x[..., 0] = -2.0
    x[:, 0, 0] = 2.0
    model = FirstTokenClassifier()
    return transform(model, TransformConfig(expert_size=SIZE), {"x": x[:2]}), [{"x": x[:32]}, {"x": x[32:]}]


def test_tokens_that_nothing_reads_get_no_experts() -> None:
    model, batches = _classifier()
    fit_routers_to_effects(model, batches, 0.1)
    set_stage(model, "hard")
    with torch.no_grad(), trace_routers(model) as trace:
        model(**batches[0])
    active_BTE = torch.cat([trace.scores(site) > 0.5 for site in trace.sites], -1).view(32, 6, -1).double()
    assert active_BTE[:, 1:].mean() < 0.2 * active_BTE[:, 0].mean()  # by energies alone they have as many
    assert trace.density() == pytest.approx(0.1, abs=0.02)


def test_layers_that_matter_more_get_more() -> None:
    """The second FFN counts a tenth of the first."""
    model, batches = _classifier()
    fit_routers_to_effects(model, batches, 0.1)
    first, second = evaluate_routers(model, batches).densities().values()
    assert first > 2 * second
    fit_routers(model, batches, 0.1)
    first, second = evaluate_routers(model, batches).densities().values()
    assert first == pytest.approx(second, abs=0.03)


@pytest.mark.parametrize("family", ["bert", "llama", "bart"])
def test_the_density_is_the_target_in_real_models(family: str) -> None:
    model, inputs = routed(family, torch.float32)
    batch = {name: value for name, value in inputs.items() if name != "labels"}
    fit_routers_to_effects(model, [batch], 0.4)
    assert evaluate_routers(model, [batch]).density() == pytest.approx(0.4, abs=0.08)  # few tokens, six experts
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weights_are_the_gradients_lengths() -> None:
    """Of what nothing reads they are nothing."""
    model, batches = _classifier()
    set_stage(model, "dense")
    sites = current_sites(model)
    last = sites[require_routers(model)[1]]
    seen: list[Tensor] = []
    watch_weighted(model, batches[:1], {last: lambda x_TD, hidden_TF: seen.append(hidden_TF)})
    [hidden_TF] = seen
    hidden_BTF = hidden_TF.view(32, 6, HIDDEN)
    assert not hidden_BTF[:, 1:].any()
    assert hidden_BTF[:, 0].norm(dim=-1).min() > 0


def test_frozen_models_are_fitted_too() -> None:
    model, batches = _classifier()
    fit_routers_to_effects(model.requires_grad_(False), batches, 0.1)
    assert evaluate_routers(model, batches).density() == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize(
    ("given", "reason"),
    [({"rounds": 0}, "rounds must be at least 1; got 0"), ({"batches": []}, "no batches were given")],
)
def test_at_least_one_batch_and_round(given: dict[str, Any], reason: str) -> None:
    model, batches = _classifier()
    with pytest.raises(ValueError, match=reason):
        fit_routers_to_effects(model, **{"batches": batches, "density": 0.1, **given})


@pytest.mark.parametrize("length", [5, 8])
def test_pointwise_convolutions_have_their_width_first(length: int) -> None:
    """Of as many positions as channels too, where either axis would do for the shapes."""

    class Convolutions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.head = nn.Conv1d(8, 32, 1), nn.Conv1d(32, 8, 1), nn.Conv1d(8, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(x + self.down(torch.relu(self.up(x))))
            return y

    class Linears(nn.Module):
        def __init__(self, other: Convolutions) -> None:
            super().__init__()
            self.up, self.down, self.head = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 3)
            for mine, its in zip(self.children(), other.children(), strict=True):
                mine.load_state_dict({name: value.squeeze(-1) for name, value in its.state_dict().items()})

        def forward(self, x: Tensor) -> Tensor:
            x = x.transpose(1, 2)
            y: Tensor = self.head(x + self.down(torch.relu(self.up(x)))).transpose(1, 2)
            return y

    torch.manual_seed(0)
    model, x_BDT = Convolutions(), torch.randn(16, 8, length)
    fitted = []
    for each in (model, Linears(model)):
        transform(each, TransformConfig(expert_size=8), x_BDT)
        fit_routers_to_effects(each, [x_BDT], 0.4)
        [router] = require_routers(each)
        fitted.append(router.weight)
    torch.testing.assert_close(*fitted, rtol=1e-3, atol=1e-4)  # float32 ridge regression of other orders of sums


def test_products_of_a_forwards_own_are_refused() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(HIDDEN, WIDTH))
            self.down = nn.Parameter(torch.randn(WIDTH, HIDDEN))

        def forward(self, x: Tensor) -> Output:
            return Output(torch.relu(x @ self.up.T) @ self.down.T)

    x = torch.randn(2, 5, WIDTH)
    model = transform(Own(), TransformConfig(expert_size=SIZE), {"x": x})
    with pytest.raises(ValueError, match="fit its router to energies"):
        fit_routers_to_effects(model, [{"x": x}], 0.5)
