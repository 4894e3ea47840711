"""How far a model's layers are from its teacher's: a target for every layer, where next tokens give one for all.

Shapes: B sequences, T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lte_compile.training.layer_compilation import repeated_layers


@contextmanager
def layer_outputs(model: nn.Module, *, enabled: bool = True) -> Iterator[list[Tensor]]:
    """What every repeated layer of the model returns inside the block, in the order of the calls."""
    seen: list[Tensor] = []

    def see(layer: nn.Module, arguments: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as stack:
        for layer in repeated_layers(model) if enabled else ():
            stack.callback(layer.register_forward_hook(see).remove)
        yield seen


def layer_distance(learned: Sequence[Tensor], taught: Sequence[Tensor], counted_BT: Tensor | None) -> Tensor:
    """Squared difference of outputs over the teacher's square, [B, T, D] each; mean over tokens and layers.

    Relative per token, since the first token's outputs are often hundreds of times larger than all others.

    Args:
        counted_BT: nonzero where a token counts; None counts all.

    Raises:
        ValueError: teacher and model have different layers.
    """
    if [x.shape for x in learned] != [x.shape for x in taught]:
        raise ValueError("the teacher has other layers than the model; layer distillation needs one of the same shape")
    distances = []
    for learned_BTD, taught_BTD in zip(learned, taught, strict=True):
        target_BTD = taught_BTD.float()
        error_BT, size_BT = (learned_BTD.float() - target_BTD).square().mean(-1), target_BTD.square().mean(-1)
        share_BT = error_BT / size_BT.clamp(min=torch.finfo(size_BT.dtype).tiny)
        counted = (
            share_BT.mean() if counted_BT is None else (share_BT * counted_BT).sum() / counted_BT.sum().clamp(min=1)
        )
        distances.append(counted)
    return torch.stack(distances).mean()
