"""The commands' options. Work, and with it torch, is imported when a command runs, so that --help is quick."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from lte_compile.cli import options
from lte_compile.cli.options import TaskOptions
from lte_compile.cli.output import Outcome, emit, only_result_on_stdout
from lte_compile.config import FitTarget, Grouping, RouterKind, TransformConfig
from lte_compile.training.config import BudgetDraw, Gates, Teacher, TrainConfig


def _show(work: Callable[[], Outcome], as_json: bool) -> None:
    with only_result_on_stdout(as_json):
        outcome = work()
    emit(outcome, as_json=as_json)


def inspect(
    model: options.Model,
    graph: Annotated[Path | None, typer.Option(help="Draw one site's graph: .svg, .png or .pdf.")] = None,
    site: Annotated[int, typer.Option(help="Which site to draw, from 0.")] = 0,
    as_json: options.Json = False,
) -> None:
    """List a model's FFNs, and why every other linear layer is none."""

    def work() -> Outcome:
        from lte_compile.cli.inspecting import inspect_model

        return inspect_model(model, graph, site)

    _show(work, as_json)


def convert(
    model: options.Model,
    out: options.OutDirectory,
    expert_size: options.ExpertSize = 32,
    grouping: options.GroupingOption = Grouping.BALANCED_KMEANS,
    router: options.RouterOption = RouterKind.LINEAR,
    router_rank: options.RouterRank = None,
    seed: options.Seed = 0,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), fp32, fp16, bf16 or fp64.")] = "auto",
    task: Annotated[str, typer.Option(help="Text to run for --grouping coactivation; as in train.")] = "",
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Give every FFN a router; the model's function stays as it is, and plain transformers can still load it."""

    def work() -> Outcome:
        from lte_compile.cli.converting import ConvertSettings, convert_model

        settings = ConvertSettings(
            model=model,
            out=out,
            config=TransformConfig(
                expert_size=expert_size, grouping=grouping, seed=seed, router=router, router_rank=router_rank
            ),
            dtype=dtype,
            task=TaskOptions(name=task) if task else None,
            overwrite=overwrite,
        )
        return convert_model(settings)

    _show(work, as_json)


