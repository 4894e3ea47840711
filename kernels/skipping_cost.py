"""Whether skipping experts pays on a GPU: estimates from the number of tokens and the density that calibration met.

Estimates are ratios, so that they depend little on the device: costs are in bytes of memory traffic that take as long.
T tokens; an expert reads `rows` = density x T of them on average.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lte_compile.kernels.grouped_tile import GroupedTile, padded_rows


@dataclass(frozen=True)
class Rates:
    """What a device computes while it reads a byte: the library's dense products, and the grouped one's share of it."""

    flops_per_byte: float
    grouped: float


# Dense 700 TFLOP/s and 3.0 TB/s on an H100; grouped 330 to 370 of 715 TFLOP/s there at 8192 tokens (410 of 740, H200).
TENSOR_CORES = Rates(230.0, 0.47)
# Without them 47 TFLOP/s dense, 14 grouped (float32, 2048 tokens on an H200).
FMA = Rates(16.0, 0.29)
# The grouped product reads weights at about 3/4 of the bandwidth of a copy (256 and 512 tokens on an H200).
GROUPED_READ = 1.3
# For one token, an up-projection from here on is worth launches that share work evenly (SmolLM2-135M's has 2 MB,
# TinyLlama's 23, LLaMA-2-7B's 90).
LARGE_UP_BYTES = 2**25
# Router, lists and launches: 12 us at 3.0 TB/s.
LISTING_BYTES = 36e6


@dataclass(frozen=True)
class Layer:
    """What the estimates know of an FFN."""

    width: int
    neurons: int
    experts: int
    expert_size: int
    matrices: int  # that are read for a hidden value: up, or up and gate
    dtype: torch.dtype

    @property
    def rates(self) -> Rates:
        return FMA if self.dtype == torch.float32 else TENSOR_CORES


def expected_union(tokens: int, density: float) -> float:
    """Share of experts that any token needs when tokens choose independently: the most it can be on average."""
    return 1.0 - (1.0 - density) ** tokens


def dense_cost(layer: Layer, tokens: int) -> float:
    """Bytes that take as long as the dense FFN."""
    values = tokens * layer.neurons * layer.dtype.itemsize
    products = (layer.matrices + 1) * _product_cost(layer, tokens)
    return products + (layer.matrices + 1) * values


def grouped_cost(layer: Layer, tokens: int, density: float, tile: GroupedTile) -> float:
    """Bytes that take as long as listing tokens, the grouped product over their tiles, and a dense down-projection."""
    rows = padded_rows(density * tokens, tile.tokens)
    neurons = layer.experts * -(-layer.expert_size // tile.neurons) * tile.neurons
    rates = layer.rates
    flops = 2 * layer.matrices * rows * neurons * layer.width
    weights = layer.matrices * layer.neurons * layer.width * layer.dtype.itemsize
    grouped = max(
        flops / (rates.flops_per_byte * rates.grouped), GROUPED_READ * weights * expected_union(tokens, density)
    )
    values = tokens * layer.neurons * layer.dtype.itemsize
    return LISTING_BYTES + values + grouped + _product_cost(layer, tokens)


def _product_cost(layer: Layer, tokens: int) -> float:
    weights = layer.neurons * layer.width
    return max(weights * layer.dtype.itemsize, 2 * tokens * weights / layer.rates.flops_per_byte)
