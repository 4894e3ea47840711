"""A decoder of SmolLM2-135M's shape in ONNX Runtime on a GPU, dense and sparse; benchmarks/ort_cuda.py measures it.

Random weights in float16, a KV cache and IO binding; the tokens are drawn, and the time is the wall clock's.
Shape suffixes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor

import lte_compile as lte
from benchmarks.decode import EXPERT_SIZE
from lte_compile.exporters.runtime import OrtGenerator
from lte_compile.routing.router import Router, routers
from lte_compile.serving.ort_library import ort_library_path

PROVIDER = "CUDAExecutionProvider"
DTYPE = torch.float16
DENSITIES = (1.0, 0.5, 0.3, 0.1)
VOCABULARY = 49152
PROMPT, TOKENS = 128, 64
TEXTS = 4


def open_session(model: Any, sizes: Mapping[str, int] | None = None, **provider: str) -> ort.InferenceSession:
    """`sizes` sets free axes of the model, for good."""
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(ort_library_path()))
    options.log_severity_level = 3  # no warning for each of hundreds of nodes and weights
    for name, size in (sizes or {}).items():
        options.add_free_dimension_override_by_name(name, size)
    options.intra_op_num_threads = 1  # threads that wait for work on a CPU only take time from the one that launches
    return ort.InferenceSession(model, options, providers=[(PROVIDER, provider), "CPUExecutionProvider"])


def drawn_tokens() -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, VOCABULARY, PROMPT + TOKENS)


def make_decoder(*, is_sparse: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    if not is_sparse:
        return model
    lte.transform(model, lte.TransformConfig(expert_size=EXPERT_SIZE, grouping=lte.Grouping.CONTIGUOUS))
    return lte.set_stage(model, "hard")


def set_decoder_density(model: Any, density: float) -> None:
    """Router biases at which drawn tokens select this share of the experts; each layer's before it is computed."""

    def balance(router: Router, inputs: tuple[Tensor, ...]) -> None:
        assert router.bias is not None
        logits = (inputs[0].float() @ router.weight.t()).flatten()
        router.bias.data.fill_(50.0 if density >= 1 else -float(torch.quantile(logits, 1 - density)))

    hooks = [router.register_forward_pre_hook(balance) for router in routers(model)]
    ids_BT = torch.randint(0, model.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(input_ids=ids_BT)
    for hook in hooks:
        hook.remove()


@dataclass
class Decoding:
    """A decoder and the seconds that its calls took."""

    density: float | None  # None: the dense model
    generator: OrtGenerator
    prefill: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    def text(self) -> None:
        """Times a prompt and the tokens after it."""
        ids_BT = drawn_tokens()[None]
        mask_BT = np.ones_like(ids_BT)
        past = self.generator.empty_cache(1)
        for start, end in ((0, PROMPT), *((at, at + 1) for at in range(PROMPT, PROMPT + TOKENS))):
            began = perf_counter()
            _, past = self.generator.step(ids_BT[:, start:end], mask_BT[:, :end], past)
            (self.steps if start else self.prefill).append(perf_counter() - began)

    def forget(self) -> None:
        self.prefill.clear()
        self.steps.clear()

    def figures(self) -> dict[str, Any]:
        kind = {"model": "dense" if self.density is None else "sparse", "density": self.density}
        token_s = median(self.steps)
        return {**kind, "prompt_ms": median(self.prefill) * 1e3, "token_ms": token_s * 1e3, "tokens_per_s": 1 / token_s}


def decoder_path(folder: Path, density: float | None) -> Path:
    return folder / ("dense.onnx" if density is None else f"sparse_{density}.onnx")


def export_decoder(folder: Path, density: float | None) -> None:
    """The dense decoder, or the sparse one with biases that differ: equal tensors would be written as one."""
    model = make_decoder(is_sparse=density is not None)
    for number, router in enumerate(routers(model)):
        assert router.bias is not None
        router.bias.data.fill_(number)
    lte.export_onnx(model, decoder_path(folder, density), kv_cache=True, dtype=DTYPE, dense=density is None)


def export_decoders(folder: Path) -> None:
    """Those that the folder lacks: two exports of a minute, in processes of their own; densities differ in biases."""
    kinds = (None, *DENSITIES)
    if all(decoder_path(folder, density).is_file() for density in kinds):
        return
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        list(pool.map(partial(export_decoder, folder), kinds[:2]))
    model, file = make_decoder(is_sparse=True), onnx.load(decoder_path(folder, DENSITIES[0]))
    for density in DENSITIES:
        set_decoder_density(model, density)
        replace_biases(file, model)
        onnx.save(file, decoder_path(folder, density))


def replace_biases(file: onnx.ModelProto, model: Any) -> None:
    """The routers' biases in the file become the model's."""
    written = {tensor.name: tensor for tensor in file.graph.initializer}
    for name, bias in model.named_parameters():
        if name.endswith("router.bias"):
            written[name].CopyFrom(onnx.numpy_helper.from_array(bias.detach().to(DTYPE).numpy(), name))


def measure_decoders(folder: Path) -> Iterator[dict[str, Any]]:
    """In turns, so that all meet the same state of the machine."""
    export_decoders(folder)
    files = {density: decoder_path(folder, density) for density in (None, *DENSITIES)}
    decoders = [Decoding(density, OrtGenerator(open_session(str(file)))) for density, file in files.items()]
    for decoder in decoders:
        decoder.text()
        decoder.forget()
    for _ in range(TEXTS):
        for decoder in decoders:
            decoder.text()
    yield from (decoder.figures() for decoder in decoders)
