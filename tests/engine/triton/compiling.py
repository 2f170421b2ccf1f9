"""Kernels compiled for a GPU on a machine without one, in a process of their own: this one may have them interpreted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
needs_assembler = pytest.mark.skipif(not (TOOLS / "ptxas").exists(), reason="Triton is here without its assembler")

SCRIPT = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

paths = []

def kind(name, constants, kinds):
    if name in constants:
        return "constexpr"
    return next((kind for kind, names in kinds.items() if name in names), "*i32")

def compiled(function, constants, warps, kinds):
    signature = {p.name: kind(p.name, constants, kinds) for p in function.params}
    aligned = {(i,): [["tt.divisibility", 16]] for i, k in enumerate(signature.values()) if k.startswith("*")}
    options = {"num_warps": warps, "enable_fp_fusion": False}
    made = triton.compile(ASTSource(function, signature, constants, aligned), target=GPUTarget("cuda", 90, 32), options=options)
    paths.append(f"{sys.argv[1]}/{len(paths)}-{function.__name__}.cubin")
    open(paths[-1], "wb").write(made.asm["cubin"])

%s
print(json.dumps(paths))
"""


def compiled(script: str, folder: Path) -> list[str]:
    """Paths of the binaries for sm_90 that ``script`` makes by calls of ``compiled(kernel, constants, warps, kinds)``, where
    ``kinds`` are types and names of the arguments that have them; pointers to int32 need not be named."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-c", SCRIPT % script, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    paths: list[str] = json.loads(done.stdout.splitlines()[-1])
    return paths


def check_registers(path: str) -> None:
    """It spills nothing."""
    command = [TOOLS / "cuobjdump", "--dump-resource-usage", path]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "STACK:0" in told.stdout, (path, told.stdout)
    assert "LOCAL:0" in told.stdout, (path, told.stdout)
