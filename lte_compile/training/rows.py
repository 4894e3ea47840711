"""What the rows of a batch run at, where each has a density of its own (lte_compile.training.budgets).

Shapes: B rows of a batch, N densities of the range that are measured.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from lte_compile.routing.router import per_token
from lte_compile.running.modes import on_device


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """How much each row's logits are lowered, whose price it pays, and how much its loss counts.

    Args:
        shift_B: what all routers lower the logits of a row by; a leaf, whose gradient says what a row would give for
            higher logits.
        share_BN: shares of the measured densities in the row's: what interpolates between them. Rows add up to 1.
        weight_B: of the gradients of a row's outputs, 1 on the mean.
    """

    shift_B: Tensor
    share_BN: Tensor
    weight_B: Tensor

    def __len__(self) -> int:
        return len(self.shift_B)

    def __getitem__(self, rows: Tensor | slice) -> Rows:
        return Rows(**{name: value[rows] for name, value in self._tensors().items()})

    def moved_to(self, model: nn.Module) -> Rows:
        """The same on the model's device."""
        return Rows(**on_device(model, self._tensors())).to_be_learned_from()

    def copied_to(self, device: torch.device) -> Rows:
        """In memory of their own."""
        copied = {name: value.detach().to(device, copy=True) for name, value in self._tensors().items()}
        return Rows(**copied).to_be_learned_from()

    @torch.no_grad()
    def fill(self, other: Rows) -> None:
        """Take the values of others, where these are."""
        for name, value in self._tensors().items():
            value.copy_(other._tensors()[name], non_blocking=True)

    def to_be_learned_from(self) -> Rows:
        """Shifts get gradients from now on."""
        self.shift_B.requires_grad_()
        return self

    def prices(self, price_N: Tensor) -> Tensor:
        """Every row's, [B], of prices of the measured densities."""
        return self.share_BN @ price_N.to(self.share_BN)  # which may still be on the host

    def pulls(self) -> Tensor | None:
        """The loss's derivative by the rows' shifts, shared out among the measured densities, [N]; None before it is
        known, or where routers do not train."""
        gradient_B = self.shift_B.grad
        return None if gradient_B is None else gradient_B @ self.share_BN

    def weigh(self, outputs: Tensor) -> None:
        """Scale the gradients that flow into a model's outputs [B, ...]; the loss keeps its value."""
        if outputs.requires_grad:
            outputs.register_hook(lambda grad: grad * per_token(self.weight_B.to(grad.dtype), grad))  # type: ignore[no-untyped-call]

    def _tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}
