"""Models that are not from transformers: torch's own layers, timm-style blocks, ConvNeXt blocks, hand-written FFNs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.architectures.row import HEADS, HIDDEN, TOKENS, WIDTH, Inputs, Row


def _tokens() -> Inputs:
    return {"x": torch.randn(2, TOKENS, WIDTH)}


def _input() -> Inputs:
    return {"input": torch.randn(2, TOKENS, WIDTH)}


def _feature_map() -> Inputs:
    return {"x": torch.randn(2, WIDTH, 6, 6)}


class Mlp(nn.Module):
    """timm's Mlp: dropouts and an optional norm that is the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Dropout(0.1)
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(HIDDEN, WIDTH), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))
        return y


class GluMlp(nn.Module):
    """timm's GluMlp: one projection, its halves the value and the gate."""

    def __init__(self, gate_last: bool) -> None:
        super().__init__()
        self.fc1, self.fc2, self.gate_last = nn.Linear(WIDTH, 2 * HIDDEN), nn.Linear(HIDDEN, WIDTH), gate_last

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.fc1(x).chunk(2, dim=-1)
        y: Tensor = self.fc2(first * F.silu(second) if self.gate_last else F.silu(first) * second)
        return y


class ConvMlp(nn.Module):
    """timm's ConvMlp: the MLP as 1x1 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(WIDTH, HIDDEN, 1), nn.Conv2d(HIDDEN, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.relu(self.fc1(x)))
        return y


class VitBlock(nn.Module):
    """timm's Block: pre-norm attention and MLP, each with a learnt scale."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj, self.mlp = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), mlp
        self.scale1, self.scale2 = nn.Parameter(torch.rand(WIDTH)), nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads.unbind(0)).transpose(1, 2).flatten(2)
        x = x + self.scale1 * self.proj(mixed)
        y: Tensor = x + self.scale2 * self.mlp(self.norm2(x))
        return y


class ConvNextBlock(nn.Module):
    """A ConvNeXt block: depthwise convolution, norm, MLP over channels, as linear layers or as 1x1 convolutions."""

    def __init__(self, channels_last: bool) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.channels_last, self.norm = channels_last, nn.GroupNorm(1, WIDTH)
        self.mlp: nn.Module = Mlp() if channels_last else ConvMlp()
        self.scale = nn.Parameter(torch.rand(WIDTH, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x))
        y = self.mlp(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if self.channels_last else self.mlp(y)
        z: Tensor = x + self.scale * y
        return z


class Swiglu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


class ClampedSwiglu(Swiglu):
    """gpt-oss's gated unit in a dense layer: clamped operands, a shifted up-projection."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate(x).clamp(max=7.0), self.up(x).clamp(-7.0, 7.0)
        y: Tensor = self.down((up + 1) * gate * torch.sigmoid(1.702 * gate))
        return y


class Interleaved(nn.Module):
    """Gate and up in turns, one row each."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(WIDTH, 2 * HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        both = self.both(x)
        y: Tensor = self.down(F.gelu(both[..., ::2]) * both[..., 1::2])
        return y


class Inlined(nn.Module):
    """A pre-norm layer whose forward holds the FFN itself, with a residual and a scale per neuron."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.neuron_scale = nn.Parameter(torch.rand(HIDDEN) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(torch.tanh(self.up(self.norm(x))) * self.neuron_scale)
        return y


class EncoderStack(nn.Module):
    def __init__(self, layer: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.encoder(x)
        return y


def _encoder_layer(**settings: object) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True, **settings)  # type: ignore[arg-type]


class DecoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x, x)
        return y


def _row(
    name: str,
    make: Callable[[], nn.Module],
    *downs: str,
    inputs: Callable[[], Inputs] = _tokens,
    in_default_run: bool = False,
) -> Row:
    return Row(name=name, build=lambda: (make(), inputs()), downs=downs, in_default_run=in_default_run)


ROWS: tuple[Row, ...] = (
    _row("torch_encoder", lambda: EncoderStack(_encoder_layer()), "encoder.layers.{}.linear2", in_default_run=True),
    _row(
        "torch_encoder_norm_first", lambda: EncoderStack(_encoder_layer(norm_first=True)), "encoder.layers.{}.linear2"
    ),
    _row("torch_encoder_gelu", lambda: EncoderStack(_encoder_layer(activation="gelu")), "encoder.layers.{}.linear2"),
    _row("torch_decoder_layer", DecoderLayer, "layer.linear2"),
    _row("timm_vit", lambda: nn.Sequential(VitBlock(Mlp()), VitBlock(Mlp())), "{}.mlp.fc2", inputs=_input),
    _row(
        "timm_vit_swiglu",
        lambda: nn.Sequential(VitBlock(GluMlp(False)), VitBlock(GluMlp(False))),
        "{}.mlp.fc2",
        inputs=_input,
    ),
    _row("timm_glu_gate_last", lambda: GluMlp(True), "fc2"),
    _row("timm_conv_mlp", ConvMlp, "fc2", inputs=_feature_map),
    _row("convnext_linear", lambda: ConvNextBlock(True), "mlp.fc2", inputs=_feature_map),
    _row("convnext_conv", lambda: ConvNextBlock(False), "mlp.fc2", inputs=_feature_map),
    _row("swiglu", Swiglu, "down"),
    _row("clamped_swiglu", ClampedSwiglu, "down"),
    _row("interleaved", Interleaved, "down"),
    _row("inlined", Inlined, "down"),
)
