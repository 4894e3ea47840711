"""Converting a checkpoint that need not fit into memory: one weight matrix at a time goes from old files to new ones.

The model is built on the meta device, where its FFNs are found and get routers. Then, FFN by FFN, neurons are grouped,
and every parameter that follows them is read, reordered and written to its place in an output file of the same name.
All other tensors are copied. The result is, down to the bit, what `transform` and `save_pretrained` would have written.

Shapes: D model width, F neurons, E experts.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lte_compile.checkpoints.persistence import (
    CONFIG_FILE,
    INDEX_FILE,
    move_into_place,
    read_json,
    refuse_pickles,
    staging,
    weight_files,
)
from lte_compile.checkpoints.streaming_files import DTYPES, Shard, open_shard
from lte_compile.checkpoints.streaming_output import Output, check_space
from lte_compile.config import Grouping, TransformConfig
from lte_compile.grouping import GroupingRequest, group_neurons, is_finite
from lte_compile.passes.ir import FfnSite
from lte_compile.rewriting.permutation import projection_rows, reorderings
from lte_compile.routing.linear_fit import centroid_router
from lte_compile.routing.router import Router, require_routers
from lte_compile.transform import transform

OnSite = Callable[[FfnSite], None]


@dataclass(frozen=True)
class StreamPlan:
    """A checkpoint and what is to become of it.

    `model` is on the meta device and has its routers. `keys` maps each parameter that is rewritten to the names it has
    in the files (several where tied weights were saved twice), `shard_of` a name to the file that holds it.
    """

    source: Path
    model: nn.Module
    config: TransformConfig
    shards: tuple[Shard, ...]
    shard_of: Mapping[str, Shard]
    keys: Mapping[str, tuple[str, ...]]
    unused: frozenset[str]

    @property
    def routers(self) -> tuple[Router, ...]:
        return require_routers(self.model)

    @property
    def parameters(self) -> int:
        """How many numbers the dense model has; tied ones count once."""
        added = sum(parameter.numel() for router in self.routers for parameter in router.parameters())
        return sum(parameter.numel() for parameter in self.model.parameters()) - added


def convert_checkpoint(
    source: str | Path,
    out: str | Path,
    config: TransformConfig | None = None,
    *,
    dtype: torch.dtype | None = None,
    on_site: OnSite | None = None,
) -> StreamPlan:
    """Convert the transformers checkpoint in directory `source` to one with routers in `out`, weight by weight.

    Memory: one weight matrix, the same reordered, and what the grouping needs (docs/cli.md), whatever the model's size.

    Args:
        config: see `TransformConfig`; any grouping that looks at weights only.
        dtype: of the result; by default the checkpoint's.
        on_site: called after each FFN.

    Raises:
        ValueError: no FFN, damaged or pickled weights, or a checkpoint that can only be converted in memory (says why).
        RuntimeError: the result does not fit on the disk. In every case `out` is as it was.
    """
    plan = plan_stream(Path(source), config or TransformConfig(), dtype=dtype)
    if isinstance(plan, str):
        raise ValueError(f"{source} cannot be converted piece by piece: {plan}; load it and call lte_compile.transform")
    run_stream(plan, Path(out), on_site)
    return plan


def plan_stream(source: Path, config: TransformConfig, *, dtype: torch.dtype | None = None) -> StreamPlan | str:
    """Find the FFNs and their tensors, reading headers only; or say why the model has to be loaded to be converted.

    Raises:
        ValueError: what `transform` refuses, and damaged or pickled weights.
    """
    from lte_compile.checkpoints.loading import load_on_meta  # imports transformers, which takes seconds

    if config.grouping is Grouping.COACTIVATION:
        return "grouping 'coactivation' runs the model"
    shards = _checked_shards(source)
    model, info = load_on_meta(source, dtype=dtype)
    if missing := sorted(info["missing_keys"]):
        return f"the checkpoint lacks {missing[0]}, which is drawn at random when the model is loaded"
    dense_names = set(model.state_dict())
    try:
        transform(model, replace(config, grouping=Grouping.CONTIGUOUS))  # there are no weights to group by yet
    except RuntimeError as error:  # what tracers raise on control flow that depends on data
        return f"the model cannot be traced without its weights ({str(error).splitlines()[0]})"
    for router in require_routers(model):
        router.config = replace(router.config, grouping=config.grouping)
    shard_of = {name: shard for shard in shards for name in shard.entries}
    keys = _names_in_files(model, shard_of)
    plan = StreamPlan(source, model, config, shards, shard_of, keys, frozenset(info["unexpected_keys"]))
    return _obstacle(plan, dense_names) or plan


def _checked_shards(source: Path) -> tuple[Shard, ...]:
    """The checkpoint's files, whose headers are sound; a ValueError if they are none to convert."""
    if not (source / CONFIG_FILE).is_file():
        raise ValueError(f"{source} is not a model directory: it holds no {CONFIG_FILE}")
    quantized = (read_json(source / CONFIG_FILE).get("quantization_config") or {}).get("quant_method", "lte")
    if quantized != "lte":
        raise ValueError(f"{source} is quantized ({quantized}); convert the model it was made from, then quantize that")
    paths = weight_files(source)
    if not paths:
        refuse_pickles(source)
        raise ValueError(f"{source} holds no safetensors weights")
    if strays := [path for path in paths if path.parent != source or path.name in ("", "..")]:
        raise ValueError(f"{source / INDEX_FILE} names a file outside of the checkpoint: {strays[0]}")
    return tuple(open_shard(path) for path in paths)


