"""Random small FFNs: element-wise chains, optional gate, split and transpose are found; decoys are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lte_compile.capture.capture import Call, capture_by_export
from lte_compile.passes.match import find_ffns

D, H, T = 8, 24, 3

CHAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "sine": torch.sin,
    "shifted": lambda h: h + 1.5,
    "scaled": lambda h: 0.5 * h,
    "squared": torch.square,
    "dropped out": F.dropout,
    "cast": lambda h: h.double().float(),
    "transposed": lambda h: h.transpose(1, 2).contiguous().transpose(1, 2),
    "flattened": lambda h: h.reshape(-1, H).view(2, T, H),
}
DECOYS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda h: h.softmax(-1),
    "normed": lambda h: h / (1 + h.norm(dim=-1, keepdim=True)),
    "rolled": lambda h: h.roll(1, -1),
    "flipped": lambda h: h.flip(-1),
    "summed tokens": lambda h: h.cumsum(1),
    "mixed": lambda h: h.view(2, T, 4, H // 4).transpose(2, 3).reshape(2, T, H),
}


@dataclass(frozen=True)
class Recipe:
    chain: tuple[str, ...]
    gated: bool
    fused: bool
    decoy: str | None


class RandomFfn(nn.Module):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.up, self.gate, self.down = nn.Linear(D, H), nn.Linear(D, H), nn.Linear(H, D)
        self.both = nn.Linear(D, 2 * H)

    def forward(self, x: Tensor) -> Tensor:
        recipe = self.recipe
        first, second = self.both(x).chunk(2, -1) if recipe.fused else (self.up(x), self.gate(x))
        for name in recipe.chain:
            first = CHAIN[name](first)
        hidden = torch.tanh(first) * second if recipe.gated or recipe.fused else torch.tanh(first)
        y: Tensor = self.down(hidden if recipe.decoy is None else DECOYS[recipe.decoy](hidden))
        return x + y


recipes = st.builds(
    Recipe,
    chain=st.lists(st.sampled_from(sorted(CHAIN)), max_size=4).map(tuple),
    gated=st.booleans(),
    fused=st.booleans(),
    decoy=st.one_of(st.none(), st.sampled_from(sorted(DECOYS))),
)


@seed(0)
@settings(max_examples=30, deadline=None)
@given(recipes)
def test_a_random_ffn_is_found_exactly_when_its_hidden_units_stay_apart(recipe: Recipe) -> None:
    search = find_ffns(capture_by_export(RandomFfn(recipe), Call((torch.randn(2, T, D),), {})))
    if recipe.decoy is not None:
        assert search.sites == ()
        assert {"down.weight"} <= {r.parameter for r in search.rejections}
        return
    (site,) = search.sites
    assert site.gated == (recipe.gated or recipe.fused)
    assert (site.hidden, site.width, site.down) == (H, D, "down.weight")
    if recipe.fused:
        assert site.up == site.gate == "both.weight"
    elif recipe.gated:
        assert (site.up, site.gate) == ("gate.weight", "up.weight")  # the chain ran on the output of `up`
    if not recipe.chain:
        assert site.activation == "tanh"
