"""Memory that nothing uses any more."""

from __future__ import annotations

import gc

import torch


def release_unused_memory() -> None:
    """Hand the device what dropped models and trainings held, for other processes to take.

    torch keeps freed memory for itself. And torch.export leaves the model it traced in a reference cycle of its own, so
    that a dropped one lives on until Python looks for cycles, which it does rarely.
    """
    gc.collect()
    torch.cuda.empty_cache()
