"""The memory order of FFN weights: each neuron's numbers side by side, for kernels that read selected neurons only."""

from __future__ import annotations

from torch import Tensor, nn

from lte_compile.rewriting.permutation import lay_out_contiguous, lay_out_neuron_major
from lte_compile.routing.router import require_routers

_LAYOUTS = {"neuron_major": lay_out_neuron_major, "contiguous": lay_out_contiguous}


def set_layout(model: nn.Module, layout: str) -> nn.Module:
    """Reorder the FFN weights of a transformed model in memory, in place; values, shapes and names stay.

    "neuron_major" is what decoding reads fastest; models loaded in the hard stage, and models that `lte_compile.train`
    leaves in it, have it already. "contiguous" is torch's default, what `transform` keeps and what FSDP insists on.
    Choose before an optimizer is made: torch's fused optimizers mix up weights whose strides changed. Sharded weights
    stay as they are. Returns the model.

    Raises:
        ValueError: an unknown layout, or a model without routers.
    """
    if layout not in _LAYOUTS:
        raise ValueError(f"layout must be {' or '.join(_LAYOUTS)}; got {layout!r}")
    for router in require_routers(model):
        weights = map(model.get_parameter, (router.site.up, router.site.down))
        if all(type(weight.data) is Tensor for weight in weights):  # not DTensor
            _LAYOUTS[layout](model, router.site)
    return model
