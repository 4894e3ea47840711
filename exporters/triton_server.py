"""config.pbtxt: how NVIDIA Triton Inference Server serves an ONNX file with its onnxruntime backend.

The format is the message ModelConfig of
https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto, as protobuf text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

from lte_compile.exporters.interface import Interface, TensorSpec

CONFIG_NAME: Final = "config.pbtxt"
# Triton looks for <model>/<version>/model.onnx.
VERSION_FOLDER: Final = "1"

# Where instances run. "auto" is a GPU where the server has one, else the CPU.
INSTANCE_KINDS: Final[Mapping[str, str]] = {"auto": "KIND_AUTO", "cpu": "KIND_CPU", "cuda": "KIND_GPU"}

_DATA_TYPES: Final[Mapping[str, str]] = {
    "FLOAT": "TYPE_FP32",
    "FLOAT16": "TYPE_FP16",
    "BFLOAT16": "TYPE_BF16",
    "DOUBLE": "TYPE_FP64",
    "INT64": "TYPE_INT64",
    "INT32": "TYPE_INT32",
    "BOOL": "TYPE_BOOL",
}


def model_config(name: str, interface: Interface, *, device: str = "auto", library: str | None = None) -> str:
    """The text of config.pbtxt.

    `max_batch_size` is 0, which to Triton means that shapes are given whole: the batch axis is one of `dims`, and so
    files whose inputs have other first axes need no special case. Dynamic axes are -1.

    Args:
        name: of the model, which must be the name of its folder.
        device: where instances run: "auto", "cpu" or "cuda".
        library: path, on the server, of a library of `SparseFFN` kernels; Triton hands it to dlopen as it is.

    Raises:
        ValueError: an unknown device, or an element type that Triton does not know.
    """
    if device not in INSTANCE_KINDS:
        raise ValueError(f"device must be one of {', '.join(INSTANCE_KINDS)}; got {device!r}")
    lines = [f"name: {_quoted(name)}", 'backend: "onnxruntime"', "max_batch_size: 0"]
    lines += [_tensor("input", spec) for spec in interface.inputs]
    lines += [_tensor("output", spec) for spec in interface.outputs]
    lines.append(f"instance_group {{ count: 1 kind: {INSTANCE_KINDS[device]} }}")
    if library is not None:
        lines.append(f"model_operations {{ op_library_filename: {_quoted(library)} }}")
    return "\n".join(lines) + "\n"


def _tensor(role: str, spec: TensorSpec) -> str:
    if spec.kind not in _DATA_TYPES:
        raise ValueError(f"Triton has no data type for {spec.name}, which is {spec.kind}")
    dims = [dim if isinstance(dim, int) else -1 for dim in spec.dims]
    shape = f"dims: {dims}" if dims else "dims: [1] reshape { }"  # a number is a tensor without axes, which dims is not
    return f"{role} {{ name: {_quoted(spec.name)} data_type: {_DATA_TYPES[spec.kind]} {shape} }}"


def _quoted(text: str) -> str:
    """A protobuf string literal; JSON's escapes are among protobuf's."""
    return json.dumps(text, ensure_ascii=False)
