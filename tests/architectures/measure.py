"""Measuring one row of the zoo: sites by route, then what the transformed model still does."""

from __future__ import annotations

import copy
import inspect
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from lte_compile.capture.capture import Call, capture_by_dynamo, capture_by_export, capture_graph_module
from lte_compile.config import TransformConfig
from lte_compile.exporters.runtime import open_session
from lte_compile.exporters.runtime import run as run_onnx
from lte_compile.passes.ir import CapturedGraph
from lte_compile.passes.match import find_ffns
from lte_compile.routing.router import routers
from lte_compile.serving.onnx_file import export_onnx
from lte_compile.transform import transform
from tests.architectures.row import Inputs, Row

EXPERT_SIZE = 16
NEW_TOKENS = 4
FX_ERRORS = (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError, fx.proxy.TraceError)


@dataclass(frozen=True)
class Sites:
    """What one route found: down weights of FFNs and of native experts; `obstacle` says why a route is not open."""

    ffn: frozenset[str] = frozenset()
    native: frozenset[str] = frozenset()
    obstacle: str = ""


@dataclass(frozen=True)
class Measured:
    """One line of the table. None where a check does not apply: no FFN or generate(), no export, ONNX not wanted."""

    name: str
    expected: frozenset[str]
    expected_native: frozenset[str]
    routes: dict[str, Sites]
    dense_error: float | None = None
    generates: bool | None = None
    export_error: float | None = None
    onnx_error: float | None = None

    @property
    def wrong_routes(self) -> dict[str, tuple[set[str], set[str]]]:
        """(missed, false) down weights of every open route that is not exact."""
        truth = self.expected | self.expected_native
        found = {route: sites.ffn | sites.native for route, sites in self.routes.items() if not sites.obstacle}
        return {route: (set(truth - names), set(names - truth)) for route, names in found.items() if names != truth}


def measure(row: Row) -> Measured:
    """Everything about one row. The model is built once; the transformed one is a copy."""
    model, inputs = build(row)
    routes = {"export": by_export(row, model, inputs), "dynamo": by_dynamo(model, inputs), "fx": by_fx(model, inputs)}
    line = Measured(row.name, row.expected, row.expected_native, routes)
    if not row.expected:
        return line
    reference = run(model, inputs)
    texts = generated(model, inputs)
    transform(model, TransformConfig(expert_size=EXPERT_SIZE), inputs)
    assert {router.site.down for router in routers(model)} == row.expected
    dense = run(model, inputs)
    return Measured(
        row.name,
        row.expected,
        row.expected_native,
        routes,
        dense_error=relative_error(dense, reference),
        generates=None if texts is None else torch.equal(texts, _not_none(generated(model, inputs))),
        export_error=export_error(model, inputs, dense) if row.exportable else None,
        onnx_error=onnx_error(model, inputs) if row.onnx else None,
    )


def build(row: Row) -> tuple[nn.Module, Inputs]:
    """The row's model in eval mode, weights from a fixed seed, biases away from zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = row.build()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
    return model.to(row.dtype).eval(), _in_dtype(inputs, row.dtype)


def _in_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}


def _not_none(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def _sites_in(graphs: Iterable[CapturedGraph]) -> Sites:
    searches = [find_ffns(graph) for graph in graphs]
    ffn = {site.down for search in searches for site in search.sites}
    native = {match.site.down for search in searches for match in search.native_moe}
    return Sites(frozenset(ffn), frozenset(native))


def by_export(row: Row, model: nn.Module, inputs: Inputs) -> Sites:
    if not row.exportable:
        return Sites(obstacle="looks at its data")
    return _sites_in([capture_by_export(model, Call((), dict(inputs)))])


def by_dynamo(model: nn.Module, inputs: Inputs) -> Sites:
    return _sites_in(capture_by_dynamo(model, Call((), dict(inputs))))


def by_fx(model: nn.Module, inputs: Inputs) -> Sites:
    """torch.fx.symbolic_trace of the whole model. Most transformers models branch on inputs, which it cannot follow."""
    try:
        traced = fx.symbolic_trace(model)
    except FX_ERRORS as error:
        return Sites(obstacle=_first_words(error))
    leaves = [traced.get_submodule(str(node.target)) for node in traced.graph.find_nodes(op="call_module")]
    if whole := [leaf for leaf in leaves if any(True for _ in leaf.children())]:
        return Sites(obstacle=f"keeps {type(whole[0]).__name__} whole")
    return _sites_in([capture_graph_module(traced, inputs)])


def _first_words(error: Exception) -> str:
    """The error in a few words: the table says why a model cannot be traced."""
    text = str(error).splitlines()[0] if str(error) else ""
    kinds = {
        "control flow": "branches on its input",
        "co_varnames": "takes **kwargs",
        "iterated": "iterates over its input",
        "both input_ids and inputs_embeds": "branches on its input",
        "exactly one of": "branches on its input",
    }
    return next((words for key, words in kinds.items() if key in text), f"{type(error).__name__}: {text[:60]}")


@torch.no_grad()
def run(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Every floating tensor of the model's output by name, caches aside. Some models draw random numbers (ViLT)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _tensors(model(**inputs, **_no_cache(model)))


def _no_cache(model: nn.Module) -> dict[str, Any]:
    """Off where the model's configuration has it on, also that of a part of it (T5Gemma's decoder)."""
    on = getattr(getattr(model, "config", None), "use_cache", False) is True
    return {"use_cache": False} if on or "use_cache" in inspect.signature(model.forward).parameters else {}


def _tensors(output: Any) -> dict[str, Tensor]:
    items = (
        output.items() if hasattr(output, "items") else enumerate([output] if isinstance(output, Tensor) else output)
    )
    tensors = {str(key): value for key, value in items if isinstance(value, Tensor) and value.numel()}
    return {key: value for key, value in tensors.items() if value.is_floating_point()}


def relative_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of any output, relative to that output's largest value."""
    assert actual.keys() == expected.keys()
    assert expected
    return max(_relative(actual[key], expected[key]) for key in expected)


def _relative(actual: Tensor, expected: Tensor) -> float:
    finite = expected.isfinite()
    assert torch.equal(finite, actual.isfinite())
    scale = expected[finite].abs().max().clamp_min(1e-30)
    return float((actual[finite] - expected[finite]).abs().max() / scale)


def generated(model: nn.Module, inputs: Inputs) -> Tensor | None:
    """Greedy tokens with the model's own cache; None for models that do not generate."""
    can = getattr(model, "can_generate", None)
    if can is None or not can():
        return None
    given = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
    with torch.no_grad():
        tokens = model.generate(**given, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)  # type: ignore[operator]
    assert isinstance(tokens, Tensor)
    return tokens


@torch.no_grad()
def export_error(model: nn.Module, inputs: Inputs, expected: dict[str, Tensor]) -> float:
    """torch.export of the transformed model against the model itself."""
    program = torch.export.export(model, (), {**inputs, **_no_cache(model)}, strict=False)
    return relative_error(_tensors(program.module()(**inputs, **_no_cache(model))), expected)


def onnx_error(model: nn.Module, inputs: Inputs) -> float:
    """The ONNX file of the transformed model in plain ONNX Runtime against the model, in float32."""
    single = copy.deepcopy(model).float()
    inputs = _in_dtype(inputs, torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(single, path, example_inputs=inputs, dynamic_axes="none")
        outputs = run_onnx(open_session(path), {name: value.numpy() for name, value in inputs.items()})
    first, *_ = outputs.values()
    expected, *_ = run(single, inputs).values()
    return _relative(torch.from_numpy(first), expected)
