"""Memory that nothing uses any more."""

from __future__ import annotations

import gc

import torch


def release_unused_memory() -> None:
    """Hand the device what dropped models and trainings held, for other processes to take.

    torch keeps freed memory for itself; and a model's modules refer to each other, so that one that was dropped lives
    on until Python looks for such cycles, which it does rarely.
    """
    gc.collect()
    torch.cuda.empty_cache()
