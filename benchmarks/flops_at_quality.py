"""FLOPs per token at a given loss of quality, out of a comparison: the form of the LTE paper's table 1.

    python -m benchmarks.flops_at_quality runs/generation/comparison.json --loss 0.05

For each method the least FLOPs at which quality is still within `loss` of the dense model's, relative, read off the
straight lines between the densities that were run, dense included; "at most" where even the lowest of them is good
enough. FFNs are counted as measured, routers included; the rest of the model (attention without its quadratic part, and
the head) as its weights. Quality and FLOPs are means over seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Curve = Sequence[tuple[float, float]]  # (FFN FLOPs a token, quality), by rising FLOPs


def least_flops(curve: Curve, wanted: float) -> float | None:
    """Where the line through the points last comes down to `wanted`, from the most FLOPs on; None if it is below there.

    Quality is the larger the better.
    """
    found: float | None = None
    above: tuple[float, float] | None = None
    for flops, quality in sorted(curve, reverse=True):
        if quality >= wanted:
            found, above = flops, (flops, quality)
            continue
        if above is not None:
            share = (above[1] - wanted) / (above[1] - quality)
            found = above[0] + share * (flops - above[0])
        break
    return found


def table(document: Mapping[str, Any], loss: float, other_weights: int) -> str:
    """As markdown. `other_weights`: of the model beside its FFNs, all read for every token."""
    is_perplexity = document["metric"] == "perplexity"
    rows = document["rows"]
    [dense] = [row for row in rows if row["method"] == "dense"]

    def quality(row: Mapping[str, Any]) -> float:
        mean = float(row["quality"]["mean"])
        return -mean if is_perplexity else mean

    wanted = quality(dense) - loss * abs(quality(dense))
    full = dense["flops_per_token"] + 2 * other_weights
    lines = ["| method | FFN GFLOPs | whole model, GFLOPs | reduction |", "|---|---|---|---|"]
    lines.append(f"| dense | {dense['flops_per_token'] / 1e9:.3f} | {full / 1e9:.3f} | |")
    for name in dict.fromkeys(row["method"] for row in rows):
        curve = [(row["flops_per_token"], quality(row)) for row in (dense, *rows) if row["method"] in (name, "dense")]
        flops = least_flops(curve, wanted)
        if name in ("dense", "ffn-free") or flops is None:
            continue
        whole = flops + 2 * other_weights
        bound = "at most " if flops == min(curve)[0] else ""
        lines.append(f"| {name} | {bound}{flops / 1e9:.3f} | {bound}{whole / 1e9:.3f} | {full / whole:.2f} x |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="comparison.json of a run of lte-compile compare")
    parser.add_argument("--loss", type=float, default=0.05, help="of quality, relative to dense")
    parser.add_argument("--other-weights", type=int, default=54_853_632, help="beside FFNs (SmolLM2-135M)")
    options = parser.parse_args()
    if not options.comparison.is_file():
        parser.error(f"{options.comparison}: no such file; lte-compile compare writes OUT/comparison.json")
    document = json.loads(options.comparison.read_text(encoding="utf-8"))
    sys.stdout.write(table(document, options.loss, options.other_weights))
    return 0


if __name__ == "__main__":
    sys.exit(main())
