"""Token losses on a GPU: against float64, and in the memory of their gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lte_compile.kernels.token_losses import row_losses, row_losses_reference
from tests.kernels.problems import TOLERANCE, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def _problem(tokens: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    logits, taught = (5 * torch.randn(tokens, classes, device="cuda", dtype=dtype) for _ in range(2))
    labels = torch.randint(classes, (tokens,), device="cuda")
    labels[::3] = -100
    return logits.requires_grad_(), labels, taught


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("teaches", [True, False])
@pytest.mark.parametrize("shape", [(300, 49152), (65, 151_936), (17, 101), (1, 4096)])
def test_losses_and_gradients_match_float64(shape: tuple[int, int], teaches: bool, dtype: torch.dtype) -> None:
    logits, labels, taught = _problem(*shape, dtype)
    wide = logits.detach().double().requires_grad_()
    found = row_losses(logits, labels, taught if teaches else None)
    wanted = row_losses_reference(wide, labels, taught.double() if teaches else None)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        assert relative_error(one, other) < TOLERANCE[torch.float32]
    gradients = [
        torch.autograd.grad(entropy.sum() + 0.5 * distance.sum(), given)[0]
        for (entropy, distance), given in ((found, logits), (wanted, wide))
    ]
    assert gradients[0].dtype == dtype
    assert relative_error(*gradients) < TOLERANCE[dtype]


def test_nothing_of_the_logits_size_is_kept_but_the_gradient() -> None:
    logits, labels, taught = _problem(4096, 49152, torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    entropy, distance = row_losses(logits, labels, taught)
    (entropy.mean() + distance.mean()).backward()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 1.05 * logits.nbytes
