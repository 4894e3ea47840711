"""What an ONNX file takes and gives: names, element types and shapes, read without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx

# A size, the name of a dynamic axis, or None where the file says nothing.
Dim = int | str | None


@dataclass(frozen=True)
class TensorSpec:
    """One input or output; `kind` is ONNX's name of its element type, such as FLOAT16."""

    name: str
    kind: str
    dims: tuple[Dim, ...]


@dataclass(frozen=True)
class Interface:
    """Every input and output of a file, in the file's order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def input(self, name: str) -> TensorSpec | None:
        """The input of that name, if there is one."""
        return next((spec for spec in self.inputs if spec.name == name), None)

    def output(self, name: str) -> TensorSpec | None:
        """The output of that name, if there is one."""
        return next((spec for spec in self.outputs if spec.name == name), None)


def read_interface(path: str | Path) -> Interface:
    """The interface of the model at `path`.

    Raises:
        ValueError: an input or output is no tensor of known rank.
    """
    graph = onnx.load(str(path), load_external_data=False).graph
    return Interface(tuple(map(_spec, graph.input)), tuple(map(_spec, graph.output)))


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not tensor.HasField("shape"):
        raise ValueError(f"{value.name} is no tensor of known rank; export it with torch's shapes in place")
    kind = onnx.TensorProto.DataType.Name(tensor.elem_type)
    return TensorSpec(value.name, kind, tuple(_dim(dim) for dim in tensor.shape.dim))


def _dim(dim: onnx.TensorShapeProto.Dimension) -> Dim:
    if dim.HasField("dim_value"):
        return int(dim.dim_value)
    return str(dim.dim_param) or None
