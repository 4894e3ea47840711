"""inspect: the table, the record, the picture, and what it says when there is nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte_compile.inspection.sites import Inspection, inspect, require_sites
from lte_compile.passes.ir import FfnSite
from tests.zoo import build


@pytest.fixture(scope="module")
def llama() -> Inspection:
    return inspect(*build("llama"))


def test_sites_and_rejections(llama: Inspection) -> None:
    assert [site.name for site in llama.sites] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert len(llama.rejections) == 2 * 4 + 1  # q, k, v, o per layer and the head
    assert llama.route == "export"


def test_the_table_groups_layers(llama: Inspection) -> None:
    text = str(llama)
    assert re.search(r"FFN sites: 2 .*other linear layers: 9", text)
    assert re.search(r"\b2 +model\.layers\.\*\.mlp +64 +128 +silu +yes", text)
    assert re.search(r"\b2 +model\.layers\.\*\.self_attn\.o_proj\.weight +attention output projection", text)
    assert re.search(r"\b1 +lm_head\.weight", text)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 160


def test_the_record_survives_json(llama: Inspection) -> None:
    record = json.loads(json.dumps(llama.to_dict()))
    assert tuple(FfnSite.from_dict(site) for site in record["sites"]) == llama.sites
    assert {r["parameter"] for r in record["rejections"]} == {r.parameter for r in llama.rejections}


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_the_picture_names_what_matters(family: str, tmp_path: Path) -> None:
    inspection = inspect(*build(family))
    path = inspection.draw(tmp_path / "site.svg", site=1)
    site, picture = inspection.sites[1], path.read_text()
    for text in (site.name, site.down.removeprefix(f"{site.name}."), site.up.removeprefix(f"{site.name}."), "128"):
        assert text in picture
    assert list(tmp_path.iterdir()) == [path]  # nothing temporary left


def test_a_picture_is_the_same_every_time(llama: Inspection, tmp_path: Path) -> None:
    first, second = (llama.draw(tmp_path / name).read_bytes() for name in ("a.svg", "b.svg"))
    assert first == second


def test_pictures_that_cannot_be_drawn(llama: Inspection, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no site 2: this model has 2"):
        llama.draw(tmp_path / "site.svg", site=2)
    with pytest.raises(ValueError, match=r"end the name in one of \.svg, \.png, \.pdf"):
        llama.draw(tmp_path / "site.txt")


class NoFfn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(F.relu(self.first(x)))
        return y


def test_no_site_is_an_answer_and_an_error_on_demand() -> None:
    inspection = inspect(NoFfn(), torch.ones(2, 8))
    assert inspection.sites == ()
    with pytest.raises(ValueError, match="no FFN found; every candidate was refused") as caught:
        require_sites(inspection)
    assert re.search(r"first\.weight +\S", str(caught.value))
    assert re.search(r"second\.weight +.*output width 4 differs from the model width 8", str(caught.value))


def test_a_model_without_linear_layers() -> None:
    inspection = inspect(nn.ReLU(), torch.ones(2, 8))
    with pytest.raises(ValueError, match="no linear layer at all"):
        require_sites(inspection)


def test_require_sites_hands_them_over(llama: Inspection) -> None:
    assert require_sites(llama) == llama.sites


class UsedAcrossABreak(nn.Module):
    """The down-projection of the first graph is something else in the second."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.relu(self.up(x)))
        if bool(y.sum() > 1e9):
            return y
        return y + F.linear(self.up(y).softmax(-1), self.down.weight)


def test_weights_are_followed_across_graph_breaks() -> None:
    inspection = inspect(UsedAcrossABreak(), torch.ones(2, 8))
    assert inspection.route == "dynamo"
    assert inspection.sites == ()
    assert any("in another graph" in rejection.reason for rejection in inspection.rejections)
