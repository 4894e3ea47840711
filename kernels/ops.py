"""Importing this module registers every op of the `lte` namespace."""

from __future__ import annotations

from lte_compile.kernels.expert_ffn import expert_ffn
from lte_compile.kernels.gate_hidden import gate_hidden
from lte_compile.kernels.route import route
from lte_compile.kernels.router_features import router_features
from lte_compile.kernels.selection import select
from lte_compile.kernels.separability import separability
from lte_compile.kernels.sparse_ffn import sparse_ffn

__all__ = ["expert_ffn", "gate_hidden", "route", "router_features", "select", "separability", "sparse_ffn"]
