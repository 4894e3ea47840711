"""What LTE is compared with (docs/baselines.md). Each method is one registered function in a file of its own.

Adding one: write `@method("name", ...) def name(bench) -> at` (see registry.py), import it here, and test it.
"""

from lte_compile.baselines.cats import cats
from lte_compile.baselines.deja_vu import deja_vu
from lte_compile.baselines.dense import dense
from lte_compile.baselines.ffn_free import ffn_free, remove_ffns
from lte_compile.baselines.kla import kla, oracle_selection
from lte_compile.baselines.lte import lte
from lte_compile.baselines.lte_range import lte_range
from lte_compile.baselines.moefication import moefication_oracle
from lte_compile.baselines.moefication_router import moefication
from lte_compile.baselines.noisy_topk import noisy_topk
from lte_compile.baselines.random_router import random_router
from lte_compile.baselines.registry import METHODS, AtDensity, Granularity, Method, Needs, find_method, method
from lte_compile.baselines.teal import teal
from lte_compile.baselines.workbench import Workbench

__all__ = [
    "METHODS",
    "AtDensity",
    "Granularity",
    "Method",
    "Needs",
    "Workbench",
    "cats",
    "deja_vu",
    "dense",
    "ffn_free",
    "find_method",
    "kla",
    "lte",
    "lte_range",
    "method",
    "moefication",
    "moefication_oracle",
    "noisy_topk",
    "oracle_selection",
    "random_router",
    "remove_ffns",
    "teal",
]
