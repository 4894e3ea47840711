"""Tokens per second of a trained decoder, dense and sparse: the measured density turned into time.

    lte-compile compare ... --out runs/compared --keep-models
    python -m benchmarks.trained_speed runs/compared/models/lte-0.3-seed0 --task prose

Batch 1 and a static KV cache under torch.compile with CUDA graphs on both sides, as benchmarks.end_to_end; the model
reads text of the task's test split that it has not seen, at its own thresholds and at other densities of the knob. Two
processes compile the dense and the sparse model side by side; when both are ready they are timed, one after the other.
`--mode max-autotune` takes minutes to compile, and finds faster products for small models, dense ones above all.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from threading import Barrier
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from transformers import AutoTokenizer, LlamaForCausalLM

import lte_compile as lte
from benchmarks.decode import device_facts, write
from benchmarks.end_to_end import DTYPE, PROMPT, WARM_UP, Decoder, Measurement, compiled, table
from benchmarks.trained import without_routers
from lte_compile.data.tasks import load_corpus
from lte_compile.rewriting.layouts import set_layout
from lte_compile.running.tracing import site_names

PATIENCE = 600  # seconds that one process waits for the other to compile


def measure(directory: Path, task: str, tokens: int, densities: Sequence[float], mode: str) -> list[Measurement]:
    """One checkpoint: the same weights without routers, then as trained, then at each density."""
    text = max(load_corpus(task).test, key=len)
    ids = AutoTokenizer.from_pretrained(directory)(text[:20_000])["input_ids"][: PROMPT + WARM_UP + tokens]
    return race(directory, ids, densities, mode)


def race(directory: Path, ids: Sequence[int], densities: Sequence[float], mode: str) -> list[Measurement]:
    context = get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(2, mp_context=context) as pool:
        turns = manager.Barrier(2, timeout=PATIENCE)
        sparse = pool.submit(time_sparse, directory, ids, densities, mode, turns)
        dense = pool.submit(time_dense, directory, ids, mode, turns).result()
        return [dense, *(saving_over(dense, row) for row in sparse.result())]


def saving_over(dense: Measurement, row: Measurement) -> Measurement:
    return Measurement(row.density, row.latency, 1 - row.latency.median / dense.latency.median, {}, row.error)


def time_dense(directory: Path, ids: Sequence[int], mode: str, turns: Barrier) -> Measurement:
    started = perf_counter()
    decoder = _reading(without_routers(_loaded(directory)), ids)
    step = compiled(decoder, "inductor", mode)
    decoder.latency(step)  # the first call compiles
    Console().print(f"dense: ready after {perf_counter() - started:.0f} s")
    turns.wait()
    row = Measurement(None, decoder.latency(step), 0.0, {})
    turns.wait()
    return row


def time_sparse(
    directory: Path, ids: Sequence[int], densities: Sequence[float], mode: str, turns: Barrier
) -> list[Measurement]:
    """At the trained thresholds, then at each density."""
    started = perf_counter()
    model = _loaded(directory)
    set_layout(model, "neuron_major")
    lte.set_stage(model, "hard")
    knob, decoder = Knob(model), _reading(model, ids)
    knob.turn(None)
    step = compiled(decoder, "lte", mode)
    decoder.latency(step)
    Console().print(f"sparse: ready after {perf_counter() - started:.0f} s")
    turns.wait()
    turns.wait()  # while the dense model is timed
    rows = []
    for density in (None, *densities):
        knob.turn(density)
        density_met = density_read(decoder)
        decoder.latency(step)
        rows.append(Measurement(density_met, decoder.latency(step), 0.0, {}, decoder.ffn_error()))
    return rows


class Knob:
    """Densities as biases: a compiled model has its thresholds in its code, its biases in memory.

    What the code is told to expect, which chooses kernels, is the density at the thresholds of now throughout.
    """

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model
        found = [(router, router.bias) for router in lte.routers(model) if router.bias is not None]
        self.trained = {r: (r.threshold, r.score_quantiles, bias_E.clone()) for r, bias_E in found}
        self.told = {router: _quantiles_of(router.expected_density) for router, _ in found}

    @torch.no_grad()
    def turn(self, density: float | None) -> None:
        """To a density, or back to the trained thresholds."""
        for router, (threshold, quantiles, _) in self.trained.items():
            router.threshold, router.score_quantiles = threshold, quantiles
        if density is not None:
            lte.set_density(self.model, density)
        for router, (_, _, bias_E) in self.trained.items():
            assert router.bias is not None
            router.bias.copy_(bias_E - torch.logit(torch.tensor(router.threshold)))
            router.threshold, router.score_quantiles = 0.5, self.told[router]


def _quantiles_of(density: float | None) -> tuple[float, ...]:
    """Scores of which the share `density` lies above .5, in whole percent; none where it is unknown."""
    if density is None:
        return ()
    above = round(100 * density)
    return (0.0,) * (100 - above) + (1.0,) * above


def _loaded(directory: Path) -> LlamaForCausalLM:
    model = lte.load_pretrained(directory, dtype=DTYPE, device="cuda")
    assert isinstance(model, LlamaForCausalLM)
    return model


def _reading(model: LlamaForCausalLM, ids: Sequence[int]) -> Decoder:
    decoder = Decoder(model, len(ids) - PROMPT - WARM_UP, "cuda")
    decoder.tokens_1T = torch.tensor([ids], device="cuda")
    return decoder


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
    parser.add_argument("--densities", nargs="*", type=float, default=[0.5, 0.3, 0.1])
    parser.add_argument("--tokens", type=int, default=100, help="timed tokens")
    parser.add_argument("--mode", default="reduce-overhead", choices=("reduce-overhead", "max-autotune"))
    parser.add_argument("--output", type=Path, help="also write the figures here, as JSON")
    options = parser.parse_args()
    console = Console(width=120)
    if not torch.cuda.is_available():
        console.print("benchmarks.trained_speed needs an NVIDIA GPU that torch can see")
        return 1
    device, models = device_facts(), list[dict[str, Any]]()
    console.print(json.dumps(device))
    for directory in options.checkpoints:
        rows = measure(directory, options.task, options.tokens, options.densities, options.mode)
        console.print(table(directory.name, rows))
        facts = {"checkpoint": directory.name, "prompt": PROMPT, "tokens": options.tokens}
        models.append(facts | {"rows": [asdict(row) for row in rows]})
        if options.output is not None:
            write(options.output, {"device": device, "dtype": str(DTYPE), "mode": options.mode, "models": models})
    return 0


if __name__ == "__main__":
    sys.exit(main())
