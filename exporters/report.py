"""What an export wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lte_compile.exporters.nodes import SparseNode
from lte_compile.passes.ir import PassReport, Rejection


@dataclass(frozen=True, kw_only=True)
class OnnxReport:
    """An ONNX file and how its FFNs are written.

    `sparse` are the FFNs written as one `lte::SparseFFN` node; `masked_dense` those written as a dense FFN and a mask
    in standard operators, with the reason. `data` holds the weights when they exceed what one ONNX file can hold.
    """

    path: Path
    data: Path | None
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sparse: tuple[SparseNode, ...]
    masked_dense: tuple[Rejection, ...]
    passes: tuple[PassReport, ...] = ()

    @property
    def size(self) -> int:
        """Bytes on disk, weights included."""
        return sum(file.stat().st_size for file in (self.path, self.data) if file is not None)

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.size / 1e6:.1f} MB, opset {self.opset}, "
            f"{len(self.sparse)} SparseFFN nodes, {len(self.masked_dense)} FFNs as masked dense",
            f"  inputs  {_shortened(self.inputs)}",
            f"  outputs {_shortened(self.outputs)}",
        ]
        lines += [
            f"  + {n.name}: {n.neurons} neurons in {n.experts} experts of {n.expert_size}, {n.activation}, "
            f"threshold {n.threshold:g}"
            for n in self.sparse
        ]
        lines += [f"  - {r.parameter or r.node}: {r.reason}" for r in self.masked_dense]
        return "\n".join(lines)


def _shortened(names: tuple[str, ...], limit: int = 8) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
