"""A decoder's file at fixed sizes: one token is one CUDA graph in ONNX Runtime. benchmarks/ort_cuda.py measures it.

The file is the one that benchmarks/ort_decoder.py runs. Its free axes are set when the session is made: one new token
and a cache of `LENGTH` slots, of which the mask says which are in use. Attention does not mind the order of slots, as
keys carry their positions: a token's key and value are copied from the end of what the model puts out into a free slot.
Shape suffixes: N tensors of the cache, B batch, H key/value heads, P slots, K head width, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from benchmarks.ort_decoder import DENSITIES, DTYPE, PROMPT, decoder_path, drawn_tokens, open_session

LENGTH = 255  # slots; a round number with the new token, and more than the texts need
TEXTS = 3


@dataclass(frozen=True)
class Buffers:
    """Where a session reads and writes: one address for each tensor, as a graph demands."""

    ids_BT: Tensor
    positions_BT: Tensor
    mask_BT: Tensor
    past_NBHPK: Tensor
    present_NBHPK: Tensor
    logits_BTV: Tensor


def make_buffers(session: ort.InferenceSession, device: str) -> Buffers:
    caches = [value for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    _, heads, slots, width = caches[0].shape
    one_BT = torch.zeros(1, 1, dtype=torch.int64, device=device)
    past_NBHPK = torch.zeros(len(caches), 1, heads, slots, width, dtype=DTYPE, device=device)
    vocabulary = session.get_outputs()[0].shape[2]
    return Buffers(
        ids_BT=one_BT,
        positions_BT=one_BT.clone(),
        mask_BT=one_BT.new_zeros(1, slots + 1),
        past_NBHPK=past_NBHPK,
        present_NBHPK=past_NBHPK.new_zeros(len(caches), 1, heads, slots + 1, width),
        logits_BTV=past_NBHPK.new_zeros(1, 1, vocabulary),
    )


def bind(session: ort.InferenceSession, buffers: Buffers) -> Any:
    taken, written = ([value.name for value in values] for values in (session.get_inputs(), session.get_outputs()))
    past = [name for name in taken if name.startswith("past_key_values.")]
    inputs = {"input_ids": buffers.ids_BT, "attention_mask": buffers.mask_BT, "position_ids": buffers.positions_BT}
    inputs |= dict(zip(past, buffers.past_NBHPK, strict=True))
    present = [name.replace("past_key_values.", "present.") for name in past]
    outputs = {written[0]: buffers.logits_BTV, **dict(zip(present, buffers.present_NBHPK, strict=True))}
    binding = session.io_binding()
    for bind_one, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
        for name, tensor in tensors.items():
            kind = np.float16 if tensor.is_floating_point() else np.int64
            bind_one(name, tensor.device.type, 0, kind, list(tensor.shape), tensor.data_ptr())
    return binding


class GraphDecoder:
    """Reads token after token, each one launch of a CUDA graph that the first ones captured.

    On device "cpu" the same steps run without a graph.
    """

    def __init__(self, file: Path, device: str = "cuda") -> None:
        sizes = {"batch": 1, "sequence": 1, "past_sequence": LENGTH, "total_sequence": LENGTH + 1}
        provider: dict[str, str] = {}
        self.stream = None
        if device == "cuda":
            self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            provider = {"user_compute_stream": str(self.stream.cuda_stream), "enable_cuda_graph": "1"}
        self.session = open_session(str(file), sizes, **provider)
        self.buffers = make_buffers(self.session, device)
        self.binding = bind(self.session, self.buffers)
        self.options = ort.RunOptions()
        if device == "cuda":
            self.options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def step(self, token: int, position: int) -> Tensor:
        """Logits [V] on the CPU; the token's key and value are put where the next step finds them."""
        buffers = self.buffers
        buffers.ids_BT.fill_(token)
        buffers.positions_BT.fill_(position)
        self.session.run_with_iobinding(self.binding, self.options)
        buffers.past_NBHPK[:, :, :, position] = buffers.present_NBHPK[:, :, :, -1]
        buffers.mask_BT[:, position] = 1
        return buffers.logits_BTV[0, 0].cpu()

    def read(self, tokens: Sequence[int]) -> tuple[list[float], Tensor]:
        """Seconds of each step, and the last one's logits [V]."""
        seconds = []
        with torch.cuda.stream(self.stream):
            self.buffers.mask_BT.zero_()
            self.buffers.mask_BT[:, -1] = 1  # the new token's place
            for position, token in enumerate(tokens):
                began = perf_counter()
                logits_V = self.step(token, position)
                seconds.append(perf_counter() - began)
        return seconds, logits_V


def measure_graphs(folder: Path) -> Iterator[dict[str, Any]]:
    """In turns, as the other decoders; the time of the tokens after a prompt's length."""
    files = {density: decoder_path(folder, density) for density in (None, *DENSITIES)}
    decoders = {density: GraphDecoder(file) for density, file in files.items()}
    tokens = drawn_tokens().tolist()
    steps: dict[float | None, list[float]] = {density: [] for density in decoders}
    for turn in range(TEXTS + 1):
        for density, decoder in decoders.items():
            seconds, _ = decoder.read(tokens)
            steps[density] += seconds[PROMPT:] if turn else []  # the first turn captures
    for density, seconds in steps.items():
        token_s = median(seconds)
        kind = "dense" if density is None else "sparse"
        figures = {"token_ms": token_s * 1e3, "tokens_per_s": 1 / token_s}
        yield {"model": kind, "density": density, "cuda_graph": True, **figures}
