"""The direction of imports (architecture.md), checked by import-linter, and proof that each contract can fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = [
    ROOT / "editserver",
    ROOT / "interventions",
    ROOT / "sae_weights",
    ROOT / "clients/python/editserver_client",
]


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    """Run this repository's contracts on the packages in ``tree``, which hide the installed ones of the same name."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tree), str(ROOT / "clients/python"), str(ROOT)])}
    command = [
        Path(sys.executable).parent / "lint-imports",
        "--no-cache",
        "--no-logo",
        "--config",
        tree / "pyproject.toml",
    ]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def small_tree(tmp_path: Path) -> Path:
    """Four packages as small as possible that keep every contract, under the real contracts."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    modules = {
        "editserver/__init__.py": "import interventions\nimport sae_weights\n",
        "editserver/api.py": "import fastapi\nfrom vllm import SamplingParams\n",
        "editserver/engine/__init__.py": "",
        "editserver/engine/compat/__init__.py": "from vllm.v1.worker import gpu_model_runner\n",
        "interventions/__init__.py": "import sae_weights\nimport torch\n",
        "sae_weights/__init__.py": "import torch\n",
        "editserver_client/__init__.py": "import httpx\n",
    }
    for name, source in modules.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return tmp_path


def test_the_packages_keep_the_direction_of_imports() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_folder_of_modules_is_a_package() -> None:
    """import-linter and the wheel both pass over a folder without ``__init__.py``: nothing in it would be checked."""
    bare = {
        str(module.parent.relative_to(ROOT))
        for package in PACKAGES
        for module in package.rglob("*.py")
        if not (module.parent / "__init__.py").exists()
    }
    assert not bare


def test_a_tree_that_keeps_the_contracts_passes(small_tree: Path) -> None:
    result = lint_imports(small_tree)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "4 kept, 0 broken" in result.stdout


@pytest.mark.parametrize(
    ("module", "source", "broken"),
    [
        ("sae_weights/sae.py", "import interventions\n", "never the other way round BROKEN"),
        ("interventions/spec.py", "from editserver import api\n", "never the other way round BROKEN"),
        ("interventions/spec.py", "def f():\n    import vllm\n", "neither vLLM nor FastAPI BROKEN"),
        ("sae_weights/sae.py", "from fastapi import FastAPI\n", "neither vLLM nor FastAPI BROKEN"),
        ("editserver_client/sse.py", "import torch\n", "the HTTP contract only BROKEN"),
        ("editserver_client/sse.py", "import interventions\n", "the HTTP contract only BROKEN"),
        ("editserver/engine/plan.py", "from vllm.v1.core import sched\n", "imports vllm.v1 BROKEN"),
        ("editserver/engine/plan.py", "from vllm import v1\n", "imports vllm.v1 BROKEN"),
        ("editserver/api.py", "def f():\n    import vllm.v1.engine as e\n", "imports vllm.v1 BROKEN"),
        ("editserver/api.py", "import importlib\nimportlib.import_module('vllm.v1.core')\n", "imports vllm.v1 BROKEN"),
    ],
)
def test_a_forbidden_import_is_found(small_tree: Path, module: str, source: str, broken: str) -> None:
    (small_tree / module).write_text(source)
    result = lint_imports(small_tree)
    assert result.returncode == 1, result.stdout + result.stderr
    assert broken in " ".join(result.stdout.split())
