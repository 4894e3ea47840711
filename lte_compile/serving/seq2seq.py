"""An encoder-decoder with its cache: two ONNX files, one for the source and one for each step of the target."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from lte_compile.capture.capture import dummy_inputs
from lte_compile.exporters.axes import axis_names, widen
from lte_compile.exporters.report import OnnxReport
from lte_compile.exporters.seq2seq import CachedTarget, SourceReader, source_example, target_example
from lte_compile.routing.router import routers
from lte_compile.running.modes import eval_mode
from lte_compile.serving.onnx_file import in_dtype, write
from lte_compile.serving.programs import trace_with_cache

ENCODER_FILE: Final = "encoder_model.onnx"
DECODER_FILE: Final = "decoder_model.onnx"


def export_encoder_decoder(
    model: nn.Module, folder: Path, *, opset: int, dtype: torch.dtype | None, dense: bool
) -> tuple[OnnxReport, OnnxReport]:
    """Write both files of a transformers encoder-decoder into `folder`, with every axis dynamic.

    encoder_model.onnx takes what the encoder takes, such as input_ids and attention_mask, and gives what cross
    attention needs of it, present.N.encoder.key/value. decoder_model.onnx takes those as past_key_values.N.encoder.*,
    with input_ids, encoder_attention_mask and past_key_values.N.decoder.*, and gives logits and present.N.decoder.*.

    Raises:
        ValueError: the model has no routed FFN and `dense` is not set.
    """
    if not dense and not any(routers(model)):
        raise ValueError(f"{type(model).__name__} has no routed FFN; call lte_compile.transform(model) first")
    model = model if dtype is None else in_dtype(model, dtype)
    inputs, axes = _source_inputs(model)
    with eval_mode(model), torch.no_grad():
        source = trace_with_cache(SourceReader(model), source_example(model, inputs, axes), SourceReader.PREFIX)
        target = trace_with_cache(CachedTarget(model), target_example(model, inputs), CachedTarget.PREFIX)
    name = type(model).__name__
    # Routers may all sit on one side; the other is then written as it is.
    encoder = write(source, folder / ENCODER_FILE, opset=opset, dense=True, model=name)
    return encoder, write(target, folder / DECODER_FILE, opset=opset, dense=True, model=name)


def _source_inputs(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, dict[int, str]]]:
    """Example inputs of the encoder alone, and their dynamic axes."""
    given = {name: value for name, value in dummy_inputs(model).items() if not name.startswith("decoder_")}
    axes = axis_names(given, "batch_and_sequence")
    return {name: widen(value, axes[name]) for name, value in given.items()}, axes
