"""Generated models: the search finds every FFN written into them and nothing else, and rewriting keeps the function.

What is an FFN is known from how a model was written (`generated_ffns`, `generated_decoys`). A failing example shrinks
to a few lines of code, printed with the sites that were expected.
"""

from __future__ import annotations

from zlib import crc32

import pytest
import torch
import torch.fx as fx
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from lte_compile.capture.capture import Call, capture, capture_by_export
from lte_compile.config import Grouping, TransformConfig
from lte_compile.passes.ir import FfnSite
from lte_compile.passes.match import find_ffns
from lte_compile.rewriting.permutation import permute_neurons
from lte_compile.routing.router import routers
from lte_compile.transform import transform
from tests.passes.generated import Block, Program, Sizes, program
from tests.passes.generated_decoys import decoy
from tests.passes.generated_ffns import ffn

# Tracing these for coverage takes half of their time again; other tests run the same lines.
pytestmark = pytest.mark.no_cover

TOLERANCE = 1e-10  # reordering neurons changes the order of summation, about 1e-15 in float64 for values of order 1
CONFIG = TransformConfig(expert_size=4, grouping=Grouping.RANDOM)  # random: every neuron moves

sizes = st.builds(
    Sizes,
    batch=st.sampled_from((2, 3)),
    tokens=st.sampled_from((3, 4, 8)),
    width=st.sampled_from((4, 6, 8)),
    hidden=st.sampled_from((12, 16, 24)),
)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """One to three blocks, FFNs twice as likely as decoys, some of them run twice."""
    shape = draw(sizes)
    blocks = [_block(draw, f"block{index}", shape) for index in range(draw(st.sampled_from((1, 1, 2, 3))))]
    calls = [*range(len(blocks)), *draw(st.lists(st.sampled_from(range(len(blocks))), max_size=1))]
    return program(shape, blocks, calls)


def _block(draw: st.DrawFn, name: str, shape: Sizes) -> tuple[Block, str]:
    block = Block(name, shape)
    norms = ("x", f"F.layer_norm(x, ({shape.width},))", "x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)")
    x = block.let(draw(st.sampled_from(norms)))
    y = ffn(draw, block, x) if draw(st.integers(0, 2)) else decoy(draw, block, x, "z")
    return block, draw(st.sampled_from((f"x + {y}", y)))


def check(example: Program, by_export: bool) -> None:
    """The sites found are those written; the rewritten model in its dense stage computes the same."""
    model, inputs = example.build(), example.inputs()
    graph = fx.symbolic_trace(model)
    found = find_ffns(capture_by_export(model, Call(inputs, {})) if by_export else capture(graph, inputs))
    reasons = "\n".join(f"  {r.parameter or r.node}: {r.reason}" for r in found.rejections)
    missed = [expected for expected in example.expected if not any(map(expected.describes, found.sites))]
    false = [site for site in found.sites if not any(expected.describes(site) for expected in example.expected)]
    assert not missed, f"missed {missed}\nrefused:\n{reasons}"
    assert not false, f"found {false}, which is no FFN"
    assert len(found.matches) == example.places
    if found.sites:
        check_function_is_kept(example, graph, found.sites)


@torch.no_grad()
def check_function_is_kept(example: Program, graph: fx.GraphModule, sites: tuple[FfnSite, ...]) -> None:
    """Neurons can be reordered in every example; routers are inserted, which takes longer, in one of ten."""
    inputs = example.inputs()
    before = graph(*inputs)
    if crc32(example.source.encode()) % 10 == 0:
        transform(graph, CONFIG, inputs)
        assert len(list(routers(graph))) == len(sites)
    else:
        for site in sites:
            permute_neurons(graph, site, torch.randperm(site.hidden))
    assert (graph(*inputs) - before).abs().max() <= TOLERANCE * (1 + before.abs().max())


SETTINGS = settings(deadline=None, database=None, print_blob=False, suppress_health_check=list(HealthCheck))


@seed(0)
@settings(SETTINGS, max_examples=475)
@given(programs())
def test_generated_models(example: Program) -> None:
    check(example, by_export=False)


@seed(0)
@settings(SETTINGS, max_examples=25)
@given(programs())
def test_generated_models_exported(example: Program) -> None:
    check(example, by_export=True)


@pytest.mark.slow
@seed(1)
@settings(SETTINGS, max_examples=9500)
@given(programs())
def test_ten_thousand_generated_models(example: Program) -> None:
    check(example, by_export=False)


@pytest.mark.slow
@seed(1)
@settings(SETTINGS, max_examples=500)
@given(programs())
def test_ten_thousand_generated_models_exported(example: Program) -> None:
    check(example, by_export=True)