def _names_in_files(model: nn.Module, shard_of: Mapping[str, Shard]) -> dict[str, tuple[str, ...]]:
    """Each parameter of an FFN under all names by which the model knows it and the files hold it."""
    state = model.state_dict(keep_vars=True)
    aliases: dict[int, list[str]] = {}
    for name, tensor in state.items():
        aliases.setdefault(id(tensor), []).append(name)
    wanted = dict.fromkeys(name for router in require_routers(model) for name in router.site.parameters)
    return {name: tuple(alias for alias in aliases[id(state[name])] if alias in shard_of) for name in wanted}


def _obstacle(plan: StreamPlan, dense_names: set[str]) -> str | None:
    """Why the files' tensors are not the model's parameters, one for one."""
    state = plan.model.state_dict()
    router_names = {f"{router.site.router_path}.{name}" for router in plan.routers for name in router.state_dict()}
    if more := sorted(set(state) - dense_names - router_names):
        return f"the rewrite adds {more[0]}, which is no router's"
    for name, keys in plan.keys.items():
        if not keys:
            return f"{name} goes by another name in the files, or is put together from several tensors"
        for key in keys:
            entry = plan.shard_of[key].entries[key]
            if entry.shape != tuple(state[name].shape) or entry.dtype not in DTYPES:
                return f"the files hold {key} as {entry.dtype} {list(entry.shape)}, not {list(state[name].shape)}"
    return None


def run_stream(plan: StreamPlan, out: Path, on_site: OnSite | None = None) -> None:
    """Write the converted checkpoint. Until it is complete everything has temporary names.

    Raises:
        ValueError: `out` cannot be written, or weights are NaN, infinite or cut short.
        RuntimeError: the disk is full.
    """
    with staging(out) as staged, _disk_errors(out):
        check_space(plan.shards, staged)
        output = Output.create(plan.shards, staged, plan.model, plan.keys, plan.unused)
        for router in plan.routers:
            _convert_site(plan, router, output)
            if on_site is not None:
                on_site(router.site)
        output.copy_the_rest(plan.source)
        move_into_place(staged, out)


def _convert_site(plan: StreamPlan, router: Router, output: Output) -> None:
    order_F = _group(plan, router, output)
    site = router.site
    steps = reorderings(site, order_F, lambda name: plan.model.get_parameter(name).shape)
    for name in site.parameters:
        tensor = _read(plan, name)
        if not is_finite(tensor):
            raise ValueError(f"{name} holds NaN or infinity; repair the weights before converting")
        for step in steps:
            if step.parameter == name:
                tensor = step.of(tensor)
        for key in plan.keys[name]:
            output.write(key, tensor)


def _group(plan: StreamPlan, router: Router, output: Output) -> Tensor:
    """The order of a site's neurons; its router's first weights are written on the way."""
    site = router.site
    with _loaded(plan, site.gate or site.up):
        rows_FD = projection_rows(plan.model, site)
        order_F = group_neurons(
            GroupingRequest(
                method=plan.config.grouping,
                weights_FD=rows_FD,
                expert_size=plan.config.expert_size,
                seed=plan.config.seed,
                name=site.name or "the model's FFN",
            )
        )
        weight_ED, bias_E = centroid_router(rows_FD[order_F], plan.config.expert_size)
    for name, tensor in router.initial_state(weight_ED, bias_E).items():
        output.write(f"{site.router_path}.{name}", tensor.to(router.weight.dtype))
    return order_F


@contextmanager
def _loaded(plan: StreamPlan, name: str) -> Iterator[None]:
    """Inside the block the model's parameter of that name has its data."""
    owner, _, attribute = name.rpartition(".")
    parameters: dict[str, Any] = plan.model.get_submodule(owner)._parameters
    without_data = parameters[attribute]
    parameters[attribute] = nn.Parameter(_read(plan, name), requires_grad=False)
    try:
        yield
    finally:
        parameters[attribute] = without_data


def _read(plan: StreamPlan, name: str) -> Tensor:
    """A parameter in the dtype it is to have."""
    key = plan.keys[name][0]
    return plan.shard_of[key].read(key).to(plan.model.get_parameter(name).dtype)


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(out.parent if out.parent.is_dir() else Path.cwd()).free
        raise RuntimeError(
            f"cannot write to {out}: {error.strerror or error} ({free / 2**30:.1f} GB are free there); nothing was kept"
        ) from error
