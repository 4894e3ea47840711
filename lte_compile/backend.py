"""torch.compile(model, backend="lte"): routed FFNs become lte ops, then inductor compiles the graph.

Dynamo traces a transformed model into a graph that holds router, selection and anchor of every FFN. This backend fuses
each into lte.expert_ffn, in inference further into lte.sparse_ffn, and hands the graph on. It works before AOTAutograd:
afterwards hidden values saved for the backward pass would look like a second use.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from lte_compile.backend_options import Compiled, parse_options
from lte_compile.kernels.layout import is_neuron_major
from lte_compile.passes.anchors import arguments, is_lte, level_of, lte_name
from lte_compile.passes.copying import copy_graph_module
from lte_compile.passes.dataflow import CONSTANT_KEY
from lte_compile.passes.fuse import FuseExperts
from lte_compile.passes.fuse_features import FuseFeatures
from lte_compile.passes.ir import CapturedGraph, Level, Pass, PassReport
from lte_compile.passes.lower import LowerSparse
from lte_compile.passes.pipeline import run_pipeline

_NOTHING_ROUTED = (
    "backend 'lte' found no routed FFN and compiles the model as it is; "
    "lte_compile.transform(model) routes a model's FFNs"
)
_SLOW_LAYOUT = (
    "the weights of a sparse FFN are not stored neuron after neuron, so selecting experts saves little; "
    "lte_compile.set_layout(model, 'neuron_major') before compiling stores them so"
)


def lte_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """The function torch.compile calls with each graph it traced; registered under the name "lte".

        model = torch.compile(model, backend="lte")
        model = torch.compile(model, backend="lte", mode="reduce-overhead")
        model = torch.compile(model, backend="lte", options={"compiler": "aot_eager"})
        model = torch.compile(model, backend="lte", options={"fallback": "refuse"})

    Graphs that need gradients keep lte.expert_ffn, whose gates pass gradients to the router; graphs traced under
    torch.no_grad() or without trainable inputs get lte.sparse_ffn where the selection rule is "threshold".

    Args:
        mode: one of inductor's (`torch._inductor.list_mode_options()`), for compiler "inductor" only.
        options: {"compiler": "inductor" | "aot_eager" | "eager", "lower": bool, "fallback": "allow" | "refuse"}, see
            `lte_compile.backend_options.BackendOptions`; and inductor's own, such as {"max_autotune": True}.

    Raises:
        ValueError: an unknown option, compiler or mode.
        RuntimeError: a routed FFN stays in reference form, and fallback is "refuse".
    """
    chosen = parse_options(options or {}, mode)
    rewritten, reports = rewrite_graph(gm, example_inputs, lower=chosen.lower)
    if chosen.fallback == "refuse":
        _refuse_fallbacks(reports)
    if not _has_lte_nodes(rewritten) and any(isinstance(value, nn.Parameter) for value in example_inputs):
        warnings.warn(_NOTHING_ROUTED, stacklevel=2)
    if _reads_across_neurons(rewritten, example_inputs):
        warnings.warn(_SLOW_LAYOUT, stacklevel=2)
    compiled: Compiled = chosen.compile_with()(rewritten, list(example_inputs))
    return compiled


def _refuse_fallbacks(reports: Sequence[PassReport]) -> None:
    left = [f"{refusal.parameter or refusal.node}: {refusal.reason}" for r in reports for refusal in r.refusals]
    if left:
        raise RuntimeError(f"fallback='refuse', and {len(left)} routed FFNs cannot be lowered: {'; '.join(left)}")


def _reads_across_neurons(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> bool:
    given = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
    lowered = [node for node in gm.graph.nodes if is_lte(node) and lte_name(node) == "sparse_ffn"]
    downs = [given.get(arguments(node)["w_down"]) for node in lowered]
    return any(isinstance(w, nn.Parameter) and w.dim() == 2 and not is_neuron_major(w) for w in downs)


def _has_lte_nodes(gm: fx.GraphModule) -> bool:
    """Also inside of checkpointed regions, which Dynamo keeps as graphs of their own."""
    graphs = (module.graph for module in gm.modules() if isinstance(module, fx.GraphModule))
    return any(is_lte(node) for graph in graphs for node in graph.nodes)


def rewrite_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, lower: bool = True
) -> tuple[fx.GraphModule, tuple[PassReport, ...]]:
    """A rewritten copy of a graph from Dynamo, which reads its own again later; no reports where nothing is routed."""
    passes: tuple[Pass, ...] = (FuseExperts(),)
    if lower and not _needs_gradients(example_inputs):
        passes += (LowerSparse(), FuseFeatures())
    copied = _clone(gm)
    return copied, _run_passes(copied, _parameters(copied, example_inputs), passes)


def _run_passes(gm: fx.GraphModule, parameters: Mapping[str, str], passes: Sequence[Pass]) -> tuple[PassReport, ...]:
    """Rewrites `gm` in place, and copies of the graphs it calls: Dynamo keeps a checkpointed layer as one."""
    graph = CapturedGraph(module=gm, parameters=parameters, route="dynamo")
    reports = run_pipeline(graph, passes) if level_of(graph) is Level.ROUTED else ()
    for node in gm.graph.find_nodes(op="get_attr"):
        called = getattr(gm, str(node.target), None)
        call = next(iter(node.users), None)
        if not isinstance(called, fx.GraphModule) or call is None or call.args[:1] != (node,):
            continue
        inner = copy_graph_module(called)
        given = zip(inner.graph.find_nodes(op="placeholder"), call.args[1:], strict=False)
        names = {p.name: parameters[a.name] for p, a in given if isinstance(a, fx.Node) and a.name in parameters}
        setattr(gm, str(node.target), inner)
        reports += _run_passes(inner, names, passes)
    return reports


def _needs_gradients(example_inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in example_inputs)


def _clone(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph over the same module state, with what Dynamo wrote on it for AOTAutograd."""
    copy = copy_graph_module(gm)
    for original, copied in _pairs(gm.graph, copy.graph):
        if hasattr(original, "_dynamo_source"):
            copied._dynamo_source = original._dynamo_source
    if hasattr(gm, "_param_name_to_source"):
        copy._param_name_to_source = gm._param_name_to_source
    return copy


def _pairs(original: fx.Graph, copied: fx.Graph) -> zip[tuple[fx.Node, fx.Node]]:
    return zip(original.find_nodes(op="placeholder"), copied.find_nodes(op="placeholder"), strict=True)


def _parameters(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> dict[str, str]:
    """Names of the parameters and buffers among the inputs, by placeholder; one name per tensor and vice versa."""
    names: dict[str, str] = {}
    owner_of: dict[str, int] = {}
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        name = _state_name(node, value)
        if name is None:
            continue
        if owner_of.setdefault(name, id(value)) != id(value):  # two models in one graph may use one name
            name = node.name
        names[node.name] = name
        if value.numel() == 1:
            node.meta[CONSTANT_KEY] = value
    return names


def _state_name(node: fx.Node, value: Any) -> str | None:
    """`model.layers.0.mlp.up_proj.weight` for L['self']._modules['model'] ... ._parameters['weight']."""
    if not isinstance(value, Tensor):
        return None
    source = getattr(node, "_dynamo_source", None)
    written = "" if source is None else str(source.name() if callable(source.name) else source.name)
    if "._parameters[" in written or "._buffers[" in written:
        return ".".join(re.findall(r"\._(?:modules|parameters|buffers)\['([^']+)'\]", written))
    return node.name if isinstance(value, nn.Parameter) else None
