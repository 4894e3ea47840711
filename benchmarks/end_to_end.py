"""Latency of a whole decoder, dense against sparse: torch.compile with CUDA graphs on both sides, one token at a time.

    python -m benchmarks.end_to_end [--model LLaMA-2-7B] [--profile] [--output benchmarks/results/end_to_end.json]

Weights are random: speed does not depend on them, and router biases set the density. A static KV cache, a prompt of 128
tokens, batch 1. Tokens after the prompt are drawn, because random weights would repeat one; the density is measured on
these very tokens. FFNs of LLaMA-2-7B are 66.8 % of what a token reads, so that at density .5 no FFN kernel could save
more than 31.5 % of its latency (router and KV cache counted).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import quantiles
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import lte_compile as lte
from benchmarks.decode import device_facts, write
from lte_compile.rewriting.layouts import set_layout
from lte_compile.running.tracing import site_names

PROMPT = 128
WARM_UP = 8
DENSITIES = (1.0, 0.5, 0.3, 0.1)
DTYPE = torch.bfloat16
MAX_QUANTILE = 2**23  # torch.quantile takes 16 million numbers at most
SHAPES: dict[str, dict[str, Any]] = {
    "LLaMA-2-7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "SmolLM2-135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "tiny": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4},
}

Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Latency:
    """Milliseconds a token: median, 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Measurement:
    density: float | None  # measured; None for the dense model
    latency: Latency
    saved: float  # share of the dense model's latency
    kernels: dict[str, float]  # microseconds a token of the kernels that take longest together
    error: float | None = None  # of an FFN's output, see Decoder.ffn_error


