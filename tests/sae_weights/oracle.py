"""Runs a script beside this file with the interpreter that has sae-lens and other authors' published code.

That environment is ``make setup-oracle``'s. Without it these tests fail; they are skipped only if
EDITSERVER_SKIP_ORACLE=1 says so.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ORACLE = Path(os.environ.get("EDITSERVER_ORACLE_PYTHON", ROOT / ".venv-oracle" / "bin" / "python"))

needs_oracle = [
    pytest.mark.oracle,
    pytest.mark.skipif(os.environ.get("EDITSERVER_SKIP_ORACLE") == "1", reason="EDITSERVER_SKIP_ORACLE=1"),
]
"""``pytestmark`` of a module whose tests all ask the oracle."""


def run_oracle(script: str, work: Path, *arguments: str) -> None:
    """``python SCRIPT WORK ARGUMENTS…`` with the oracle's interpreter; fails with its output if it fails."""
    assert ORACLE.exists(), f"{ORACLE} is missing: run `make setup-oracle` (or set EDITSERVER_SKIP_ORACLE=1)"
    found = Path(__file__).parent / script
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [str(ORACLE), str(found), str(work), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