def train(
    model: options.Model,
    out: options.OutDirectory,
    task: options.Task,
    task_kind: options.TaskKindName = "",
    target_density: Annotated[float, typer.Option(help="Share of neurons to keep active.")] = 0.3,
    finetune_steps: options.FinetuneSteps = None,
    finetune_learning_rate: Annotated[
        float | None, typer.Option(help="Of fine-tuning.", show_default="--learning-rate")
    ] = None,
    stage1_steps: options.Stage1Steps = 270,
    stage2_steps: options.Stage2Steps = 135,
    learning_rate: options.LearningRate = 1e-4,
    router_learning_rate: options.RouterLearningRate = 3e-4,
    gates: options.GatesOption = Gates.STRAIGHT_THROUGH,
    separability: options.Separability = 0.0,
    eta: options.Eta = None,
    hold_density: options.HoldDensity = False,
    budget_range: options.BudgetRange = None,
    budget_draw: options.BudgetDrawOption = BudgetDraw.UNIFORM,
    budget_weight: options.BudgetWeight = 0.0,
    start_density: options.StartDensity = None,
    anneal: options.Anneal = 0.5,
    dropout: options.Dropout = None,
    fit_router: options.FitRouter = True,
    fit_target: options.FitTargetOption = FitTarget.ENERGY,
    distillation: options.Distillation = 0.0,
    temperature: options.Temperature = 1.0,
    layer_distillation: options.LayerDistillation = 0.0,
    batch_size: options.BatchSize = None,
    accumulation: options.Accumulation = 1,
    max_length: options.MaxLength = 64,
    window: options.Window = 256,
    test_examples: options.TestExamples = None,
    expert_size: options.ExpertSize = 32,
    grouping: options.GroupingOption = Grouping.BALANCED_KMEANS,
    router: options.RouterOption = RouterKind.LINEAR,
    router_rank: options.RouterRank = None,
    seed: options.Seed = 0,
    autocast: options.Autocast = False,
    compile: options.Compile = False,
    step_graphs: options.StepGraphs = False,
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing", help="Less memory.")] = False,
    measure_every: options.MeasureEvery = 10,
    checkpoint_every: options.CheckpointEvery = 100,
    resume: Annotated[bool, typer.Option(help="Go on from OUT/checkpoints, if there are any.")] = True,
    device: options.Device = "auto",
    shard: options.Shard = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Fine-tune if asked to, give FFNs routers, train through LTE's two stages, compare with dense, save."""

    given = locals()

    def work() -> Outcome:
        from lte_compile.cli.training import TrainSettings, train_model

        settings = options.picked(
            TrainSettings,
            given,
            task=options.picked(TaskOptions, given, name=task, kind=task_kind),
            transform=options.picked(TransformConfig, given),
            train=options.picked(TrainConfig, given),
        )
        return train_model(settings)

    _show(work, as_json)


def evaluate(
    model: options.Model,
    task: options.Task,
    task_kind: options.TaskKindName = "",
    density: Annotated[list[float] | None, typer.Option(help="Share of active neurons; may be repeated.")] = None,
    batch_size: options.BatchSize = None,
    max_length: options.MaxLength = 64,
    window: options.Window = 256,
    test_examples: options.TestExamples = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Measure accuracy, perplexity or ROUGE-L and density on the test split; validation places the thresholds."""

    task_options = options.picked(TaskOptions, locals(), name=task, kind=task_kind)

    def work() -> Outcome:
        from lte_compile.cli.evaluating import evaluate_model

        return evaluate_model(model, task_options, density or [], device)

    _show(work, as_json)


def compare(
    model: options.Model,
    task: options.Task,
    out: Annotated[Path, typer.Option(help="Directory of results, plots and checkpoints.")],
    task_kind: options.TaskKindName = "",
    densities: Annotated[str, typer.Option(help="Shares of neurons to keep, separated by commas.")] = "0.5,0.3,0.1",
    methods: Annotated[str, typer.Option(help="Names separated by commas, or all.")] = "all",
    seeds: Annotated[int, typer.Option(help="How many.")] = 1,
    first_seed: Annotated[int, typer.Option(help="The first of them.")] = 0,
    finetune_steps: options.FinetuneSteps = None,
    stage1_steps: options.Stage1Steps = 270,
    stage2_steps: options.Stage2Steps = 135,
    learning_rate: options.LearningRate = 1e-4,
    router_learning_rate: options.RouterLearningRate = 3e-4,
    gates: options.GatesOption = Gates.STRAIGHT_THROUGH,
    separability: options.Separability = 0.0,
    eta: options.Eta = None,
    hold_density: options.HoldDensity = False,
    budget_range: options.BudgetRange = None,
    budget_draw: options.BudgetDrawOption = BudgetDraw.UNIFORM,
    budget_weight: options.BudgetWeight = 0.0,
    start_density: options.StartDensity = None,
    anneal: options.Anneal = 0.5,
    dropout: options.Dropout = None,
    fit_router: options.FitRouter = True,
    fit_target: options.FitTargetOption = FitTarget.ENERGY,
    distillation: options.Distillation = 0.0,
    temperature: options.Temperature = 1.0,
    layer_distillation: options.LayerDistillation = 0.0,
    batch_size: options.BatchSize = None,
    accumulation: options.Accumulation = 1,
    max_length: options.MaxLength = 64,
    window: options.Window = 256,
    test_examples: options.TestExamples = None,
    expert_size: options.ExpertSize = 32,
    grouping: options.GroupingOption = Grouping.BALANCED_KMEANS,
    router: options.RouterOption = RouterKind.LINEAR,
    router_rank: options.RouterRank = None,
    autocast: options.Autocast = False,
    compile: options.Compile = False,
    step_graphs: options.StepGraphs = False,
    measure_every: options.MeasureEvery = 10,
    finetune_learning_rate: Annotated[
        float | None, typer.Option(help="Of fine-tuning.", show_default="the dense model's")
    ] = None,
    dense_learning_rate: Annotated[
        float | None, typer.Option(help="Of the dense model.", show_default="everybody's")
    ] = None,
    dense_distillation: Annotated[
        float, typer.Option(help="Weight of the fine-tuned model's outputs as targets of the dense model, 0 to 1.")
    ] = 0.0,
    dense_steps: Annotated[int | None, typer.Option(help="Of the dense model.", show_default="everybody's")] = None,
    teacher: Annotated[
        Teacher, typer.Option(help="Of distillation: what all start from, or the dense model trained as long as they.")
    ] = Teacher.DENSE,
    keep_models: Annotated[bool, typer.Option("--keep-models", help="Leave LTE's models in OUT/models.")] = False,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="End when all points are there, or when none is left to begin.")
    ] = True,
    checkpoint_every: options.CheckpointEvery = 500,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Train and run LTE and its baselines at several densities, with equal steps for all; table and trade-off plot.

    The same command in several processes, on one GPU or more, shares the runs out among them.
    """

    given = locals()

    def work() -> Outcome:
        from lte_compile.cli.comparing import CompareSettings, compare_methods

        settings = options.picked(
            CompareSettings,
            given,
            task=options.picked(TaskOptions, given, name=task, kind=task_kind),
            methods=options.listed(methods),
            densities=options.listed_numbers(densities, "--densities"),
            transform=options.picked(TransformConfig, given),
            train=options.picked(TrainConfig, given, target_density=0.5),  # set anew for every point
        )
        return compare_methods(settings)

    _show(work, as_json)


def export(
    model: options.Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A file (OUT.onnx), or a folder.")],
    target: Annotated[str, typer.Option(help="What loads a folder: onnxruntime or triton-server.")] = "onnxruntime",
    kv_cache: Annotated[bool, typer.Option("--kv-cache", help="With cache inputs and outputs, to generate.")] = False,
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp32",
    dynamic_axes: Annotated[str, typer.Option(help="batch_and_sequence, batch or none.")] = "batch_and_sequence",
    opset: Annotated[int, typer.Option(help="20 to 23.")] = 20,
    dense: Annotated[bool, typer.Option("--dense", help="Also export a model without routers.")] = False,
    custom_ops: options.CustomOps = None,
    device: Annotated[str, typer.Option(help="Where Triton's instances run: auto, cpu or cuda.")] = "auto",
    repository: Annotated[
        str | None, typer.Option(help="Where Triton sees the model repository.", show_default="the folder of OUT")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    as_json: options.Json = False,
) -> None:
    """Write an ONNX file or folder, run it in ONNX Runtime and compare it with torch."""

    def work() -> Outcome:
        from lte_compile.cli.exporting import ExportSettings, export_model
        from lte_compile.cli.preparing import find_library

        settings = ExportSettings(
            model=model,
            out=out,
            target=target,
            kv_cache=kv_cache,
            dtype=dtype,
            dynamic_axes=dynamic_axes,
            opset=opset,
            dense=dense,
            custom_ops=find_library(custom_ops),
            device=device,
            repository=repository,
            overwrite=overwrite,
        )
        return export_model(settings)

    _show(work, as_json)


def generate(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens.")] = 32,
    runtime: Annotated[str, typer.Option(help="torch, or ort (ONNX Runtime).")] = "torch",
    onnx: Annotated[
        Path | None,
        typer.Option(help="A file written by export --kv-cache, for --runtime ort.", show_default="MODEL's own"),
    ] = None,
    custom_ops: options.CustomOps = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Continue a text greedily."""

    def work() -> Outcome:
        from lte_compile.cli.generating import GenerateSettings, generate_text
        from lte_compile.cli.preparing import find_library

        settings = GenerateSettings(
            model=model,
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            runtime=runtime,
            onnx=onnx,
            custom_ops=find_library(custom_ops),
            device=device,
            stream=not as_json,
        )
        return generate_text(settings)

    _show(work, as_json)


def bench(
    subject: Annotated[str, typer.Argument(metavar="MODEL|WxF", help="A model, or a shape such as 576x1536.")],
    densities: Annotated[list[float] | None, typer.Option("--densities", help="May be repeated.")] = None,
    gated: Annotated[bool, typer.Option("--gated/--plain", help="Of a shape.")] = True,
    activation: Annotated[str, typer.Option(help="Of a shape.")] = "silu",
    biases: Annotated[bool, typer.Option("--biases/--no-biases", help="Of a shape.")] = False,
    expert_size: options.ExpertSize = 32,
    dtype: Annotated[str, typer.Option(help="fp32, fp16, bf16 or fp64.")] = "fp32",
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="torch's")] = None,
    seconds: Annotated[float, typer.Option(help="Measuring time per density.")] = 0.5,
    device: options.Device = "auto",
    explain: Annotated[bool, typer.Option("--explain", help="Each FFN's kernel, and why; time nothing.")] = False,
    tokens: Annotated[list[int] | None, typer.Option(help="With --explain. May be repeated.")] = None,
    as_json: options.Json = False,
) -> None:
    """Time one FFN for one token: dense against lte::sparse_ffn, router included."""

    def work() -> Outcome:
        from lte_compile.cli.benching import BenchSettings
        from lte_compile.cli.benching import bench as measure
        from lte_compile.cli.explaining import explain_kernels

        settings = BenchSettings(
            subject=subject,
            densities=densities or (0.05, 0.1, 0.2, 0.3, 0.5, 1.0),
            gated=gated,
            activation=activation,
            biases=biases,
            expert_size=expert_size,
            dtype=dtype,
            threads=threads,
            seconds=seconds,
            device=device,
        )
        return explain_kernels(settings, tokens, densities) if explain else measure(settings)

    _show(work, as_json)


def build_ort(
    out: Annotated[Path | None, typer.Option(help="Folder of the library.", show_default="the user's cache")] = None,
    compiler: Annotated[str | None, typer.Option(help="C++17.", show_default="CXX, else the system's")] = None,
    cuda: Annotated[
        bool | None,
        typer.Option("--cuda/--no-cuda", help="CUDA kernels.", show_default="where Triton is installed"),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Compile the library with which ONNX Runtime skips inactive experts."""

    def work() -> Outcome:
        from lte_compile.cli.building import build_library

        return build_library(out, compiler, cuda)

    _show(work, as_json)


def demo(
    out: Annotated[Path, typer.Option(help="Directory of the report.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Every part, with too few steps to mean anything.")] = False,
    as_json: options.Json = False,
) -> None:
    """The whole job on real weights: fine-tune, convert, train, compare, export, run in ONNX Runtime, report."""

    def work() -> Outcome:
        from lte_compile.cli.demonstrating import demonstrate

        return demonstrate(out, quick=quick)

    _show(work, as_json)
