"""ExportedProgram to ONNX file: `lte::sparse_ffn` becomes `lte::SparseFFN`, everything else standard operators."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import onnx
import onnx_ir as ir
import torch

from lte_compile.exporters.decompose import find_masked_dense, to_standard_ops
from lte_compile.exporters.files import staging
from lte_compile.exporters.function import MIN_OPSET
from lte_compile.exporters.nodes import attach_functions, bake_weights, describe, name_nodes, sparse_nodes
from lte_compile.exporters.report import OnnxReport
from lte_compile.exporters.rotary import expand_rotary_caches
from lte_compile.exporters.translate import translation_table
from lte_compile.passes.ir import PassReport, Rejection

# Opset 23 has Attention, RMSNormalization and RotaryEmbedding as operators, which runtimes map to fused kernels; torch
# writes nothing later natively.
DEFAULT_OPSET: Final = 23
OPSETS: Final = range(MIN_OPSET, DEFAULT_OPSET + 1)

# A protobuf message is limited to 2 GiB; leave room for the graph beside the weights.
EXTERNAL_DATA_ABOVE: Final = 2**31 - 2**28

# Written by torch's exporter into every node: source paths of the exporting machine, and the program's own text.
_PRIVATE_METADATA: Final = ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node")


def export_program(
    program: torch.export.ExportedProgram,
    path: str | Path,
    *,
    opset: int = DEFAULT_OPSET,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    axis_names: Sequence[Mapping[int, str]] | None = None,
    strip_prefix: str = "",
    passes: Sequence[PassReport] = (),
) -> OnnxReport:
    """Write `program` to `path`, checked by onnx.checker.

    The file carries the definition of its `SparseFFN` nodes in standard operators, so any ONNX runtime runs it. Nodes
    are named after their site. Weights above 2 GB go to `<path>.data` next to it.

    Args:
        program: may hold any `lte` op. Passes edit it with `lte_compile.passes.exported.rewrite_exported`.
        opset: 20 to 23.
        input_names, output_names: names of the flat inputs and outputs; by default the program's.
        axis_names: per flat input, the names of its dynamic axes.
        strip_prefix: a wrapper module's prefix to leave out of parameter and site names.
        passes: reports of the passes that ran on the program; their refusals explain the masked-dense FFNs.

    Raises:
        ValueError: opset out of range, or `path` cannot be written (before any work is done).
    """
    path = Path(path)
    check_opset(opset)
    with staging(path) as folder:
        refusals = [refusal for report in passes for refusal in report.refusals]
        masked_dense = tuple(_without_prefix(r, strip_prefix) for r in find_masked_dense(program, refusals))
        exported = _translate(program, opset, input_names, output_names, axis_names)
        model = _finish(exported, opset, strip_prefix)
        has_data = _save(model, folder / path.name)
        onnx.checker.check_model(str(folder / path.name), full_check=True)
    return OnnxReport(
        path=path,
        data=_data_path(path) if has_data else None,
        opset=opset,
        inputs=tuple(str(value.name) for value in model.graph.inputs),
        outputs=tuple(str(value.name) for value in model.graph.outputs),
        sparse=tuple(describe(node) for node in sparse_nodes(model)),
        masked_dense=masked_dense,
        passes=tuple(passes),
    )


def check_opset(opset: int) -> None:
    """ValueError unless `opset` is one that this exporter writes."""
    if opset not in OPSETS:
        raise ValueError(f"opset must be one of {', '.join(map(str, OPSETS))}; got {opset!r}")


def _translate(
    program: torch.export.ExportedProgram,
    opset: int,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
    axis_names: Sequence[Mapping[int, str]] | None,
) -> torch.onnx.ONNXProgram:
    with _quiet_exporter():
        exported = torch.onnx.export(
            to_standard_ops(program),
            dynamo=True,
            opset_version=opset,
            input_names=input_names,
            output_names=output_names,
            dynamic_shapes=None if axis_names is None else list(axis_names),
            custom_translation_table=translation_table(),
            optimize=False,  # nodes are named after the weights they read, which the optimizer renames
            verbose=False,
        )
    if exported is None:
        raise RuntimeError("torch.onnx.export returned nothing; it does so only when given a file")
    return exported


def _without_prefix(rejection: Rejection, prefix: str) -> Rejection:
    name = rejection.parameter
    return rejection if name is None else replace(rejection, parameter=name.removeprefix(prefix))


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without torch's notes on optional packages, axes that share a name and its own deprecations; errors pass."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="# The axis name")
            warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _finish(exported: torch.onnx.ONNXProgram, opset: int, strip_prefix: str) -> ir.Model:
    """From torch's literal translation to the model that is written."""
    for value in list(exported.model.graph.initializers.values()):
        value.name = str(value.name).removeprefix(strip_prefix)
    name_nodes(exported.model)
    bake_weights(exported.model)
    exported.optimize()
    model = exported.model
    expand_rotary_caches(model)
    attach_functions(model, opset)
    for node in model.graph.all_nodes():
        for key in _PRIVATE_METADATA:
            node.metadata_props.pop(key, None)
    model.producer_name, model.producer_version = "lte_compile", _own_version()
    sites = {node.name: asdict(node) for node in map(describe, sparse_nodes(model))}
    model.metadata_props["lte_compile.sites"] = json.dumps(sites)
    return model


def _own_version() -> str:
    try:
        return version("lte-compile")
    except PackageNotFoundError:  # a source tree that was put on the path, not installed
        return "unknown"


def _data_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.data")


def _save(model: ir.Model, path: Path) -> bool:
    """Write the model; True if its weights went to a second file."""
    values = [value.const_value for value in model.graph.initializers.values()]
    is_large = sum(value.nbytes for value in values if value is not None) > EXTERNAL_DATA_ABOVE
    ir.save(model, path, external_data=_data_path(path).name if is_large else None)
    return is_large
