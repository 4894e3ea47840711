"""What was exported against the model it was exported from, on example inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn

from lte_compile.capture.dummies import dummy_inputs
from lte_compile.exporters.runtime import OrtGenerator, OrtSeq2SeqGenerator, max_abs_difference, open_session, run


@torch.no_grad()
def compare_with_torch(model: nn.Module, files: Sequence[Path], *, kv_cache: bool, library: Path | None) -> float:
    """Largest absolute difference of the first output (logits, or hidden states) on the CPU.

    Args:
        files: one, or those of an encoder and of its decoder.
        library: of `SparseFFN` kernels; without one, plain ONNX Runtime runs the files.
    """
    inputs = dummy_inputs(model)
    expected = model.eval()(**inputs).to_tuple()[0].float().numpy()
    feed = {name: value.numpy() for name, value in inputs.items()}
    sessions = [open_session(file, custom_ops=library) for file in files]
    session = sessions[0]
    if len(sessions) > 1:
        return max_abs_difference(_both(session, sessions[1], feed), expected)
    outputs = run(session, _with_empty_cache(session, feed) if kv_cache else feed)
    return max_abs_difference(outputs[session.get_outputs()[0].name], expected)


def _both(encoder: onnxruntime.InferenceSession, decoder: onnxruntime.InferenceSession, feed: dict[str, Any]) -> Any:
    generator = OrtSeq2SeqGenerator(encoder, decoder)
    target = feed.pop("decoder_input_ids")
    past = generator.empty_cache(len(target))
    logits, _ = generator.step(target, feed.get("attention_mask"), generator.read(feed), past)
    return logits


def _with_empty_cache(session: onnxruntime.InferenceSession, feed: Mapping[str, Any]) -> dict[str, Any]:
    decoder = OrtGenerator(session)
    batch, tokens = feed["input_ids"].shape
    filled = {"position_ids": np.arange(tokens)[None].repeat(batch, axis=0), **feed}
    past = {cache.name: cache.empty(batch) for cache in decoder.caches}
    return {name: value for name, value in filled.items() if name in decoder.input_names} | past
