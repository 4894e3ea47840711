"""Kernels compiled for a GPU that need not be there: their PTX, and what the assembler says of it."""

from __future__ import annotations

import os
import re
import subprocess
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def compile_ptx(kernel: Any, types: dict[str, Any], constants: dict[str, Any], capability: int, warps: int) -> str:
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants and types[n][:1] == "*"
    }
    source = ASTSource(
        fn=kernel, signature=signature, constexprs={(names.index(n),): v for n, v in constants.items()}, attrs=aligned
    )
    target = GPUTarget("cuda", capability, 32)
    ptx: str = triton.compile(source, target=target, options={"num_warps": warps}).asm["ptx"]
    return ptx


def spilled_bytes(ptx: str, capability: int) -> int:
    """What the ptxas that Triton ships reports."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    architecture = sm_arch_from_capability(capability)
    command = [get_ptxas(capability).path, "-v", f"-arch={architecture}", "-o", os.devnull, "/dev/stdin"]
    done = subprocess.run(command, input=ptx, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts = re.findall(r"(\d+) bytes spill", done.stderr)
    assert counts, done.stderr
    return sum(map(int, counts))