class Decoder:
    """A model with a static cache, fed with drawn tokens."""

    def __init__(self, model: LlamaForCausalLM, tokens: int, device: str) -> None:
        self.model = model
        self.tokens_1T = torch.randint(0, model.config.vocab_size, (1, PROMPT + WARM_UP + tokens), device=device)
        self.cache = StaticCache(config=model.config, max_cache_len=self.tokens_1T.shape[1])
        self.checked: dict[nn.Module, Step] = {}  # FFNs compiled for `ffn_error`, once for all densities

    @torch.no_grad()
    def prefill(self) -> None:
        self.cache.reset()
        self.model(input_ids=self.tokens_1T[:, :PROMPT], past_key_values=self.cache, use_cache=True)

    @torch.no_grad()
    def step(self, token_11: Tensor) -> Tensor:
        """Logits after one more token."""
        logits: Tensor = self.model(input_ids=token_11, past_key_values=self.cache, use_cache=True).logits
        return logits[:, -1]

    @torch.no_grad()
    def latency(self, step: Step) -> Latency:
        self.prefill()
        marks = [torch.cuda.Event(enable_timing=True)]  # type: ignore[no-untyped-call]
        for position in range(PROMPT, self.tokens_1T.shape[1]):
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            step(self.tokens_1T[:, position : position + 1].clone())
            marks.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
            marks[-1].record()
        torch.cuda.synchronize()
        times = [
            before.elapsed_time(after) for before, after in zip(marks[WARM_UP:], marks[WARM_UP + 1 :], strict=False)
        ]
        tenths = quantiles(times, n=10)
        return Latency(tenths[4], tenths[1], tenths[7])

    @torch.no_grad()
    def ffn_error(self) -> float:
        """Largest relative difference of an FFN's output, as compiled against eager, for the first token after the
        prompt. Logits would say nothing: one score that rounding moves over the threshold changes all later layers."""
        seen: dict[nn.Module, Tensor] = {}
        ffns = [layer.mlp for layer in self.model.model.layers][:: max(1, len(self.model.model.layers) // 4)]
        hooks = [ffn.register_forward_pre_hook(lambda module, args: seen.update({module: args[0]})) for ffn in ffns]
        self.prefill()
        self.step(self.tokens_1T[:, PROMPT : PROMPT + 1])
        for hook in hooks:
            hook.remove()
        errors = []
        for ffn in ffns:
            if ffn not in self.checked:
                options: dict[str, Any] = {"compiler": "eager", "fallback": "refuse"}
                self.checked[ffn] = torch.compile(ffn, backend="lte", options=options)
            expected = ffn(seen[ffn]).double()
            errors.append(float((self.checked[ffn](seen[ffn]).double() - expected).norm() / expected.norm()))
        return max(errors)


@torch.no_grad()  # as when the step was compiled
def kernel_times(decoder: Decoder, step: Step, tokens: int = 4, listed: int = 12) -> dict[str, float]:
    """Where a token's time goes, by kernel name, launches of a name added up."""
    decoder.prefill()
    torch.cuda.synchronize()  # the prompt's kernels are not a token's
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for position in range(PROMPT, PROMPT + tokens):
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            step(decoder.tokens_1T[:, position : position + 1].clone())
        torch.cuda.synchronize()
    found = sorted(profiler.key_averages(), key=lambda entry: -entry.self_device_time_total)
    return {entry.key[:90]: round(entry.self_device_time_total / tokens, 1) for entry in found[:listed]}


def build(name: str, device: str) -> LlamaForCausalLM:
    config = LlamaConfig(**SHAPES[name], dtype=DTYPE, max_position_embeddings=4096)
    with torch.device(device):
        torch.set_default_dtype(DTYPE)
        try:
            return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)


def make_sparse(model: LlamaForCausalLM) -> None:
    """Routers in, weights neuron-major, hard stage. Grouping changes no latency, so neurons stay where they are."""
    lte.transform(model, lte.TransformConfig(grouping=lte.Grouping.CONTIGUOUS))
    for router in lte.routers(model):
        nn.init.normal_(router.weight, std=router.weight.shape[1] ** -0.5)
    set_layout(model, "neuron_major")
    lte.set_stage(model, "hard")


@torch.no_grad()
def set_biases(model: LlamaForCausalLM, tokens_1T: Tensor, density: float) -> None:
    """Every router selects this share of experts on these tokens; a second round sees what the first one changed."""
    for router in lte.routers(model):
        assert router.bias is not None
        router.bias.zero_()
    for _ in range(2):
        with lte.trace_routers(model) as trace:
            model(input_ids=tokens_1T, use_cache=False)
        for router, name in site_names(model).items():
            assert router.bias is not None
            if density >= 1:
                router.bias.fill_(50.0)
            else:
                logits = torch.logit(trace.scores(name)).flatten()[:MAX_QUANTILE]
                router.bias.sub_(torch.quantile(logits, 1 - density))


@torch.no_grad()
def measured_density(decoder: Decoder) -> float:
    """Over the tokens that are timed."""
    with lte.trace_routers(decoder.model) as trace:
        decoder.model(input_ids=decoder.tokens_1T, use_cache=False)
    shares = [(trace.scores(site)[PROMPT + WARM_UP :] > 0.5).float().mean() for site in trace.sites]
    return float(torch.stack(shares).mean())


def compiled(decoder: Decoder, backend: str, mode: str = "reduce-overhead") -> Step:
    torch.compiler.reset()
    step: Step = torch.compile(decoder.step, backend=backend, mode=mode, fullgraph=True)
    return step


def run(name: str, tokens: int, densities: list[float], profiled: bool, console: Console) -> dict[str, Any]:
    model = build(name, "cuda")
    decoder = Decoder(model, tokens, "cuda")
    rows = [dense_row(decoder, profiled, console)]
    make_sparse(model)
    step = compiled(decoder, "lte")
    for density in densities:
        set_biases(model, decoder.tokens_1T, density)
        started = perf_counter()
        decoder.latency(step)  # the first call compiles
        console.print(f"density {density}: ready after {perf_counter() - started:.0f} s")
        latency = decoder.latency(step)
        console.print(f"density {density}: {latency.median:.3f} ms, dense {rows[0].latency.median:.3f} ms")
        saved = 1 - latency.median / rows[0].latency.median
        kernels = kernel_times(decoder, step) if profiled else {}
        rows.append(Measurement(measured_density(decoder), latency, saved, kernels, decoder.ffn_error()))
    console.print(table(name, rows))
    for row in rows if profiled else ():
        console.print({"density": row.density, **row.kernels})
    parameters = sum(p.numel() for p in nn.Module.parameters(model))
    return {
        "model": name,
        "parameters": parameters,
        "prompt": PROMPT,
        "tokens": tokens,
        "rows": [asdict(r) for r in rows],
    }


def dense_row(decoder: Decoder, profiled: bool, console: Console) -> Measurement:
    """The model as it was, compiled by inductor."""
    started = perf_counter()
    step = compiled(decoder, "inductor")
    decoder.latency(step)
    console.print(f"dense: ready after {perf_counter() - started:.0f} s")
    latency = decoder.latency(step)
    return Measurement(None, latency, 0.0, kernel_times(decoder, step) if profiled else {})


def table(name: str, rows: list[Measurement]) -> Table:
    result = Table(title=f"{name}, milliseconds a token, batch 1")
    for heading in ("density", "median", "p20", "p80", "saved", "error"):
        result.add_column(heading, justify="right")
    for row in rows:
        times = (f"{ms:.3f}" for ms in asdict(row.latency).values())
        share = "dense" if row.density is None else f"{row.density:.3f}"
        result.add_row(share, *times, f"{row.saved:.1%}", "" if row.error is None else f"{row.error:.1e}")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["LLaMA-2-7B", "SmolLM2-135M"], choices=sorted(SHAPES))
    parser.add_argument("--tokens", type=int, default=100, help="timed tokens")
    parser.add_argument("--densities", type=float, nargs="+", default=list(DENSITIES))
    parser.add_argument("--profile", action="store_true", help="also say which kernels a token's time goes to")
    parser.add_argument("--output", type=Path, help="also write the figures here, as JSON")
    options = parser.parse_args()
    console = Console(width=120)
    if not torch.cuda.is_available():
        console.print("benchmarks.end_to_end needs an NVIDIA GPU that torch can see")
        return 1
    torch.manual_seed(0)
    device = device_facts()
    console.print(json.dumps(device))
    models = []
    for name in options.model:
        models.append(run(name, options.tokens, options.densities, options.profile, console))
        if options.output is not None:
            write(options.output, {"device": device, "dtype": str(DTYPE), "models": models})
    return 0


if __name__ == "__main__":
    sys.exit(main())
