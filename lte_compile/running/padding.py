"""Which token positions count: the padding masks of a model call, read as the call happens."""

from __future__ import annotations

import inspect
import warnings
from typing import Any, NamedTuple

from torch import Tensor, nn


class PaddingMasks(NamedTuple):
    """[B, T] masks of one model call, nonzero where a token counts; None counts every token."""

    encoder: Tensor | None = None
    decoder: Tensor | None = None


class PaddingReader:
    """Forward pre-hook of a whole model that keeps the masks of its latest call in `current`.

    `attention_mask` counts for all modules but an encoder-decoder's decoder; there it is `decoder_attention_mask`, or
    where labels differ from -100. Masks that are not 2-d are ignored. `mask` overrides whatever the call says.
    """

    def __init__(self, model: nn.Module, mask: Tensor | None = None) -> None:
        self.mask = mask
        self.names = tuple(inspect.signature(model.forward).parameters)
        self.decoder = frozenset(decoder_modules(model))
        self.current = PaddingMasks(mask, mask)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.mask is not None:
            return
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        decoder = _two_dimensional(given.get("decoder_attention_mask"))
        labels = _two_dimensional(given.get("labels"))
        if decoder is None and labels is not None and self.decoder:
            decoder = labels != -100
        self.current = PaddingMasks(_two_dimensional(given.get("attention_mask")), decoder)

    def mask_of(self, module: nn.Module, masks: PaddingMasks) -> Tensor | None:
        """The mask that applies to what `module` sees."""
        return masks.decoder if module in self.decoder else masks.encoder


def drop_padding(values: Tensor, mask: Tensor | None) -> Tensor:
    """[tokens that count, C] out of [..., C]."""
    flat_TC, counted_T = values.reshape(-1, values.shape[-1]), counted_tokens(values, mask)
    return flat_TC if counted_T is None else flat_TC[counted_T]


def counted_tokens(values: Tensor, mask: Tensor | None) -> Tensor | None:
    """Which of the tokens of [..., C] values count, bool [tokens]; None if all do.

    A mask that does not line up counts all of them, with a warning.
    """
    if mask is None:
        return None
    if values.dim() == 3 and mask.shape[1] > values.shape[1]:  # a KV cache: the mask covers past tokens too
        mask = mask[:, -values.shape[1] :]
    if mask.numel() != values.shape[:-1].numel():
        warnings.warn(
            f"the attention mask {tuple(mask.shape)} does not line up with values {tuple(values.shape)}; "
            "all tokens are counted. Pass mask= to say which count.",
            stacklevel=3,
        )
        return None
    return mask.reshape(-1).bool().to(values.device)


def _two_dimensional(mask: Any) -> Tensor | None:
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def decoder_modules(model: nn.Module) -> set[nn.Module]:
    """Modules of an encoder-decoder's decoder; none for other models, whose one mask is `attention_mask`."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False) or not hasattr(model, "get_decoder"):
        return set()
    get_decoder: Any = model.get_decoder
    decoder = get_decoder()
    return set(decoder.modules()) if isinstance(decoder, nn.Module) else set()
