"""The part of Triton Inference Server's message ModelConfig that exports use, to parse config.pbtxt with.

Field names, labels and types are those of model_config.proto in triton-inference-server/common; numbers do not occur
in text. Where `tritonclient` is installed, tests parse with its full schema as well.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import (  # type: ignore[import-untyped]
    descriptor_pb2,
    descriptor_pool,
    message_factory,
    text_format,
)

_Field = descriptor_pb2.FieldDescriptorProto
_INT64, _INT32, _STRING = _Field.TYPE_INT64, _Field.TYPE_INT32, _Field.TYPE_STRING

_ENUMS = {
    "DataType": ("TYPE_INVALID", "TYPE_BOOL", "TYPE_INT32", "TYPE_INT64", "TYPE_FP16", "TYPE_FP32", "TYPE_FP64")
    + ("TYPE_BF16",),
    "Kind": ("KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"),
}
_MESSAGES: dict[str, dict[str, Any]] = {
    "ModelTensorReshape": {"shape": [_INT64]},
    "ModelTensor": {"name": _STRING, "data_type": "DataType", "dims": [_INT64], "reshape": "ModelTensorReshape"},
    "ModelInstanceGroup": {"kind": "Kind", "count": _INT32},
    "ModelOperations": {"op_library_filename": [_STRING]},
    "ModelConfig": {
        "name": _STRING,
        "backend": _STRING,
        "max_batch_size": _INT32,
        "input": ["ModelTensor"],
        "output": ["ModelTensor"],
        "instance_group": ["ModelInstanceGroup"],
        "model_operations": "ModelOperations",
    },
}


def parse_model_config(text: str) -> Any:
    """The message that `text` spells; a ParseError where the schema does not allow it."""
    return text_format.Parse(text, _message_class()())


def _message_class() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="model_config_subset.proto", package="subset", syntax="proto3")
    for name, values in _ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, (field, kind) in enumerate(fields.items(), start=1):
            message.field.append(_field(field, number, kind))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("subset.ModelConfig"))


def _field(name: str, number: int, kind: Any) -> descriptor_pb2.FieldDescriptorProto:
    repeated, kind = isinstance(kind, list), kind[0] if isinstance(kind, list) else kind
    field = _Field(name=name, number=number, label=_Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL)
    if isinstance(kind, str):
        field.type = _Field.TYPE_ENUM if kind in _ENUMS else _Field.TYPE_MESSAGE
        field.type_name = f".subset.{kind}"
    else:
        field.type = kind
    return field
