"""lte_compile: learned FFN sparsity for transformers, done as a compiler.

    import lte_compile as lte

    model = lte.transform(model)             # every FFN becomes a router plus experts; outputs stay as they were
    lte.fit_routers(model, batches, 0.3)     # routers that select 30 % of the neurons, from data
    lte.train(model, ...)                    # LTE's two stages
    lte.set_stage(model, "hard")             # run only the selected experts
    lte.export_onnx(model, "model.onnx")

See README.md and docs/design.md.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lte_compile.calibration.density import calibrate, set_density
from lte_compile.calibration.effects import fit_routers_to_effects
from lte_compile.calibration.fitting import fit_routers
from lte_compile.calibration.watching import collect_activations
from lte_compile.checkpoints.persistence import load_pretrained, save_pretrained
from lte_compile.config import Grouping, Stage, TransformConfig
from lte_compile.evaluation.quality import Evaluation, evaluate
from lte_compile.huggingface.registration import register_with_transformers
from lte_compile.inspection.graphs import graph
from lte_compile.inspection.kernels import KernelOfSite, explain
from lte_compile.inspection.sites import Inspection, inspect
from lte_compile.passes.ir import FfnSite, Rejection
from lte_compile.rewriting.layouts import set_layout
from lte_compile.routing.router import Router, routers, set_stage
from lte_compile.running.tracing import RouterTrace, trace_routers
from lte_compile.serving.ort_library import build_ort_library, ort_library_path
from lte_compile.training.config import TrainConfig
from lte_compile.training.loop import train
from lte_compile.transform import transform

if TYPE_CHECKING:
    from lte_compile.checkpoints.streaming import convert_checkpoint
    from lte_compile.huggingface.trainer import LteTrainer
    from lte_compile.serving.folders import export_folder
    from lte_compile.serving.onnx_file import export_onnx

__version__ = "0.1.0"

# Names whose modules need an optional extra (pyproject.toml); imported when first used.
_LAZY = {
    "LteTrainer": "lte_compile.huggingface.trainer",
    "convert_checkpoint": "lte_compile.checkpoints.streaming",
    "export_folder": "lte_compile.serving.folders",
    "export_onnx": "lte_compile.serving.onnx_file",
}


# Plain from_pretrained restores sparse models from here on.
register_with_transformers()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'lte_compile' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


__all__ = [
    "Evaluation",
    "FfnSite",
    "Grouping",
    "Inspection",
    "KernelOfSite",
    "LteTrainer",
    "Rejection",
    "Router",
    "RouterTrace",
    "Stage",
    "TrainConfig",
    "TransformConfig",
    "__version__",
    "build_ort_library",
    "calibrate",
    "collect_activations",
    "convert_checkpoint",
    "evaluate",
    "explain",
    "export_folder",
    "export_onnx",
    "fit_routers",
    "fit_routers_to_effects",
    "graph",
    "inspect",
    "load_pretrained",
    "ort_library_path",
    "routers",
    "save_pretrained",
    "set_density",
    "set_layout",
    "set_stage",
    "trace_routers",
    "train",
    "transform",
]
