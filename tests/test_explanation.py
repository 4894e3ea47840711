"""Which kernel serves which FFN, told without running anything."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lte_compile as lte
from lte_compile.config import Stage
from lte_compile.inspection.kernels import REFERENCE_FORM
from lte_compile.kernels.lowering import LOWERINGS
from lte_compile.rewriting.layouts import set_layout
from tests.routed import routed, stack, tokens

NAMES = {lowering.name for lowering in LOWERINGS}


def test_every_site_is_explained_at_every_number_of_tokens() -> None:
    model, _ = routed("llama")
    found = lte.explain(model, tokens=(1, 16))
    downs = [name for name, _ in model.named_parameters() if name.endswith("down_proj.weight")]
    assert [(each.site, each.tokens) for each in found] == [(down, count) for down in downs for count in (1, 16)]
    assert {each.kernel for each in found} <= NAMES
    first = found[0]
    assert first.kernel == "cpu-runs"
    assert first.refusals["triton-decode"] == "needs a CUDA device; x is on cpu"


def test_another_device_than_the_models_can_be_asked_about() -> None:
    model, _ = routed("llama")

    def explained(dtype: torch.dtype | None = torch.bfloat16) -> lte.KernelOfSite:
        return lte.explain(model, device="cuda", dtype=dtype, tokens=[1])[0]

    assert "must be neuron-major" in explained().refusals["triton-decode"]
    set_layout(model, "neuron_major")
    assert explained().kernel == "triton-decode"
    assert "got torch.float64" in explained(dtype=None).refusals["triton-decode"]  # the test model's own


def test_the_stage_is_left_as_it_was() -> None:
    model, _ = routed("llama")
    lte.set_stage(model, "soft")
    lte.explain(model, tokens=[1])
    assert {router.stage for router in lte.routers(model)} == {Stage.SOFT}


def test_what_cannot_be_lowered_says_why() -> None:
    model = lte.transform(stack(), lte.TransformConfig(expert_size=8, selection="top_share"), tokens(3))
    found = lte.explain(model, tokens(3), tokens=[1])
    assert {each.kernel for each in found} == {REFERENCE_FORM}
    assert {each.refusals["lower-sparse"] for each in found} == {"lte.sparse_ffn has no selection rule 'top_share'"}


def test_mistakes_are_named() -> None:
    model, _ = routed("llama")
    with pytest.raises(ValueError, match="tokens must be at least 1; got 0"):
        lte.explain(model, tokens=[0])
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda'; got 'gpu'"):
        lte.explain(model, device="gpu")
    with pytest.raises(ValueError, match="has no routers"):
        lte.explain(nn.Linear(8, 8), torch.randn(2, 8))
