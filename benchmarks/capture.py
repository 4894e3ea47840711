"""How long finding and rewriting the FFNs of a 70B-shaped Llama without weights takes, by the number of its layers.

    python -m benchmarks.capture

Each number of layers runs in a process of its own, which reports its peak memory. Seconds are CPU time of that process
(one thread), with the wall time behind them where it matters: `located` is what a user waits for, from building the
model to its list of FFNs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "capture.json"
LAYERS = (10, 20, 40, 80)
STAGES = ("build", "capture", "match", "insert", "fuse", "lower", "print")
# Llama 3 70B, https://huggingface.co/meta-llama/Meta-Llama-3-70B/blob/main/config.json
SHAPE = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}


def main() -> None:
    arguments = _arguments()
    if arguments.measure is not None:
        sys.stdout.write(json.dumps(measure(arguments.measure)) + "\n")
        return
    rows = [_in_own_process(layers) for layers in arguments.layers]
    for line in table(rows):
        sys.stdout.write(line + "\n")
    record = {
        "command": shlex.join(["python", "-m", "benchmarks.capture", *sys.argv[1:]]),
        "environment": {name: version(name) for name in ("torch", "transformers", "networkx")}
        | {"cores": os.cpu_count()},
        "shape": SHAPE,
        "results": rows,
    }
    partial = RESULTS.with_suffix(".tmp")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(RESULTS)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS)
    parser.add_argument("--measure", type=int, metavar="LAYERS", help="measure in this process and print JSON")
    return parser.parse_args()


def _in_own_process(layers: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.capture", "--measure", str(layers)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows as Markdown."""
    head = ("layers", "nodes", *STAGES, "located, wall", "peak GB")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [f"{row['cpu_seconds'][stage]:.2f}" for stage in STAGES]
        located = f"{row['located_wall_seconds']:.1f}"
        lines.append(f"| {row['layers']} | {row['nodes']} | {' | '.join(cells)} | {located} | {row['peak_gb']:.2f} |")
    return lines


class Stopwatch:
    """CPU and wall seconds of named pieces of work."""

    def __init__(self) -> None:
        self.cpu: dict[str, float] = {}
        self.wall: dict[str, float] = {}

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        self.cpu[name] = self.cpu.get(name, 0.0) + time.process_time() - cpu
        self.wall[name] = self.wall.get(name, 0.0) + time.perf_counter() - wall
        return result


def measure(layers: int) -> dict[str, Any]:
    """One row: build on the meta device, locate, then rewrite in both ways that graphs are rewritten."""
    import torch

    torch.set_num_threads(1)
    from lte_compile import TransformConfig, graph, set_stage, transform
    from lte_compile.capture.capture import capture
    from lte_compile.passes.fuse import FuseExperts
    from lte_compile.passes.lower import LowerSparse
    from lte_compile.passes.match import find_ffns
    from lte_compile.passes.pipeline import run_pipeline

    watch = Stopwatch()
    model = watch("build", lambda: build(layers))
    captured = watch("capture", lambda: capture(model))
    search = watch("match", lambda: find_ffns(captured))
    assert len(search.sites) == layers, search.rejections
    located, peak = sum(watch.wall.values()), _peak_gb()
    insert_routers(model, watch)
    transform(model, TransformConfig(grouping="contiguous"))  # type: ignore[arg-type]
    routed = capture(set_stage(model, "hard"))
    (fused,) = watch("fuse", lambda: run_pipeline(routed, [FuseExperts()]))
    (lowered,) = watch("lower", lambda: run_pipeline(routed, [LowerSparse()]))
    assert len(fused.changes) == len(lowered.changes) == layers, (fused, lowered)
    watch("print", lambda: str(graph(model)))
    return {
        "layers": layers,
        "nodes": len(captured.module.graph.nodes),
        "cpu_seconds": watch.cpu,
        "wall_seconds": watch.wall,
        "located_wall_seconds": located,
        "peak_gb": peak,
        "peak_gb_after_everything": _peak_gb(),
    }


def build(layers: int) -> Any:
    """A Llama of the 70B shape on the meta device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=layers, dtype="bfloat16")).eval()


def insert_routers(model: Any, watch: Stopwatch) -> None:
    """Into the graph that torch.export leaves when its modules are flattened away; the search for FFNs counts."""
    import torch

    from lte_compile import Router, TransformConfig
    from lte_compile.capture.capture import capture, dummy_inputs
    from lte_compile.passes.insert import InsertRouter
    from lte_compile.passes.match import find_ffns

    with torch.no_grad():
        program = torch.export.export(model, (), {**dummy_inputs(model), "use_cache": False}, strict=False)
    flat: Any = program.module()
    config = TransformConfig(grouping="contiguous")  # type: ignore[arg-type]
    sites = find_ffns(capture(flat)).sites
    routers = {site.down: Router(site, config, like=flat.get_parameter(site.up)) for site in sites}
    insert = InsertRouter(routers=routers, expert_size=config.expert_size)
    report = watch("insert", lambda: insert(capture(flat)))
    assert len(report.changes) == len(sites), report


def _peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
