"""MiniLM and SmolLM2-135M with their trained weights in ONNX Runtime against torch.

On a CPU by hand (`-m slow`), on CUDA with onnxruntime-gpu and a library with CUDA kernels (`-m gpu`). `-rP` shows the
errors, and on which provider every node ran.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
import pytest
import torch

from lte_compile.calibration.watching import down_norms, watch_ffns
from lte_compile.checkpoints.loading import load_model, load_tokenizer
from lte_compile.config import Grouping, Stage, TransformConfig
from lte_compile.data.models import resolve_model
from lte_compile.exporters.runtime import OrtGenerator, greedy_generate, run
from lte_compile.rewriting.naming import current_sites
from lte_compile.routing.router import Router, routers, set_stage
from lte_compile.running.modes import in_stage
from lte_compile.running.tracing import trace_routers
from lte_compile.serving.onnx_file import export_onnx
from lte_compile.transform import transform

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
HAS_CUDA = PROVIDERS["cuda"] in ort.get_available_providers()
pytestmark = [
    pytest.mark.no_cover,
    pytest.mark.parametrize(
        "device",
        [
            pytest.param("cpu", marks=pytest.mark.slow),
            pytest.param(
                "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="needs onnxruntime-gpu")]
            ),
        ],
    ),
    pytest.mark.parametrize("precision", ["fp32", "fp16"]),
]

MINILM, SMOLLM2 = "sentence-transformers/all-MiniLM-L6-v2", "HuggingFaceTB/SmolLM2-135M-Instruct"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
# Relative to the largest output: sums of hundreds of terms in float32; 11 bits of every value between operators.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}
OPTIONAL = {MINILM: 0.8, SMOLLM2: 0.25}  # share of the experts that routers choose from
NEW_TOKENS = 32
NO_TOKEN = 1 << 20  # none ends a text
SENTENCES = ["A man plays the guitar.", "Someone is making music on an instrument, and others listen.", "Prices rose."]
# Routers that were not trained make a poor writer, and where two tokens are equally likely, rounding decides between
# them. What goes on as it began is certain.
NUMBERS = ((1, 12), (21, 8), (3, 14))  # the first of a text's numbers, and how many its prompt has
PROMPTS = ["".join(f" {number}," for number in range(first, first + count)) for first, count in NUMBERS]
CONTINUED = ["".join(f" {number}," for number in range(first, first + count + 9)) for first, count in NUMBERS]
TEXTS = {MINILM: SENTENCES, SMOLLM2: CONTINUED}


class Case(NamedTuple):
    """A model in float32, its tokenizer, and its file in some precision."""

    model: Any
    tokenizer: Any
    path: Path


def encode(name: str, tokenizer: Any, texts: list[str]) -> dict[str, torch.Tensor]:
    """Padded on the left for a model that writes on."""
    encoded = tokenizer(texts, padding=True, padding_side="left" if name == SMOLLM2 else "right", return_tensors="pt")
    return {key: encoded[key] for key in ("input_ids", "attention_mask")}


Export = Callable[[str, str], Case]


@cache
def routed(name: str) -> tuple[Any, Any]:
    """The model in the hard stage, with routers made for its texts."""
    folder = resolve_model(name)
    model = transform(load_model(folder, dtype=torch.float32), TransformConfig(grouping=Grouping.CONTIGUOUS))
    tokenizer = load_tokenizer(folder)
    inputs = encode(name, tokenizer, TEXTS[name])
    energies = largest_energies(model, inputs)
    choose_where_it_matters_least(set_stage(model, "hard"), inputs, energies, OPTIONAL[name])
    return model, tokenizer


def largest_energies(model: Any, inputs: dict[str, torch.Tensor]) -> dict[Router, torch.Tensor]:
    """What each expert [E] adds to any of these tokens at most, in the dense model."""
    sites, found = current_sites(model), {}

    def watcher(router: Router) -> Callable[[torch.Tensor, torch.Tensor], None]:
        def watch(x_TD: torch.Tensor, hidden_TF: torch.Tensor) -> None:
            energy_TF = (hidden_TF * down_norms(model, sites[router])).square()
            found[router] = energy_TF.reshape(len(energy_TF), router.num_experts, -1).sum(2).max(0).values

        return watch

    with in_stage(model, Stage.DENSE):
        watch_ffns(model, [inputs], {sites[router]: watcher(router) for router in routers(model)})
    return found


def choose_where_it_matters_least(
    model: Any, inputs: dict[str, torch.Tensor], energies: dict[Router, torch.Tensor], optional: float
) -> None:
    """The experts that add least are chosen by about half of the tokens, by clear margins; the others by all.

    A score within rounding of its threshold selects an expert in one precision and not in another: right both times,
    and no measure of how well a file computes. So thresholds lie in the widest gaps between the scores of these tokens.
    """
    is_token_T = inputs["attention_mask"].flatten().bool()

    def settle(router: Router, given: tuple[torch.Tensor, ...]) -> None:
        logits_ET = (given[0].flatten(0, -2)[is_token_T] @ router.weight.t()).t().sort().values
        gaps_EG = logits_ET.diff()
        quarter = gaps_EG.shape[1] // 4
        widest_E1 = gaps_EG[:, quarter:-quarter].argmax(1, keepdim=True) + quarter
        middle_E = (logits_ET.gather(1, widest_E1) + logits_ET.gather(1, widest_E1 + 1)).flatten() / 2
        is_optional_E = energies[router] <= energies[router].quantile(optional)
        assert router.bias is not None
        router.bias.data.copy_(torch.where(is_optional_E, -middle_E, 1 - logits_ET.min(1).values))

    hooks = [router.register_forward_pre_hook(settle) for router in routers(model)]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """A model's file in a precision, written when first asked for."""
    folder, cases = tmp_path_factory.mktemp("pretrained"), {}

    def find(name: str, precision: str) -> Case:
        key = name, precision
        if key not in cases:
            model, tokenizer = routed(name)
            path = folder / f"{name.partition('/')[2]}.{precision}.onnx"
            report = export_onnx(model, path, dtype=DTYPES[precision], kv_cache=name == SMOLLM2)
            assert len(report.sparse) == len(list(routers(model)))
            cases[key] = Case(model, tokenizer, path)
        return cases[key]

    return find


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def open_on(device: str, path: Path, library: str | None, profile: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors reach the test as exceptions
    options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if library is not None:
        options.register_custom_ops_library(library)
    # ONNX Runtime's own products use tf32 unless they are told not to.
    cuda: Any = (PROVIDERS["cuda"], {"use_tf32": "0"})
    session = ort.InferenceSession(str(path), options, providers=[cuda] * (device == "cuda") + [PROVIDERS["cpu"]])
    assert session.get_providers()[0] == PROVIDERS[device]
    return session


def check_placement(session: ort.InferenceSession, device: str, layers: int) -> None:
    """Prints where the nodes ran; every SparseFFN must have run on the device. Ends the session's profile."""
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    nodes = {
        e["name"]: (e["args"]["op_name"], e["args"]["provider"]) for e in events if "provider" in e.get("args", {})
    }
    sparse = Counter(provider for operator, provider in nodes.values() if operator == "SparseFFN")
    others = Counter(provider for operator, provider in nodes.values() if operator != "SparseFFN")
    elsewhere = Counter(operator for operator, provider in nodes.values() if provider != PROVIDERS[device])
    say(f"  SparseFFN: {dict(sparse)}; other nodes: {dict(others)}; of these elsewhere: {dict(elsewhere)}")
    assert sparse == ({PROVIDERS[device]: layers} if layers else {})


def relative(found: Any, wanted: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    difference = torch.from_numpy(np.asarray(found, np.float64)) - wanted.double().cpu()
    return float(difference.abs().max() / wanted.abs().max())


def test_minilm(precision: str, device: str, case: Export, ort_library: str, tmp_path: Path) -> None:
    exported = case(MINILM, precision)
    model = deepcopy(exported.model).to(device)
    for batch in (1, 3):
        inputs = encode(MINILM, exported.tokenizer, SENTENCES[:batch])
        with torch.no_grad(), trace_routers(model) as trace:
            wanted = model(**{name: value.to(device) for name, value in inputs.items()}).last_hidden_state
        for library in (None, ort_library):
            session = open_on(device, exported.path, library, tmp_path / "profile")
            found = run(session, inputs)["last_hidden_state"]
            kept = inputs["attention_mask"].bool()
            error = relative(found[kept.numpy()], wanted.cpu()[kept])
            say(f"MiniLM {precision} batch {batch} library {library is not None}: {error:.1e}, {trace.density():.2f}")
            check_placement(session, device, 0 if library is None else len(list(routers(model))))
            assert error <= TOLERANCE[precision]


@pytest.mark.parametrize("batch", [1, 3])
def test_smollm2(batch: int, precision: str, device: str, case: Export, ort_library: str, tmp_path: Path) -> None:
    exported = case(SMOLLM2, precision)
    model = deepcopy(exported.model).to(device, DTYPES[precision])
    inputs = encode(SMOLLM2, exported.tokenizer, PROMPTS[:batch])
    ids_BT, mask_BT = inputs["input_ids"].to(device), inputs["attention_mask"].to(device)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": NO_TOKEN}
    with torch.no_grad(), trace_routers(model) as trace:
        tokens_BT = model.generate(input_ids=ids_BT, attention_mask=mask_BT, **options).cpu()
        wanted = model(input_ids=ids_BT, attention_mask=mask_BT).logits.float().cpu()
    say(f"{exported.tokenizer.batch_decode(tokens_BT[:, -NEW_TOKENS:])}, density {trace.density():.2f}")
    for library in (None, ort_library):
        session = open_on(device, exported.path, library, tmp_path / "profile")
        generator = OrtGenerator(session)
        ids, mask = inputs["input_ids"].numpy(), inputs["attention_mask"].numpy()
        logits, _ = generator.step(ids, mask, generator.empty_cache(batch))
        error = relative(logits[mask.astype(bool)], wanted[inputs["attention_mask"].bool()])
        got = greedy_generate(generator.session, ids, mask, max_new_tokens=NEW_TOKENS)
        say(f"SmolLM2 {precision} batch {batch} library {library is not None}: {error:.1e}")
        check_placement(session, device, 0 if library is None else len(list(routers(model))))
        np.testing.assert_array_equal(got, tokens_BT.numpy())
        assert error <= TOLERANCE[precision]
