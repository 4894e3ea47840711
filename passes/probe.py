"""Numeric confirmation of a matched region: run it on random data and see what reaches what, and what it computes.

1. Every (token, channel) of every projection may change one hidden unit of that token, the unit that its number says.
   This also tells halves from interleaved layouts where one projection holds gate and up.
2. The function is named if it is a known activation, plain or gated; "identity" without a gate if it is affine.

All in float64 whatever the model's dtype, so that activations that differ in the fourth digit (gelu and its tanh form)
are told apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.fx as fx
from torch import Tensor

from lte_compile.kernels.activations import ACTIVATIONS
from lte_compile.passes.dataflow import GraphView
from lte_compile.passes.ir import Fusion
from lte_compile.passes.running import Region, Runner, Values

__all__ = ["UNKNOWN", "Finding", "ProbeError", "Region", "probe"]

UNKNOWN = "unknown"
_TOLERANCE = (
    1e-7  # float64 evaluations of one formula written two ways differ by about 1e-15, gelu and gelu_tanh by 1e-4
)
_NUDGES = (0.25, -1.0, 4.0, -16.0, 64.0)  # tried in turn: an activation may be flat around a value
_SIGNED_STARTS = 40  # at even odds, one unit in 2^40 never has the operand signs that a maximum needs
_SPREADS = torch.tensor((0.05, 2.0, 30.0), dtype=torch.float64)  # standard deviations of the values to start from
_SAMPLED_CHANNELS = 12  # looked at one by one to say what is wrong


@dataclass(frozen=True)
class Finding:
    """What a region computes. `gate` is the index of the projection that goes through the activation (None: plain)."""

    activation: str
    fusion: Fusion = Fusion.SEPARATE
    gate: int | None = None


class ProbeError(ValueError):
    """The region is not what its structure promised; the message says how."""


def probe(view: GraphView, region: Region, hidden: int) -> Finding:
    """Confirms that hidden units and tokens are independent, names layout, gate and activation, or raises `ProbeError`.

    A region of two operands whose activation is "unknown" may combine them in any element-wise way.
    """
    runner = Runner(view, region)
    widths = list(region.widths)
    if widths not in ([hidden], [2 * hidden], [hidden, hidden]):
        raise ProbeError(f"projections of widths {widths} do not form a plain or gated FFN of {hidden} neurons")
    layouts = _confirmed_layouts(_Perturbation(runner, hidden))
    return _identify_gated(runner, hidden, layouts) if layouts else _identify_plain(runner)


class _Perturbation:
    """Changes some channels of a projection and sees which hidden units change."""

    def __init__(self, runner: Runner, hidden: int) -> None:
        self.runner = runner
        self.hidden = hidden
        self.ups = runner.region.ups
        self._starts: list[tuple[Values, Tensor]] = []

    def changes(self, up: fx.Node, place_TC: Tensor) -> Iterator[Tensor]:
        """Which hidden units [tokens, F] change when the channels of `up` at `place_TC` [tokens, C] are moved.

        Tried by several amounts and from several values, as a region may be flat around one of them.
        """
        for values, base in self._started():
            for nudge in _NUDGES:
                moved = values[up] + nudge * place_TC.view(values[up].shape).double()
                result = self.runner({**values, up: moved})
                same = (result == base) | (result.isnan() & base.isnan())
                yield ~same.reshape(-1, same.shape[-1])

    def tokens(self, up: fx.Node) -> int:
        values, _ = next(self._started())
        return values[up].flatten(0, -2).shape[0] if values[up].dim() > 1 else 1

    def width(self, up: fx.Node) -> int:
        return self.runner.region.widths[self.ups.index(up)]

    def _started(self) -> Iterator[tuple[Values, Tensor]]:
        """Values to start from and what the region makes of them, computed when first needed."""
        yield from self._starts
        for values in itertools.islice(_starting_values(self.runner), len(self._starts), None):
            self._starts.append((values, self.runner(values)))
            yield self._starts[-1]


def _confirmed_layouts(perturbation: _Perturbation) -> dict[int, Fusion]:
    """Confirms every channel. The layouts a pair of operands may have, by which of them is the gate; {} if plain."""
    hidden, ups = perturbation.hidden, perturbation.ups
    units_F = torch.arange(hidden)
    if perturbation.runner.region.widths == (2 * hidden,):
        return _fused_layouts(perturbation, units_F)
    for up in ups:
        if not _confirms(perturbation, up, units_F):
            raise ProbeError(_complaint(perturbation, up))
    return {0: Fusion.SEPARATE, 1: Fusion.SEPARATE} if len(ups) == 2 else {}


def _fused_layouts(perturbation: _Perturbation, units_F: Tensor) -> dict[int, Fusion]:
    (up,), hidden = perturbation.ups, perturbation.hidden
    if all(_confirms(perturbation, up, part_F) for part_F in (units_F, units_F + hidden)):
        return {0: Fusion.GATE_THEN_UP, 1: Fusion.UP_THEN_GATE}
    if all(_confirms(perturbation, up, part_F) for part_F in (2 * units_F, 2 * units_F + 1)):
        return {0: Fusion.INTERLEAVED_GATE_FIRST, 1: Fusion.INTERLEAVED_UP_FIRST}
    raise ProbeError(_complaint(perturbation, up))


def _confirms(perturbation: _Perturbation, up: fx.Node, channels_F: Tensor) -> bool:
    """Whether channel `channels_F[i]` of each token changes hidden unit i of that token, and nothing else does.

    Each (token, unit) has a number. For every bit of the numbers, those that have it are perturbed at once, then those
    that have not: what changes must be exactly what was perturbed. Two numbers differ in some bit, so a channel that
    reached a second unit would show. That takes 2 log2(T F) runs in place of T F.
    """
    tokens, hidden = perturbation.tokens(up), len(channels_F)
    numbers_TF = torch.arange(tokens * hidden).view(tokens, hidden)
    for bit in range(max(1, (tokens * hidden - 1).bit_length())):
        has_bit_TF = (numbers_TF >> bit) & 1 == 1
        if not all(_reads_back(perturbation, up, channels_F, group_TF) for group_TF in (has_bit_TF, ~has_bit_TF)):
            return False
    return True


def _reads_back(perturbation: _Perturbation, up: fx.Node, channels_F: Tensor, group_TF: Tensor) -> bool:
    place_TC = torch.zeros(len(group_TF), perturbation.width(up), dtype=torch.bool)
    place_TC[:, channels_F] = group_TF
    reached_TF = torch.zeros_like(group_TF)
    for changed_TF in perturbation.changes(up, place_TC):
        if changed_TF.shape != group_TF.shape or bool((changed_TF & ~group_TF).any()):
            return False
        reached_TF |= changed_TF
        if torch.equal(reached_TF, group_TF):
            return True
    return False


def _complaint(perturbation: _Perturbation, up: fx.Node) -> str:
    """What is wrong with a region that was not confirmed, from perturbing one channel of one token at a time."""
    tokens, width, hidden = perturbation.tokens(up), perturbation.width(up), perturbation.hidden
    sample = torch.linspace(0, width - 1, min(width, _SAMPLED_CHANNELS)).long().tolist()
    for token, channel in itertools.product(range(min(tokens, 2)), sample):
        places = _places_reached(perturbation, up, token, channel)
        units = sorted({unit for _, unit in places})
        if not places:
            return f"output {channel} of a projection reaches no hidden unit"
        if len(units) > 1:
            return f"hidden units interact: output {channel} of a projection reaches {len(units)} of them"
        if len(places) > 1:
            return f"tokens interact: output {channel} of one token reaches {len(places)} tokens"
        if places[0][0] != token:
            return "the tokens are reordered between the projections and the down-projection"
        if units[0] not in (channel, channel - hidden, channel // 2):
            return f"output {channel} of a projection feeds hidden unit {units[0]}: the hidden units are reordered"
    return "its hidden units are mixed, or ordered in a way that is neither consecutive nor interleaved"


def _places_reached(perturbation: _Perturbation, up: fx.Node, token: int, channel: int) -> list[list[int]]:
    place_TC = torch.zeros(perturbation.tokens(up), perturbation.width(up), dtype=torch.bool)
    place_TC[token, channel] = True
    found = (changed_TF.nonzero().tolist() for changed_TF in perturbation.changes(up, place_TC))
    return next((places for places in found if places), [])


def _starting_values(runner: Runner) -> Iterator[Values]:
    """The first will do for nearly all regions; a maximum of two operands may need several to show both."""
    yield _small_inputs(runner)
    yield _near_zero(runner)
    for seed in range(_SIGNED_STARTS):
        yield _signed_inputs(runner, seed)


def _small_inputs(runner: Runner, seed: int = 0) -> Values:
    """Small positive values: clipped and saturating activations stay alive around them."""
    generator = torch.Generator().manual_seed(seed)
    return runner.inputs(lambda shape: 0.1 + 0.5 * torch.rand(shape, generator=generator, dtype=torch.float64))


def _signed_inputs(runner: Runner, seed: int = 1) -> Values:
    """A third of the projections' values near zero, where shrinking activations differ from their namesakes, a third
    where most activations bend, a third far out, where clipped ones show their clipping."""
    generator = torch.Generator().manual_seed(seed)

    def signed(like: Tensor) -> Tensor:
        spread = _SPREADS[torch.randint(len(_SPREADS), like.shape, generator=generator)]
        return torch.randn(like.shape, generator=generator, dtype=torch.float64) * spread

    values = _small_inputs(runner, seed)  # scales and biases too: some leave one operand of a maximum no chance
    return values | {up: signed(values[up]) for up in runner.region.ups}


def _same(left: Tensor, right: Tensor) -> bool:
    return torch.allclose(left, right, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True)


def _identify_plain(runner: Runner) -> Finding:
    values = _signed_inputs(runner)
    (up,) = runner.region.ups
    result = runner(values).reshape(values[up].shape)
    matching = (name for name, act in ACTIVATIONS.items() if _same(act.apply(values[up]), result))
    name = next(matching, UNKNOWN)
    return Finding("identity" if name == UNKNOWN and _is_affine(runner, values) else name)


def _identify_gated(runner: Runner, hidden: int, layouts: Mapping[int, Fusion]) -> Finding:
    """act(gate) * up if it is that, else any function of two operands that is not affine in both together."""
    values = _signed_inputs(runner)
    parts = [part.reshape(-1, hidden) for part in _parts(runner, values, hidden, next(iter(layouts.values())))]
    result = runner(values).reshape(-1, hidden)  # the projections may group their tokens differently
    for (name, act), gate in itertools.product(ACTIVATIONS.items(), layouts):
        if _same(act.apply(parts[gate]) * parts[1 - gate], result):
            return Finding(name, layouts[gate], gate)
    if _is_affine(runner, values):
        return Finding("identity")
    gate = next(_gates(runner, hidden, layouts), 0)
    return Finding(UNKNOWN, layouts[gate], gate)


def _gates(runner: Runner, hidden: int, layouts: Mapping[int, Fusion]) -> Iterator[int]:
    """Operands whose partner is affine: everywhere, or at least near zero, where a clamp does not bend it yet."""
    for values in (_signed_inputs(runner), _near_zero(runner)):
        for gate, fusion in layouts.items():
            if _is_affine_in_part(runner, values, hidden, fusion, 1 - gate):
                yield gate


_INTERLEAVED = (Fusion.INTERLEAVED_GATE_FIRST, Fusion.INTERLEAVED_UP_FIRST)


def _parts(runner: Runner, values: Values, hidden: int, fusion: Fusion) -> tuple[Tensor, Tensor]:
    """The two F-wide operands, as views into `values`."""
    ups = runner.region.ups
    if fusion is Fusion.SEPARATE:
        return values[ups[0]], values[ups[1]]
    whole = values[ups[0]]
    if fusion in _INTERLEAVED:
        return whole[..., ::2], whole[..., 1::2]
    return whole[..., :hidden], whole[..., hidden:]


def _is_affine(runner: Runner, values: Values) -> bool:
    """Whether the region is a x + b in its projections, on `values` and their mirror images."""
    ups = runner.region.ups
    scaled = ({up: factor * values[up] for up in ups} for factor in (-1.0, 0.0, 1.0, 2.0))
    minus, zero, plus, double = (runner(values | changed) for changed in scaled)
    return _same(plus + minus, 2 * zero) and _same(double + zero, 2 * plus)


def _is_affine_in_part(runner: Runner, values: Values, hidden: int, fusion: Fusion, part: int) -> bool:
    results = []
    for factor in (-1.0, 0.0, 1.0, 2.0):
        scaled = {node: v.clone() if node in runner.region.ups else v for node, v in values.items()}
        _parts(runner, scaled, hidden, fusion)[part].mul_(factor)
        results.append(runner(scaled))
    minus, zero, plus, double = results
    return _same(plus + minus, 2 * zero) and _same(double + zero, 2 * plus)


def _near_zero(runner: Runner) -> Values:
    """Projection results of about 0.01, of either sign."""
    values = _signed_inputs(runner)
    return values | {up: 1e-3 * values[up] for up in runner.region.ups}
