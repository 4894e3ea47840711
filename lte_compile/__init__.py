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

from lte_compile.calibration import calibrate, collect_activations, fit_routers, set_density
from lte_compile.config import Grouping, Stage, TransformConfig
from lte_compile.evaluation import Evaluation, evaluate
from lte_compile.explanation import KernelOfSite, explain
from lte_compile.graph import graph
from lte_compile.hf_registration import register_with_transformers
from lte_compile.inspection import Inspection, inspect
from lte_compile.layouts import set_layout
from lte_compile.ort_library import build_ort_library, ort_library_path
from lte_compile.passes.ir import FfnSite, Rejection
from lte_compile.persistence import load_pretrained, save_pretrained
from lte_compile.routing import Router, routers, set_stage
from lte_compile.sensitivity import fit_routers_to_effects
from lte_compile.tracing import RouterTrace, trace_routers
from lte_compile.train_config import TrainConfig
from lte_compile.training import train
from lte_compile.transform import transform

if TYPE_CHECKING:
    from lte_compile.hf_trainer import LteTrainer
    from lte_compile.onnx_api import export_onnx
    from lte_compile.onnx_folders import export_folder
    from lte_compile.streaming import convert_checkpoint

__version__ = "0.1.0"

# Names whose modules need an optional extra (pyproject.toml); imported when first used.
_LAZY = {
    "LteTrainer": "lte_compile.hf_trainer",
    "convert_checkpoint": "lte_compile.streaming",
    "export_folder": "lte_compile.onnx_folders",
    "export_onnx": "lte_compile.onnx_api",
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
