"""Router initialisation: planted relations are found, densities on the fitted data are exact, awkward data is survived.

Shapes: T tokens, D model width, F neurons, S expert size, E experts.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lte_compile.routing.linear_fit import RidgeRouterFit, centroid_router, group_energy


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fitted(x_TD: Tensor, hidden_TF: Tensor, expert_size: int, **options: float) -> RidgeRouterFit:
    norms_F = torch.ones(hidden_TF.shape[1])
    fit = RidgeRouterFit(norms_F, expert_size, width=x_TD.shape[1], **options)  # type: ignore[arg-type]
    fit.update(x_TD, hidden_TF)
    return fit


def density(x_TD: Tensor, w_router_ED: Tensor, bias_E: Tensor, threshold: float = 0.5) -> float:
    return float((torch.sigmoid(x_TD @ w_router_ED.T + bias_E) > threshold).float().mean())


# ---- group energy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("neurons, expert_size", [(12, 4), (13, 4), (5, 5), (7, 1)])
def test_group_energy_sums_each_experts_neurons(neurons: int, expert_size: int) -> None:
    hidden_TF, norms_F = normal(3, neurons), normal(neurons, seed=1).abs()
    expected = [
        (hidden_TF[:, start : start + expert_size] ** 2 * norms_F[start : start + expert_size] ** 2).sum(1)
        for start in range(0, neurons, expert_size)
    ]
    torch.testing.assert_close(group_energy(hidden_TF, norms_F, expert_size), torch.stack(expected, 1))


# ---- centroid router ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.25, 0.75, 0.95])
@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_centroid_router_reaches_its_density_on_white_inputs(target: float, threshold: float) -> None:
    w_router_ED, bias_E = centroid_router(normal(256, 64), 32, density=target, threshold=threshold)
    # 4096 tokens x 8 experts whose rows are nearly orthogonal: two deviations are under 0.01
    assert density(normal(4096, 64, seed=1), w_router_ED, bias_E, threshold) == pytest.approx(target, abs=0.015)


def test_centroid_rows_point_at_their_neurons_and_have_the_stated_length() -> None:
    directions_ED = torch.eye(6, 32)
    lengths_F1 = torch.logspace(-2, 2, 24)[:, None]  # neurons count alike whatever their length
    w_router_ED, _ = centroid_router(directions_ED.repeat_interleave(4, 0) * lengths_F1, 4, logit_std=1.5)
    torch.testing.assert_close(w_router_ED, 1.5 * directions_ED)


def test_centroid_router_of_an_uneven_layer_has_a_row_for_the_smaller_expert() -> None:
    w_router_ED, bias_E = centroid_router(normal(70, 8).to(torch.bfloat16), 32)
    assert w_router_ED.shape == (3, 8)
    assert bias_E.shape == (3,)
    assert w_router_ED.dtype == bias_E.dtype == torch.float32


def test_centroid_scores_never_sit_on_the_threshold() -> None:
    cancelling_FD = torch.cat([torch.ones(2, 4), -torch.ones(2, 4)])
    w_router_ED, bias_E = centroid_router(cancelling_FD, 4)
    scores = torch.sigmoid(torch.zeros(1, 4) @ w_router_ED.T + bias_E)
    assert torch.isfinite(scores).all()
    assert (scores - 0.5).abs().min() > 0.1


@pytest.mark.parametrize("options", [{"density": 1.0}, {"density": 0.0}, {"threshold": 1.0}, {"logit_std": 0.0}])
def test_centroid_router_refuses_settings_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        centroid_router(normal(8, 4), 4, **options)


@pytest.mark.parametrize("expert_size", [0, 9])
def test_expert_sizes_that_do_not_fit_are_refused(expert_size: int) -> None:
    with pytest.raises(ValueError, match="between 1 and the 8 neurons"):
        centroid_router(normal(8, 4), expert_size)
    with pytest.raises(ValueError, match="between 1 and the 8 neurons"):
        RidgeRouterFit(torch.ones(8), expert_size, width=4)


# ---- ridge regression ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_ridge_recovers_a_planted_linear_relation(dtype: torch.dtype) -> None:
    """Log energies that are linear in x are ranked as planted: rows agree in direction and in relative length."""
    experts, width, size = 6, 16, 4
    truth_ED, offset_E = normal(experts, width), normal(experts, seed=1)
    x_TD = normal(4000, width, seed=2).to(dtype)
    log_energy_TE = 0.3 * x_TD.float() @ truth_ED.T + offset_E
    hidden_TF = (0.5 * log_energy_TE).exp().repeat_interleave(size, 1) / size**0.5
    w_router_ED, bias_E = fitted(x_TD, hidden_TF.to(dtype), size, energy_floor=1e-9).solve(0.4)
    gain = w_router_ED.norm() / (0.3 * truth_ED).norm()
    # ridge 1e-3 shrinks by that much; bfloat16 keeps 8 bits of each energy
    tolerance = 0.02 if dtype == torch.bfloat16 else 3e-3
    torch.testing.assert_close(w_router_ED, 0.3 * gain * truth_ED, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(bias_E - bias_E.mean(), gain * (offset_E - offset_E.mean()), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("target", [0.05, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("threshold", [0.5, 0.2])
@pytest.mark.parametrize("neurons, expert_size", [(64, 8), (61, 8), (16, 16), (12, 1)])
def test_density_on_the_fitted_data_is_the_target(
    target: float, threshold: float, neurons: int, expert_size: int
) -> None:
    x_TD = normal(1500, 24)
    hidden_TF = torch.relu(x_TD @ normal(24, neurons, seed=1))
    w_router_ED, bias_E = fitted(x_TD, hidden_TF, expert_size).solve(target, threshold=threshold)
    assert density(x_TD, w_router_ED, bias_E, threshold) == pytest.approx(target, abs=0.01)


def test_density_holds_when_only_a_sample_of_the_tokens_is_kept() -> None:
    x_TD = normal(6000, 24) + torch.linspace(-1, 1, 6000)[:, None]  # a drift: the first tokens are not typical
    hidden_TF = torch.relu(x_TD @ normal(24, 64, seed=1))
    fit = RidgeRouterFit(torch.ones(64), 8, width=24, sample_tokens=2000)
    for x_batch, hidden_batch in zip(torch.split(x_TD, 700), torch.split(hidden_TF, 700), strict=True):
        fit.update(x_batch, hidden_batch)
    w_router_ED, bias_E = fit.solve(0.3)
    # the share's deviation over 2000 of 6000 tokens is about 0.006
    assert density(x_TD, w_router_ED, bias_E) == pytest.approx(0.3, abs=0.02)


def test_batches_add_up_to_one_large_batch() -> None:
    x_TD = normal(600, 12)
    hidden_TF = normal(600, 20, seed=1) * x_TD[:, :1]
    streamed = RidgeRouterFit(torch.ones(20), 4, width=12)
    streamed.update(x_TD[:0], hidden_TF[:0])  # an empty batch (all padding) counts for nothing
    for part in (slice(0, 300), slice(300, 301), slice(301, 600)):
        streamed.update(x_TD[part], hidden_TF[part])
    assert streamed.tokens == 600
    # the energy floor is fixed by the first batch, hence not to the last bit
    for mine, whole in zip(streamed.solve(0.3), fitted(x_TD, hidden_TF, 4).solve(0.3), strict=True):
        torch.testing.assert_close(mine, whole, rtol=1e-2, atol=1e-2)


def test_scores_spread_as_stated() -> None:
    x_TD = normal(1000, 16)
    w_router_ED, bias_E = fitted(x_TD, x_TD @ normal(16, 32, seed=1), 8).solve(0.5, logit_std=3.0)
    assert float((x_TD @ w_router_ED.T + bias_E).std()) == pytest.approx(3.0, rel=1e-3)


@pytest.mark.parametrize("tokens", [1, 3, 10])
def test_fewer_tokens_than_dimensions_give_a_finite_router(tokens: int) -> None:
    x_TD = normal(tokens, 64)
    w_router_ED, bias_E = fitted(x_TD, torch.relu(x_TD @ normal(64, 32, seed=1)), 8).solve(0.5)
    assert torch.isfinite(w_router_ED).all()
    assert density(x_TD, w_router_ED, bias_E) == pytest.approx(0.5, abs=0.5 / tokens / 4 + 0.01)


@pytest.mark.parametrize("hidden", [0.0, 1.0])
def test_constant_energy_turns_every_expert_on(hidden: float) -> None:
    x_TD = normal(200, 8)
    w_router_ED, bias_E = fitted(x_TD, torch.full((200, 12), hidden), 4).solve(0.3)
    assert density(x_TD, w_router_ED, bias_E) == 1.0


def test_constant_inputs_leave_only_the_biases_to_choose() -> None:
    hidden_TF = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(50, 4)
    w_router_ED, bias_E = fitted(torch.ones(50, 8), hidden_TF, 1).solve(0.5)
    gates_TE = torch.sigmoid(torch.ones(50, 8) @ w_router_ED.T + bias_E) > 0.5
    assert gates_TE.tolist() == [[False, False, True, True]] * 50


def test_louder_down_rows_win() -> None:
    norms_F = torch.tensor([1.0, 1.0, 10.0, 10.0])
    fit = RidgeRouterFit(norms_F, 2, width=4)
    x_TD = normal(300, 4)
    fit.update(x_TD, normal(300, 4, seed=1))
    w_router_ED, bias_E = fit.solve(0.5)
    on_E = (x_TD @ w_router_ED.T + bias_E > 0).float().mean(0)
    assert on_E[1] > 0.9 > 0.1 > on_E[0]


def test_solving_before_any_batch_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="call update"):
        RidgeRouterFit(torch.ones(8), 4, width=4).solve(0.5)


@pytest.mark.parametrize("target", [0.0, 1.0, math.nan])
def test_densities_out_of_range_are_refused(target: float) -> None:
    with pytest.raises(ValueError, match="density must lie strictly between 0 and 1"):
        fitted(normal(10, 4), normal(10, 8), 4).solve(target)


def test_batches_that_do_not_fit_are_refused() -> None:
    fit = RidgeRouterFit(torch.ones(8), 4, width=4)
    with pytest.raises(ValueError, match=r"expected inputs \[T, 4\] and hidden activations \[T, 8\]"):
        fit.update(normal(3, 4), normal(2, 8))
    with pytest.raises(ValueError, match="NaN or infinity"):
        fit.update(torch.full((3, 4), float("nan")), normal(3, 8))
    assert fit.tokens == 0
