"""What one run measured: plain frozen values that survive a round trip through JSON."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from lte_compile.data.provenance import Provenance


class Metric(StrEnum):
    """What `quality` means. accuracy and ROUGE-L: shares, higher is better. perplexity: lower is better."""

    ACCURACY = "accuracy"
    PERPLEXITY = "perplexity"
    ROUGE_L = "ROUGE-L"


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where and how the run was made. `versions` maps package names to versions; `date` is ISO 8601."""

    versions: Mapping[str, str]
    cpu: str
    threads: int
    date: str
    command: str


@dataclass(frozen=True, kw_only=True)
class BudgetRow:
    """One density budget, measured on the test split in eval mode, hard gates.

    Args:
        target: the density asked for.
        density: active share of experts, mean over layers and non-padding tokens.
        quality: see `Metric`.
        threshold: tau at this budget.
        ffn_flops_per_token: of all layers, router included.
        density_per_layer: `density` before the mean over layers, from the first layer on.
    """

    target: float
    density: float
    quality: float
    threshold: float
    ffn_flops_per_token: float
    density_per_layer: tuple[float, ...]

    def __post_init__(self) -> None:
        for share in (self.target, self.density, *self.density_per_layer):
            _check_share(share)


@dataclass(frozen=True, kw_only=True)
class OraclePoint:
    """Quality when each token keeps its neurons of largest |activation|, chosen with hindsight, at one density."""

    density: float
    quality: float

    def __post_init__(self) -> None:
        _check_share(self.density)


@dataclass(frozen=True, kw_only=True)
class LatencyRow:
    """Median time of one FFN at batch 1 on the CPU, in microseconds."""

    density: float
    dense_us: float
    sparse_us: float


@dataclass(frozen=True, kw_only=True)
class OnnxCheck:
    """Largest absolute difference between torch's logits and those of an exported file.

    `runtime` names the runtime and its version, and whether our custom-op library was registered. Left out are examples
    in which a score lies so near to its threshold that rounding decides whether the expert is selected: so many are
    `undecided`, and they differ by up to `undecided_diff`.
    """

    file: str
    runtime: str
    max_abs_diff: float
    undecided: int = 0
    undecided_diff: float = 0.0

    def __str__(self) -> str:
        said = f"{self.max_abs_diff:.2e}"
        if not self.undecided:
            return said
        return f"{said}; {self.undecided_diff:.2e} in {self.undecided} where rounding decides about an expert"


@dataclass(frozen=True, kw_only=True)
class ScoreHistogram:
    """Router scores of one layer over the test split's non-padding tokens; edges has one entry more than counts."""

    layer: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.edges) != len(self.counts) + 1:
            bins, edges = len(self.counts), len(self.edges)
            raise ValueError(f"{self.layer}: {bins} bins have {bins + 1} edges; got {edges}")


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One logged training step. `step` counts within its stage; `eta` is the weight of the efficiency loss."""

    stage: str
    step: int
    loss: float
    density: float
    eta: float


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """Everything a report shows. Parts that were not measured are empty tuples.

    Args:
        name: of the run, for headings.
        provenance: of the weights.
        task, test_examples: what was evaluated and on how many examples (classification) or windows.
        dense_quality: of the fine-tuned dense model.
        ffn_free_quality: the control: the same model with every FFN's hidden value zeroed.
        budgets: one row per budget.
        oracle: at the budgets' densities.
        dense_ffn_flops_per_token, dense_parameters, router_parameters: for the cost columns.
        seeds: by what they seed. wall_seconds: by phase.
    """

    name: str
    provenance: Provenance
    task: str
    metric: Metric = Metric.ACCURACY
    test_examples: int
    environment: Environment
    dense_quality: float
    ffn_free_quality: float
    budgets: tuple[BudgetRow, ...]
    oracle: tuple[OraclePoint, ...] = ()
    dense_ffn_flops_per_token: float
    dense_parameters: int
    router_parameters: int
    onnx: tuple[OnnxCheck, ...] = ()
    latency: tuple[LatencyRow, ...] = ()
    histograms: tuple[ScoreHistogram, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    seeds: Mapping[str, int]
    wall_seconds: Mapping[str, float]

    def __post_init__(self) -> None:
        if len({len(row.density_per_layer) for row in self.budgets}) > 1:
            raise ValueError("every budget must list the same layers in density_per_layer")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; `from_dict` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> RunResult:
        """Raises ValueError for missing or unknown fields, at any depth."""
        result = _restore(cls, record)
        assert isinstance(result, cls)
        return result


def save_result(result: RunResult, path: Path) -> Path:
    """Write as JSON. Raises ValueError for values that JSON has not (NaN, infinity)."""
    try:
        text = json.dumps(result.to_dict(), indent=1, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{result.name} holds a value that is not finite, so it cannot be saved: {error}") from None
    write_atomically(path, text.encode())
    return path


def load_result(path: Path) -> RunResult:
    """The inverse of `save_result`."""
    return RunResult.from_dict(json.loads(path.read_text(encoding="utf-8")))


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside the target under a temporary name, then rename: readers never see half a file."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)  # mkstemp's files are private
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _restore(kind: Any, value: Any) -> Any:
    """A JSON value as the type it was written from."""
    if is_dataclass(kind):
        return _restore_dataclass(kind, value)
    if get_origin(kind) is tuple:
        return tuple(_restore(get_args(kind)[0], item) for item in value)
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return kind(value)
    return value


def _restore_dataclass(kind: Any, record: Mapping[str, Any]) -> Any:
    hints = get_type_hints(kind)
    if unknown := sorted(set(record) - {field.name for field in fields(kind)}):
        raise ValueError(f"{kind.__name__} has no fields {unknown}")
    try:
        return kind(**{name: _restore(hints[name], value) for name, value in record.items()})
    except TypeError as error:
        raise ValueError(f"{kind.__name__}: {error}") from None


def _check_share(value: float) -> None:
    # The slack is for means of ones that were summed in float32.
    if not 0.0 <= value <= 1.0 + 1e-6:
        raise ValueError(f"a density is a share between 0 and 1; got {value!r}")
