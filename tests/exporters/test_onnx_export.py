"""Programs of hand-written modules, exported and run by plain ONNX Runtime, against torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from lte_compile.exporters import onnx_export
from lte_compile.exporters.onnx_export import export_program
from lte_compile.exporters.report import OnnxReport
from lte_compile.exporters.runtime import max_abs_difference, run

WIDTH, NEURONS, EXPERT_SIZE = 8, 20, 8  # three experts, the last of 4 neurons
lte = torch.ops.lte


class Ffn(nn.Module):
    """A routed FFN that calls the ops of `level` directly: sparse_ffn, expert_ffn with a rule, or the bare anchor."""

    offsets: Tensor | None

    def __init__(
        self,
        level: str = "sparse_ffn",
        rule: str = "threshold",
        *,
        gated: bool = False,
        offsets: Tensor | None = None,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.level, self.rule, self.gated = level, rule, gated
        self.up, self.gate, self.down = nn.Linear(WIDTH, NEURONS), nn.Linear(WIDTH, NEURONS), nn.Linear(NEURONS, WIDTH)
        self.router = nn.Linear(WIDTH, 3)
        self.register_buffer("offsets", offsets)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3

    def forward(self, x: Tensor) -> Tensor:
        gate = (self.gate.weight, self.gate.bias) if self.gated else (None, None)
        weights = (self.up.weight, gate[0], self.down.weight, self.up.bias, gate[1], self.down.bias)
        router = (self.router.weight, self.router.bias)
        y: Tensor
        if self.level == "sparse_ffn":
            y = lte.sparse_ffn(x, *router, *weights, "silu", EXPERT_SIZE, 0.5, self.offsets)
            return y
        gates = lte.select(lte.route(x, *router), self.rule, 0.5)
        if self.level == "expert_ffn":
            y = lte.expert_ffn(x, gates, *weights, "silu", EXPERT_SIZE, self.offsets)
        else:
            hidden = nn.functional.silu(self.up(x))
            y = self.down(lte.gate_hidden(hidden, gates, EXPERT_SIZE, self.offsets))
        return y


class Net(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def program_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> ExportedProgram:
    x = torch.randn(2, 3, WIDTH, dtype=dtype)
    return torch.export.export(
        model.to(dtype).eval(), (x,), dynamic_shapes=({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},), strict=False
    )


def export(model: nn.Module, path: Path, dtype: torch.dtype = torch.float32) -> OnnxReport:
    program = program_of(model, dtype)
    return export_program(
        program, path, input_names=["x"], output_names=["y"], axis_names=[{0: "batch", 1: "sequence"}]
    )


def error(model: nn.Module, path: Path, dtype: torch.dtype = torch.float32) -> float:
    """Largest difference between the file and torch over several batch sizes and lengths."""
    generator = torch.Generator().manual_seed(1)
    samples = [torch.randn(*shape, WIDTH, generator=generator, dtype=dtype) for shape in ((1, 1), (4, 7))]
    with torch.no_grad():
        return max(max_abs_difference(run(path, {"x": x.numpy()})["y"], model(x).numpy()) for x in samples)


def sparse_nodes(path: Path) -> list[onnx.NodeProto]:
    return [node for node in onnx.load(path).graph.node if node.op_type == "SparseFFN"]


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_sparse_ffn_becomes_a_named_node_that_computes_the_same(gated: bool, tmp_path: Path) -> None:
    model = Net(Ffn(gated=gated), Ffn(gated=gated))
    report = export(model, tmp_path / "m.onnx")
    assert [node.name for node in sparse_nodes(report.path)] == ["blocks.0", "blocks.1"]
    assert [(n.name, n.neurons, n.experts, n.gated) for n in report.sparse] == [
        ("blocks.0", NEURONS, 3, gated),
        ("blocks.1", NEURONS, 3, gated),
    ]
    assert not report.masked_dense
    assert run(report.path, {"x": np.zeros((3, 0, WIDTH))})["y"].shape == (3, 0, WIDTH)
    assert error(model, report.path) < 1e-5  # float32 sums of 20 terms


def test_weights_are_stored_once_and_neuron_major(tmp_path: Path) -> None:
    model = Net(Ffn(gated=True))
    report = export(model, tmp_path / "m.onnx")
    graph = onnx.load(report.path).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    (node,) = sparse_nodes(report.path)
    weights = dict(zip(["w_up", "w_gate", "w_down"], node.input[3:6], strict=True))
    assert all(list(stored[value].dims) == [NEURONS, WIDTH] for value in weights.values())
    w_down = model.get_parameter("blocks.0.down.weight").detach().numpy()
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(stored[weights["w_down"]]), w_down.T)
    elements = sum(int(np.prod(tensor.dims)) for tensor in graph.initializer)
    assert elements == sum(parameter.numel() for parameter in model.parameters())


def test_shared_weights_are_stored_once(tmp_path: Path) -> None:
    ffn = Ffn()
    report = export(Net(ffn, ffn), tmp_path / "m.onnx")
    first, second = sparse_nodes(report.path)
    assert first.input[1:] == second.input[1:]
    assert second.name == f"{first.name}#1"


@pytest.mark.parametrize(
    "level, rule",
    [
        ("expert_ffn", "soft"),
        ("expert_ffn", "threshold"),
        ("gate_hidden", "dense"),
        ("gate_hidden", "straight_through"),
    ],
)
def test_every_stage_exports_in_standard_operators(level: str, rule: str, tmp_path: Path) -> None:
    model = Net(Ffn(level, rule))
    report = export(model, tmp_path / "m.onnx")
    assert not report.sparse
    (masked,) = report.masked_dense
    assert masked.parameter == "blocks.0.down.weight"
    assert (repr(rule) in masked.reason) == (rule != "threshold")
    assert error(model, report.path) < 1e-5


def test_experts_of_unequal_sizes_are_masked_dense(tmp_path: Path) -> None:
    model = Net(Ffn(offsets=torch.tensor([0, 1, 15, NEURONS])))
    report = export(model, tmp_path / "m.onnx")
    assert [r.reason for r in report.masked_dense] == ["experts of unequal sizes have no ONNX operator"]
    assert error(model, report.path) < 1e-5


def test_float64_is_masked_dense(tmp_path: Path) -> None:
    model = Net(Ffn(gated=True))
    report = export(model, tmp_path / "m.onnx", torch.float64)
    assert "torch.float64 has no ONNX operator" in report.masked_dense[0].reason
    assert error(model, report.path, torch.float64) < 1e-12


def test_float16(tmp_path: Path) -> None:
    model = Net(Ffn(gated=True))
    report = export(model, tmp_path / "m.onnx", torch.float16)
    x = torch.randn(4, 5, WIDTH, dtype=torch.float16, generator=torch.Generator().manual_seed(1))
    y = run(report.path, {"x": x.numpy()})["y"]
    assert y.dtype == np.float16
    with torch.no_grad():
        wanted = model.float()(x.float()).numpy()
    assert max_abs_difference(y, wanted) < 2e-2  # 11 bits on values up to 8: half an ulp is 4e-3


def test_bfloat16_is_typed_throughout(tmp_path: Path) -> None:
    report = export(Net(Ffn()), tmp_path / "m.onnx", torch.bfloat16)  # ONNX Runtime's CPU kernels have no bfloat16
    proto = onnx.shape_inference.infer_shapes(onnx.load(report.path), check_type=True, strict_mode=True)
    assert proto.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16
    assert len(report.sparse) == 1


def test_kinds_get_overloads_only_where_they_differ(tmp_path: Path) -> None:
    mixed, alike = Net(Ffn(gated=True), Ffn()), Net(Ffn(), Ffn())
    mixed_path, alike_path = tmp_path / "mixed.onnx", tmp_path / "alike.onnx"
    export(mixed, mixed_path)
    export(alike, alike_path)
    assert [f.overload for f in onnx.load(alike_path).functions] == [""]
    assert {f.overload for f in onnx.load(mixed_path).functions} == {n.overload for n in sparse_nodes(mixed_path)}
    assert error(mixed, mixed_path) < 1e-5


def test_axes_names_and_metadata(tmp_path: Path) -> None:
    path = export(Net(Ffn()), tmp_path / "m.onnx").path
    proto = onnx.load(path)
    for value in (proto.graph.input[0], proto.graph.output[0]):
        assert [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] == ["batch", "sequence", WIDTH]
    assert proto.producer_name == "lte_compile"
    assert '"threshold": 0.5' in {entry.key: entry.value for entry in proto.metadata_props}["lte_compile.sites"]
    assert str(Path(__file__).parent).encode() not in path.read_bytes()


def test_oldest_opset(tmp_path: Path) -> None:
    model = Net(Ffn())
    export_program(program_of(model), tmp_path / "m.onnx", opset=20, input_names=["x"], output_names=["y"])
    assert {o.domain: o.version for o in onnx.load(tmp_path / "m.onnx").opset_import}[""] == 20
    assert error(model, tmp_path / "m.onnx") < 1e-5


def test_large_weights_go_to_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "EXTERNAL_DATA_ABOVE", 0)
    model = Net(Ffn())
    report = export(model, tmp_path / "m.onnx")
    assert report.data == tmp_path / "m.onnx.data"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert report.size == report.path.stat().st_size + report.data.stat().st_size
    assert error(model, report.path) < 1e-5


class Repeats(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x.repeat_interleave(torch.arange(WIDTH), dim=-1)
        return y


def test_a_models_own_repeat_interleave_still_exports(tmp_path: Path) -> None:
    report = export(Repeats(), tmp_path / "m.onnx")
    assert error(Repeats(), report.path) == 0.0


class Untranslatable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.special.bessel_j0(x)
        return y


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"an earlier export")
    with pytest.raises(torch.onnx.OnnxExporterError):
        export(Untranslatable(), path)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    assert path.read_bytes() == b"an earlier export"


def test_bad_targets_are_refused_before_any_work(tmp_path: Path) -> None:
    program = program_of(Net(Ffn()))
    with pytest.raises(ValueError, match="does not exist; create it first"):
        export_program(program, tmp_path / "missing" / "m.onnx")
    with pytest.raises(ValueError, match="is a directory"):
        export_program(program, tmp_path)
    with pytest.raises(ValueError, match="cannot write into /proc"):
        export_program(program, "/proc/m.onnx")  # not writable even for root
    with pytest.raises(ValueError, match="opset must be one of 20, 21, 22, 23; got 17"):
        export_program(program, tmp_path / "m.onnx", opset=17)
    assert not list(tmp_path.iterdir())


def test_report_reads_well(tmp_path: Path) -> None:
    text = str(export(Net(Ffn(), Ffn("expert_ffn", "soft")), tmp_path / "m.onnx"))
    assert "1 SparseFFN nodes, 1 FFNs as masked dense" in text
    assert "+ blocks.0: 20 neurons in 3 experts of 8, silu, threshold 0.5" in text
    assert "- blocks.1.down.weight: gates come from selection rule 'soft'" in text
