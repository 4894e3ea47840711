"""What the lowerings for many tokens share: the router's product in parts, and estimates of what skipping saves."""

from __future__ import annotations

import pytest
import torch

from lte_compile.kernels.grouped_tile import grouped_tile
from lte_compile.kernels.many_tokens import router_parts, router_product
from lte_compile.kernels.skipping_cost import Layer, dense_cost, expected_union, grouped_cost

LLAMA = Layer(4096, 11008, 344, 32, 2, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [7, 1025])
def test_parts_of_the_router_add_up_to_its_product(tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x_TD, router_ED = torch.randn(tokens, 128).to(dtype), torch.randn(5, 128).to(dtype)
    parts = torch.empty(router_parts(*x_TD.shape), tokens, 5)
    router_product(x_TD, router_ED, parts)
    torch.testing.assert_close(parts.sum(0), x_TD.float() @ router_ED.float().t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [1, 37, 100])
def test_widths_that_do_not_divide_are_not_cut(width: int) -> None:
    assert router_parts(64, width) == 1


def test_a_union_of_independent_masks_approaches_every_expert() -> None:
    unions = [expected_union(tokens, 0.1) for tokens in (0, 1, 2, 64)]
    assert unions[:3] == pytest.approx([0.0, 0.1, 0.19])
    assert unions[3] > 0.99


# Speed-ups seen on an H100 (benchmarks/results/prefill.json).
@pytest.mark.parametrize(
    ("tokens", "density", "seen"), [(512, 0.1, 1.31), (2048, 0.2, 1.6), (4096, 0.1, 2.05), (8192, 0.3, 1.29)]
)
def test_estimates_are_near_what_was_measured(tokens: int, density: float, seen: float) -> None:
    tile = grouped_tile(density * tokens, 32, torch.bfloat16)
    assert dense_cost(LLAMA, tokens) / grouped_cost(LLAMA, tokens, density, tile) == pytest.approx(seen, rel=0.12)


@pytest.mark.parametrize(
    ("rows", "tokens"), [(13, 32), (26, 32), (51, 64), (102, 128), (154, 64), (205, 128), (4000, 128)]
)
def test_tiles_fit_the_lists(rows: int, tokens: int) -> None:
    assert grouped_tile(rows, 32, torch.bfloat16).tokens == tokens


def test_experts_narrower_than_a_tile_are_estimated_with_their_padding() -> None:
    narrow = Layer(4096, 11008, 11008, 1, 2, torch.bfloat16)
    cost = [
        grouped_cost(layer, 2048, 0.1, grouped_tile(205, layer.expert_size, layer.dtype)) for layer in (LLAMA, narrow)
    ]
    assert cost[1] > 4 * cost[0]
