"""Tokens per second of a trained decoder, dense and sparse: the measured density turned into time.

    lte-compile compare ... --out runs/compared --keep-models
    python -m benchmarks.trained_speed runs/compared/models/lte-0.3-seed0 --task prose

Batch 1 and a static KV cache under torch.compile with CUDA graphs on both sides, as benchmarks.end_to_end; the model
reads text of the task's test split that it has not seen, at its own thresholds and at other densities of the knob.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

import lte_compile as lte
from benchmarks.decode import device_facts, write
from benchmarks.end_to_end import DTYPE, PROMPT, WARM_UP, Decoder, Measurement, Step, compiled, table
from lte_compile.data.tasks import load_corpus
from lte_compile.layouts import set_layout
from lte_compile.tracing import site_names


def measure(directory: Path, task: str, tokens: int, densities: Sequence[float], console: Console) -> dict[str, Any]:
    """One checkpoint: the same weights without routers, then as trained, then at each density."""
    model = lte.load_pretrained(directory, dtype=DTYPE, device="cuda")
    assert isinstance(model, LlamaForCausalLM)
    text = max(load_corpus(task).test, key=len)
    ids = AutoTokenizer.from_pretrained(directory)(text[:20_000], return_tensors="pt")["input_ids"]
    tokens_1T = ids[:, : PROMPT + WARM_UP + tokens].to("cuda")
    rows = [_row(_reading(without_routers(model), tokens_1T), None, console)]
    set_layout(model, "neuron_major")
    lte.set_stage(model, "hard")
    decoder = _reading(model, tokens_1T)
    step = compiled(decoder, "lte")
    rows.append(_row(decoder, rows[0], console, step))
    for density in densities:
        lte.set_density(model, density)
        rows.append(_row(decoder, rows[0], console, step))
    console.print(table(directory.name, rows))
    return {"checkpoint": directory.name, "prompt": PROMPT, "tokens": tokens, "rows": [asdict(row) for row in rows]}


@torch.no_grad()
def without_routers(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A dense model of the same weights."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    dense = LlamaForCausalLM(config).to("cuda", DTYPE).eval()
    weights = model.state_dict()
    dense.load_state_dict({name: weights[name] for name in dense.state_dict()})
    dense.tie_weights()
    return dense


def _reading(model: LlamaForCausalLM, tokens_1T: Tensor) -> Decoder:
    decoder = Decoder(model, tokens_1T.shape[1] - PROMPT - WARM_UP, "cuda")
    decoder.tokens_1T = tokens_1T
    return decoder


def _row(decoder: Decoder, dense: Measurement | None, console: Console, step: Step | None = None) -> Measurement:
    started = perf_counter()
    step = step or compiled(decoder, "inductor")
    density = None if dense is None else density_read(decoder)
    decoder.latency(step)  # the first call compiles
    console.print(f"{'dense' if density is None else f'{density:.3f}'}: ready after {perf_counter() - started:.0f} s")
    latency = decoder.latency(step)
    if dense is None:
        return Measurement(None, latency, 0.0, {})
    return Measurement(density, latency, 1 - latency.median / dense.latency.median, {}, decoder.ffn_error())


@torch.no_grad()
def density_read(decoder: Decoder) -> float:
    """Share of active experts over the tokens that are timed."""
    with lte.trace_routers(decoder.model) as trace:
        decoder.model(input_ids=decoder.tokens_1T, use_cache=False)
    timed = slice(PROMPT + WARM_UP, None)
    names = site_names(decoder.model).items()
    shares = [(trace.scores(name)[timed] > router.threshold).float().mean() for router, name in names]
    return float(torch.stack(shares).mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--task", default="prose", help="the corpus whose test split is read")
    parser.add_argument("--densities", nargs="*", type=float, default=[0.5, 0.3, 0.2, 0.1])
    parser.add_argument("--tokens", type=int, default=100, help="timed tokens")
    parser.add_argument("--output", type=Path, help="also write the figures here, as JSON")
    options = parser.parse_args()
    console = Console(width=120)
    if not torch.cuda.is_available():
        console.print("benchmarks.trained_speed needs an NVIDIA GPU that torch can see")
        return 1
    device = device_facts()
    console.print(json.dumps(device))
    measured = []
    for directory in options.checkpoints:
        measured.append(measure(directory, options.task, options.tokens, options.densities, console))
        if options.output is not None:
            write(options.output, {"device": device, "dtype": str(DTYPE), "models": measured})
    return 0


if __name__ == "__main__":
    sys.exit(main())
