"""Groupings and router initialisations on real weights: how tight, how fast, how much of the output they catch.

Part 1 clusters the first FFN's gate weights with `group_neurons` and with k-means-constrained (PyPI), side by side.
Part 2 (with --text) runs text through the model and reports, for a few layers, the share of each token's output energy
(sum over neurons of h_j^2 |w_down_j|^2) that the chosen experts hold, on tokens the routers were not fitted to.

    python benchmarks/grouping.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --text some.txt

Shapes: T tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from k_means_constrained import KMeansConstrained
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lte_compile.config import Grouping
from lte_compile.grouping import GroupingRequest, group_neurons
from lte_compile.routing.linear_fit import RidgeRouterFit, centroid_router, group_energy

RESULTS = Path(__file__).parent / "results" / "grouping.json"
SEEDS = (0, 1, 2)
DENSITIES = (0.1, 0.3, 0.5)
LAYERS = (0, 14, 29)
TOKENS_PER_CHUNK = 512


def main() -> None:
    arguments = _arguments()
    folder, gguf = arguments.gguf.parent, arguments.gguf.name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32).eval()
    made_by = {"command": shlex.join(["python", *sys.argv]), "environment": _environment()}
    gate_FD = model.model.layers[0].mlp.gate_proj.weight.detach()
    by_threads = {f"{n} threads": _compare_kmeans(gate_FD, arguments.expert_size, n) for n in arguments.threads}
    _save("kmeans", {**made_by, "results": by_threads})
    if arguments.text is not None:
        _save("energy", {**made_by, "results": _energy_captured(model, arguments)})


def _save(part: str, record: dict[str, Any]) -> None:
    """Replace one part of the result file; the other keeps the command and environment it was made by."""
    RESULTS.parent.mkdir(exist_ok=True)
    saved = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    partial = RESULTS.with_suffix(".tmp")
    partial.write_text(json.dumps({**saved, part: record}, indent=2) + "\n")
    partial.replace(RESULTS)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gguf", type=Path, required=True, help="a LLaMA-like model in GGUF form")
    parser.add_argument("--text", type=Path, help="UTF-8 text; half fits the routers, half measures them")
    parser.add_argument("--tokens", type=int, default=16384, help="how many tokens of the text to use")
    parser.add_argument("--expert-size", type=int, default=32)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    if missing := [str(path) for path in (arguments.gguf, arguments.text) if path and not path.is_file()]:
        parser.error(f"no such file: {', '.join(missing)}")
    return arguments


def _environment() -> dict[str, str | int | None]:
    packages = ("torch", "numpy", "scipy", "k-means-constrained", "transformers")
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


# ---- part 1: balanced k-means -------------------------------------------------------------------------------------


def _compare_kmeans(gate_FD: Tensor, expert_size: int, threads: int) -> dict[str, Any]:
    """Ours and theirs in turn for each seed, so that other load on the machine falls on both alike."""
    torch.set_num_threads(threads)
    rows_FD = torch.nn.functional.normalize(gate_FD, dim=1)

    def ours(method: Grouping, seed: int) -> Tensor:
        request = GroupingRequest(method=method, weights_FD=gate_FD, expert_size=expert_size, seed=seed)
        return group_neurons(request)

    def theirs(n_init: int, seed: int) -> Tensor:
        bounds = {"size_min": expert_size, "size_max": expert_size}
        estimator = KMeansConstrained(len(rows_FD) // expert_size, n_init=n_init, random_state=seed, **bounds)
        return torch.from_numpy(estimator.fit(rows_FD.numpy()).labels_).argsort(stable=True)

    contestants: dict[str, Callable[[int], Tensor]] = {
        "random": lambda seed: ours(Grouping.RANDOM, seed),
        "ours": lambda seed: ours(Grouping.BALANCED_KMEANS, seed),
        "k-means-constrained, 1 start": lambda seed: theirs(1, seed),
        "k-means-constrained, 10 starts (its default)": lambda seed: theirs(10, seed),
    }
    runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in contestants}
    ours(Grouping.BALANCED_KMEANS, 0)  # warm-up
    for seed in SEEDS:
        for name, contestant in contestants.items():
            wall, busy = time.perf_counter(), time.process_time()
            permutation_F = contestant(seed)
            wall, busy = time.perf_counter() - wall, time.process_time() - busy
            runs[name].append((_inertia(rows_FD[permutation_F], expert_size), wall, busy))
    return {name: _summary(name, threads, measured) for name, measured in runs.items()}


def _inertia(rows_FD: Tensor, expert_size: int) -> float:
    return sum(float((chunk - chunk.mean(0)).square().sum()) for chunk in rows_FD.double().split(expert_size))


def _summary(name: str, threads: int, runs: list[tuple[float, float, float]]) -> dict[str, Any]:
    inertias, walls, busies = (list(column) for column in zip(*runs, strict=True))
    _say(
        f"{threads} threads  {name:45s} inertia {statistics.mean(inertias):8.1f}  "
        f"median wall {statistics.median(walls):7.3f} s  cpu {statistics.median(busies):7.3f} s"
    )
    return {"seeds": list(SEEDS), "inertia": inertias, "wall_seconds": walls, "cpu_seconds": busies}


# ---- part 2: energy caught ----------------------------------------------------------------------------------------


def _energy_captured(model: Any, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    tokenizer = AutoTokenizer.from_pretrained(arguments.gguf.parent, gguf_file=arguments.gguf.name)
    text = arguments.text.read_text(encoding="utf-8", errors="replace")[: 8 * arguments.tokens]
    ids = tokenizer(text, return_tensors="pt").input_ids[0, : arguments.tokens]
    traces = _trace(model, ids)
    records = []
    for layer in LAYERS:
        for method in Grouping:
            measured = _measure_layer(model.model.layers[layer].mlp, *traces[layer], method, arguments.expert_size)
            records.append({"layer": layer, "grouping": method.value, "tokens": len(ids), **measured})
            _say(json.dumps(records[-1]))
    return records


def _trace(model: Any, ids: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """FFN inputs [T, D] and hidden activations [T, F] of the chosen layers."""
    caught: dict[int, tuple[list[Tensor], list[Tensor]]] = {layer: ([], []) for layer in LAYERS}
    handles = []
    for layer, (inputs, hiddens) in caught.items():
        mlp = model.model.layers[layer].mlp
        handles.append(mlp.gate_proj.register_forward_pre_hook(lambda _, args, into=inputs: into.append(args[0][0])))
        handles.append(mlp.down_proj.register_forward_pre_hook(lambda _, args, into=hiddens: into.append(args[0][0])))
    with torch.no_grad():
        for chunk in ids.split(TOKENS_PER_CHUNK):
            model.model(chunk[None])
    for handle in handles:
        handle.remove()
    return {layer: (torch.cat(inputs), torch.cat(hiddens)) for layer, (inputs, hiddens) in caught.items()}


def _measure_layer(mlp: Any, x_TD: Tensor, hidden_TF: Tensor, method: Grouping, expert_size: int) -> dict[str, Any]:
    half = len(x_TD) // 2
    gate_FD, norms_F = mlp.gate_proj.weight.detach(), mlp.down_proj.weight.detach().norm(dim=0)
    activations_NF = hidden_TF[: min(half, 4096)] * norms_F
    order_F = group_neurons(
        GroupingRequest(method=method, weights_FD=gate_FD, expert_size=expert_size, activations_NF=activations_NF)
    )
    hidden_TF, norms_F = hidden_TF[:, order_F], norms_F[order_F]
    energy_TE = group_energy(hidden_TF[half:], norms_F, expert_size)
    fit = RidgeRouterFit(norms_F, expert_size, width=x_TD.shape[1])
    fit.update(x_TD[:half], hidden_TF[:half])
    w_centroid_ED, _ = centroid_router(gate_FD[order_F], expert_size)
    result: dict[str, Any] = {}
    for density in DENSITIES:
        w_ridge_ED, bias_E = fit.solve(density)
        ridge_TE = x_TD[half:] @ w_ridge_ED.T + bias_E
        result[f"density {density}"] = {
            "oracle": _share_held(energy_TE, energy_TE / energy_TE.sum(1, keepdim=True), density),
            "ridge": _share_held(energy_TE, ridge_TE, density),
            "centroid": _share_held(energy_TE, x_TD[half:] @ w_centroid_ED.T, density),
            "ridge density on unseen tokens": float((ridge_TE > 0).float().mean()),
        }
        result["ridge R2"] = _r_squared(ridge_TE, energy_TE)
    return result


def _share_held(energy_TE: Tensor, ranking_TE: Tensor, density: float) -> float:
    """Mean over tokens of the energy share in the pairs ranked highest, pooled over tokens and experts."""
    cut = ranking_TE.flatten().kthvalue(round((1 - density) * ranking_TE.numel())).values
    share_TE = energy_TE / energy_TE.sum(1, keepdim=True)
    return float((share_TE * (ranking_TE > cut)).sum(1).mean())


def _r_squared(predicted_TE: Tensor, energy_TE: Tensor) -> float:
    """Squared correlation with the log energy over pooled pairs: what a rescaled prediction explains."""
    pair = torch.stack([predicted_TE.flatten(), (energy_TE + 1e-4 * energy_TE.mean()).log().flatten()])
    return float(torch.corrcoef(pair)[0, 1].square())


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
