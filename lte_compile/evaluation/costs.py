"""What a token costs in an FFN: the weights it reads. Operations are two per weight, bytes are its size each.

D model width, F neurons. Biases and thresholds are left out: they are a thousandth of the matrices.
"""

from __future__ import annotations

from enum import StrEnum

from lte_compile.passes.ir import FfnSite


class Reads(StrEnum):
    """Which weights a selection spares.

    neurons: an inactive neuron's row of gate and up and its column of down.
    gate_first: the same, but the projection that goes through the activation is read whole, to choose by it.
    inputs: the columns of gate and up that inactive inputs meet, and the columns of down of inactive neurons.
    """

    NEURONS = "neurons"
    GATE_FIRST = "gate_first"
    INPUTS = "inputs"


def ffn_weights(site: FfnSite) -> int:
    """Entries of the FFN's matrices: what a dense token reads."""
    return _matrices(site) * site.width * site.hidden


def ffn_weights_read(site: FfnSite, reads: Reads, neurons: float, inputs: float) -> float:
    """Entries read for a token with so many active neurons and inputs; what chose them is not counted."""
    width, hidden, first = site.width, site.hidden, _matrices(site) - 1
    match reads:
        case Reads.NEURONS:
            return (first + 1) * width * neurons
        case Reads.GATE_FIRST:
            return width * hidden + first * width * neurons
        case Reads.INPUTS:
            return first * hidden * inputs + width * neurons


def _matrices(site: FfnSite) -> int:
    return 3 if site.gated else 2
