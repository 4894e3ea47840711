"""trace_routers: losses and densities against float64 formulas written out, on the tokens that count and no others."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lte_compile.routing.router import Router, routers, set_stage
from lte_compile.running.tracing import SEPARABILITY_EPS, site_names, trace_routers
from tests import zoo
from tests.routed import EXPERT_SIZE, routed, routed_stack, stack, tokens

EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 0.0}  # float64 sums in another order


class Watched:
    """Scores [tokens, E] of each router as its formula gives them, calls apart."""

    def __init__(self, model: nn.Module) -> None:
        self.scores: dict[Router, list[Tensor]] = {}
        for router in routers(model):
            router.register_forward_pre_hook(self.see)

    def see(self, router: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(router, Router)
        assert router.bias is not None
        scores = torch.sigmoid(args[0].detach() @ router.weight.T + router.bias).detach()
        self.scores.setdefault(router, []).append(scores.flatten(0, -2))

    def counted(self, masks: list[dict[str, Tensor]], decoder: set[nn.Module]) -> dict[Router, Tensor]:
        """Scores of the tokens that count; `masks` has one entry per call, keys "encoder" and "decoder"."""
        return {
            router: torch.cat(
                [
                    scores[mask["decoder" if router in decoder else "encoder"].flatten().bool()]
                    for scores, mask in zip(calls, masks, strict=True)
                ]
            )
            for router, calls in self.scores.items()
        }


def check_against_formulas(trace: Any, expected: dict[Router, Tensor], names: dict[Router, str]) -> None:
    scores = torch.cat([part.flatten() for part in expected.values()])
    separability = (1 / ((scores - 0.5) ** 2 + SEPARABILITY_EPS)).mean()
    sizes = torch.tensor([EXPERT_SIZE] * 5 + [zoo.HIDDEN - 5 * EXPERT_SIZE])
    active = {router: ((part > 0.5) * sizes).sum().item() for router, part in expected.items()}
    neurons = {router: part.shape[0] * zoo.HIDDEN for router, part in expected.items()}
    torch.testing.assert_close(trace.efficiency_loss(), (scores**2).mean(), **EXACT)
    torch.testing.assert_close(trace.separability_loss(), separability, **EXACT)
    assert trace.num_scores == scores.numel()
    assert trace.density() == pytest.approx(sum(active.values()) / sum(neurons.values()), rel=1e-12)
    for router, part in expected.items():
        name = names[router]
        torch.testing.assert_close(trace.efficiency_loss(name), (part**2).mean(), **EXACT)
        torch.testing.assert_close(trace.scores(name), part, **EXACT)
        assert trace.densities()[name] == pytest.approx(active[router] / neurons[router], rel=1e-12)


@pytest.mark.parametrize("name", ["llama", "bert", "opt"])
def test_padding_does_not_count(name: str) -> None:
    model, inputs = routed(name)
    set_stage(model, "soft")
    watched = Watched(model)
    more = {"input_ids": inputs["input_ids"][:1, :5], "attention_mask": torch.tensor([[0, 1, 1, 1, 1]])}
    with trace_routers(model) as trace:
        model(**inputs)
        model(more["input_ids"], more["attention_mask"])  # positional arguments count as well
    masks = [{"encoder": call["attention_mask"]} for call in (inputs, more)]
    assert masks[0]["encoder"].sum() < masks[0]["encoder"].numel()
    check_against_formulas(trace, watched.counted(masks, set()), site_names(model))


def test_models_without_masks_count_every_token() -> None:
    model, inputs = routed("vit")
    set_stage(model, "hard")
    watched = Watched(model)
    with trace_routers(model) as trace:
        model(**inputs)
    patches = torch.ones(2, 17)  # 16 patches and the class token
    check_against_formulas(trace, watched.counted([{"encoder": patches}], set()), site_names(model))


@pytest.mark.parametrize("how", ["decoder_attention_mask", "labels", "neither"])
def test_decoders_have_their_own_padding(how: str) -> None:
    model, inputs = routed("t5")
    set_stage(model, "soft")
    decoder_mask = torch.ones(2, 7, dtype=torch.long)
    if how == "decoder_attention_mask":
        decoder_mask[0, 5:] = 0
        inputs["decoder_attention_mask"] = decoder_mask
    if how == "labels":
        decoder_mask[1, 4:] = 0
        inputs["labels"] = inputs.pop("decoder_input_ids").masked_fill(decoder_mask == 0, -100)
    watched = Watched(model)
    with trace_routers(model) as trace:
        model(**inputs)
    masks = [{"encoder": inputs["attention_mask"], "decoder": decoder_mask}]
    decoder = set(model.get_decoder().modules())  # type: ignore[operator]
    assert sum(router in decoder for router in routers(model)) == zoo.LAYERS
    check_against_formulas(trace, watched.counted(masks, decoder), site_names(model))


def test_a_mask_given_by_hand_overrides_the_call() -> None:
    model, inputs = routed("bert")
    watched = Watched(model)
    mask = torch.zeros(2, zoo.TOKENS)
    mask[:, 0] = 1  # only the first token, as in classification by it
    set_stage(model, "soft")
    with trace_routers(model, mask=mask) as trace:
        model(**inputs)
    check_against_formulas(trace, watched.counted([{"encoder": mask}], set()), site_names(model))


def test_steps_with_a_cache_count_their_own_token() -> None:
    model, inputs = routed("llama")
    with trace_routers(set_stage(model, "hard")) as trace:
        model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)  # type: ignore[operator]
    real = int(inputs["attention_mask"].sum())
    # the prompt once, then one token per row for every new token but the last
    assert trace.scores(trace.sites[0]).shape[0] == real + 2 * 3


def test_a_mask_that_does_not_line_up_is_reported() -> None:
    model = routed_stack()
    with trace_routers(model, mask=torch.ones(1, 2)) as trace:
        model(tokens(1, 3))
    with pytest.warns(UserWarning, match="does not line up"):
        assert trace.num_scores == 2 * 3 * 5


def test_density_is_that_of_the_time_of_the_call() -> None:
    model, inputs = routed("bert")
    with trace_routers(model) as dense:
        model(**inputs)
    with trace_routers(set_stage(model, "hard")) as hard:
        model(**inputs)
    measured = hard.density()
    for router in routers(set_stage(model, "dense")):
        router.threshold = 0.9
    assert dense.density() == 1.0
    assert 0.2 < measured < 0.8
    assert hard.density() == measured


def test_losses_have_the_gradients_of_their_formulas() -> None:
    model = set_stage(routed_stack(12), "soft")
    x = tokens(4)

    def losses(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        values = {"0.up.router.weight": weight, "0.up.router.bias": bias}
        with trace_routers(model) as trace:
            torch.func.functional_call(model, values, (x,))
        return trace.efficiency_loss(), trace.separability_loss()

    first = next(routers(model))
    assert first.bias is not None
    start = (first.weight.detach().clone().requires_grad_(), first.bias.detach().clone().requires_grad_())
    assert torch.autograd.gradcheck(losses, start)


def test_the_separability_loss_is_finite_at_the_threshold() -> None:
    model = routed_stack()
    for router in routers(model):
        router.load_initial(torch.zeros_like(router.weight), torch.zeros(router.num_experts))
    with trace_routers(set_stage(model, "soft")) as trace:
        model(tokens(3))
    loss = trace.separability_loss()
    torch.autograd.backward(loss)
    assert loss.item() == pytest.approx(1 / SEPARABILITY_EPS)
    assert all(torch.isfinite(p.grad).all() for r in routers(model) for p in r.parameters() if p.grad is not None)


@pytest.mark.parametrize("stage, reached", [("soft", True), ("hard", False)])
def test_which_stage_trains_routers(stage: str, reached: bool) -> None:
    model, inputs = routed("bert")
    loss = set_stage(model, stage)(**inputs, labels=torch.tensor([0, 2])).loss
    loss.backward()
    for router in routers(model):
        assert (router.weight.grad is not None and bool(router.weight.grad.abs().sum() > 0)) is reached
    down = model.get_parameter(next(routers(model)).site.down)
    assert down.grad is not None


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    model, inputs = routed(name)
    model.config.use_cache = False  # type: ignore[union-attr]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    labels = inputs["input_ids"] if name == "llama" else torch.tensor([0, 2])
    results = []
    for checkpointing in (False, True):
        copy: Any = deepcopy(set_stage(model.train(), "soft"))
        if checkpointing:
            copy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with trace_routers(copy) as trace:
            task = copy(**inputs, labels=labels).loss
            (task + trace.efficiency_loss() + 0.5 * trace.separability_loss()).backward()
        gradients = {key: p.grad for key, p in copy.named_parameters() if p.grad is not None}
        losses = torch.stack([task, trace.efficiency_loss(), trace.separability_loss()]).detach()
        results.append((losses, trace.densities(), trace.num_scores, gradients))
    plain, checkpointed = results
    torch.testing.assert_close(checkpointed[0], plain[0], **EXACT)
    assert checkpointed[1:3] == plain[1:3]
    torch.testing.assert_close(checkpointed[3], plain[3], rtol=1e-10, atol=1e-14)  # accumulated in another order


def test_autocast_stays_close() -> None:
    model, inputs = routed("llama", torch.float32)
    set_stage(model, "soft")
    values = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), trace_routers(model) as trace:
            model(**inputs)
        assert trace.efficiency_loss().dtype is torch.float32
        values.append(trace.efficiency_loss().item())
    # bf16 inputs to the routers are off by 2^-9, and scores move by at most a quarter of what logits do
    assert values[1] == pytest.approx(values[0], rel=1e-2)


def test_traces_cannot_be_nested_and_leave_nothing_behind() -> None:
    model = routed_stack()
    hooks = len(model._forward_pre_hooks)
    with (
        pytest.raises(ValueError, match="cannot be nested"),
        trace_routers(model),
        trace_routers(model),
    ):
        pass
    assert len(model._forward_pre_hooks) == hooks
    assert all(router.sink is None for router in routers(model))


def test_a_trace_in_which_nothing_ran_has_no_losses() -> None:
    model = routed_stack()
    with trace_routers(model) as trace:
        pass
    for ask in (trace.efficiency_loss, trace.separability_loss, trace.density, trace.densities):
        with pytest.raises(RuntimeError, match="no router ran"):
            ask()


def test_unknown_sites_and_models_without_routers() -> None:
    model = routed_stack()
    with trace_routers(model) as trace:
        model(tokens(3))
    with pytest.raises(ValueError, match="no site named 'encoder' ran; those that did: 0, 1"):
        trace.density("encoder")
    with pytest.raises(ValueError, match="has no routers"), trace_routers(stack()):
        pass
