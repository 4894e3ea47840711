"""FFNs whose hidden region is no named activation: the file computes what the model does, in plain ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lte_compile
from lte_compile.config import TransformConfig

# Tracing these for coverage takes half of their time again; other tests run the same lines.
pytestmark = pytest.mark.no_cover


class GptOssFfn(nn.Module):
    """The dense form of gpt-oss's expert: interleaved halves, clamps, (up + 1) * gate * sigmoid(alpha * gate)."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(16, 96), nn.Linear(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        both = self.both(x)
        gate, up = both[..., ::2].clamp(max=0.7), both[..., 1::2].clamp(-0.7, 0.7)
        result: Tensor = self.down((up + 1) * (gate * torch.sigmoid(gate * 1.702)))
        return result


class XieluFfn(nn.Module):
    """Apertus' FFN: xIELU with two learnable numbers (arXiv 2411.13010)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 48, bias=False), nn.Linear(48, 16, bias=False)
        self.positive, self.negative = nn.Parameter(torch.rand(1)), nn.Parameter(torch.rand(1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        positive, negative = F.softplus(self.positive), 0.5 + F.softplus(self.negative)
        below = (torch.expm1(h.clamp(max=-1e-6)) - h) * negative
        result: Tensor = self.down(torch.where(h > 0, positive * h * h, below) + 0.5 * h)
        return result


class ScaledFfn(nn.Module):
    """A scale of each neuron behind the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(16, 48), nn.Linear(48, 16), nn.Parameter(torch.rand(48) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(F.silu(self.up(x)) * self.scale)
        return result


class Residual(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize("stage", ["dense", pytest.param("soft", marks=pytest.mark.slow), "hard"])
@pytest.mark.parametrize("ffn", [GptOssFfn, XieluFfn, ScaledFfn])
def test_runtime_agrees_with_the_model(ffn: type[nn.Module], stage: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16)
    model = lte_compile.transform(Residual(ffn(), ffn()).eval(), TransformConfig(expert_size=5), (x,))
    lte_compile.set_stage(model, stage)
    axes = {"x": {0: "batch", 1: "sequence"}}
    report = lte_compile.export_onnx(model, tmp_path / "model.onnx", example_inputs=(x,), dynamic_axes=axes)
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for tokens in ((2, 5), (1, 1)):
        y = torch.randn(*tokens, 16)
        with torch.no_grad():
            expected = model(y).numpy()
        # float32: two layers of sums of at most 48 terms of size about 1, a few ulp of 1e-7 each
        np.testing.assert_allclose(session.run(None, {"x": y.numpy()})[0], expected, rtol=1e-5, atol=1e-5)
    reasons = {rejection.reason for rejection in report.masked_dense}
    assert len(report.masked_dense) == 2
    assert len(reasons) == 1
    if stage == "hard":
        assert "its hidden region is a program" in reasons.pop()
