"""What a model's output is of: logits, wherever they are in it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def logits_of(output: object) -> Tensor:
    """The output's `.logits`, a mapping's "logits", or the one tensor that it is.

    Raises:
        ValueError: it has none.
    """
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the model returned a {type(output).__name__} without logits; let it return `.logits`, as transformers "
            "models do, or one tensor"
        )
    return found
