"""Counting what routers and selectors chose: density, cost, load and union."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lte_compile.evaluation.costs import Reads, ffn_weights, ffn_weights_read
from lte_compile.evaluation.meter import SPANS, SelectionReport, measuring
from lte_compile.evaluation.selectors import Selector, installed
from lte_compile.passes.ir import FfnSite
from lte_compile.routing.router import routers, set_stage
from lte_compile.running.tracing import trace_routers
from tests.routed import routed, routed_stack, stack, tokens

PLAIN = FfnSite(up="up.weight", gate=None, down="down.weight", width=10, hidden=40, activation="relu", gated=False)
GATED = FfnSite(up="u.weight", gate="g.weight", down="d.weight", width=10, hidden=40, activation="silu", gated=True)


@pytest.mark.parametrize(
    ("site", "reads", "expected"),
    [
        (PLAIN, Reads.NEURONS, 2 * 10 * 20),
        (GATED, Reads.NEURONS, 3 * 10 * 20),
        (PLAIN, Reads.GATE_FIRST, 10 * 40 + 10 * 20),  # up whole, down at the 20 active neurons
        (GATED, Reads.GATE_FIRST, 10 * 40 + 2 * 10 * 20),
        (PLAIN, Reads.INPUTS, 40 * 5 + 10 * 20),  # up at the 5 active inputs
        (GATED, Reads.INPUTS, 2 * 40 * 5 + 10 * 20),
    ],
)
def test_weights_read_by_half_the_neurons_and_half_the_inputs(site: FfnSite, reads: Reads, expected: int) -> None:
    assert ffn_weights_read(site, reads, neurons=20, inputs=5) == expected
    assert ffn_weights_read(site, reads, neurons=40, inputs=10) == ffn_weights(site)


class Scripted(Selector):
    """Gates that were written down."""

    def __init__(self, site: FfnSite, gates_TE: Tensor, expert_size: int) -> None:
        super().__init__(site, expert_size)
        self.gates_TE = gates_TE

    def gates(self, x_TD: Tensor, hidden_TF: Tensor) -> Tensor:
        return self.gates_TE.view(*hidden_TF.shape[:-1], -1)


def _report(gates_TE: Tensor, expert_size: int = 16) -> SelectionReport:
    """Of one FFN of 40 neurons in experts of 16, 16 and 8."""
    model = stack(1)
    up, down = "0.up.weight", "0.down.weight"
    site = replace(PLAIN, up=up, down=down, width=16, first_projection=up)
    selector = Scripted(site, gates_TE, expert_size)
    with torch.no_grad(), installed(model, [selector]), measuring(model) as meter:
        model(tokens(len(gates_TE)))
    report = meter.report()
    assert report is not None
    return report


def test_density_load_and_cost_of_known_gates() -> None:
    report = _report(torch.tensor([[1, 0, 0], [1, 0, 1], [1, 0, 1], [1, 0, 0]], dtype=torch.float64))
    assert report.tokens == 4
    assert report.expert_density == 6 / 12
    assert report.neuron_density == (4 * 16 + 2 * 8) / (4 * 40)
    assert (report.experts, report.dead_experts) == (3, 1)
    [site] = report.sites.values()
    assert (site.load_min, site.load_median, site.load_max) == (0.0, 0.5, 1.0)
    assert report.weight_share == report.neuron_density  # a selector that costs nothing
    assert report.weight_bytes_per_token == report.flops_per_token / 2 * 8  # float64
    assert report.flops_per_token == 2 * 2 * 16 * 40 * report.neuron_density


def test_union_grows_with_the_tokens_joined() -> None:
    gates_TE = torch.eye(2, dtype=torch.float64)[[0, 0, 1, 1, 0, 0, 1, 1, 0]]  # nine tokens of two experts
    union = _report(gates_TE, expert_size=20).union_densities
    assert union == {2: 0.5, 4: 1.0, 8: 1.0}  # the ninth token fills no pair, and nothing fills 16


def test_a_router_is_counted_as_the_trace_counts_it() -> None:
    model, inputs = routed("bert", torch.float32)
    set_stage(model, "hard")
    with torch.no_grad(), measuring(model) as meter, trace_routers(model) as trace:
        model(**inputs)
    report = meter.report()
    assert report is not None
    assert report.neuron_density == pytest.approx(trace.density())
    assert {name: site.neuron_density for name, site in report.sites.items()} == pytest.approx(trace.densities())
    assert report.tokens == int(inputs["attention_mask"].sum())
    own = sum(router.weight.numel() for router in routers(model))
    dense = sum(ffn_weights(router.site) for router in routers(model))
    assert report.weight_share == pytest.approx(report.neuron_density + own / dense)
    assert all(float(load_E.mean()) == report.sites[name].expert_density for name, load_E in meter.loads().items())


def test_nothing_is_chosen_in_the_dense_stage_so_the_router_costs_nothing() -> None:
    model = routed_stack()
    with torch.no_grad(), measuring(model) as meter:
        model(tokens(70))
    report = meter.report()
    assert report is not None
    assert report.weight_share == report.neuron_density == 1.0
    assert report.union_densities == dict.fromkeys(SPANS, 1.0)


def test_a_dense_model_has_no_report() -> None:
    model = stack(1)
    with torch.no_grad(), measuring(model) as meter:
        model(tokens(3))
    assert meter.report() is None
