"""The GPU benchmark is a script that someone will start on a machine that is paid by the hour: it must not stop half way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "gpu" / "kernels.py"
ALONE = """
import runpy, sys
for name in ("fastapi", "msgspec", "numba", "pydantic", "safetensors", "transformers", "vllm", "yaml"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script where nothing is installed but PyTorch and Triton."""


@pytest.mark.slow
def test_it_runs_to_its_end_under_the_interpreter(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    command = [sys.executable, "-c", ALONE, str(SCRIPT), "--interpret", "--tiny", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert {(line["phase"], line["latents"]) for line in report["results"]} == {
        (phase, latents) for phase in ("decode", "prompt") for latents in (0, 1, 2)
    }
    assert all(value is not False for check in report["checks"].values() for value in check.values())
    assert report["widths"]
    assert not report["skipped"]
    assert not report["wrong"]


def test_its_help_needs_nothing() -> None:
    without = ALONE.replace('"fastapi"', '"torch", "triton", "numpy", "fastapi"')
    done = subprocess.run([sys.executable, "-c", without, str(SCRIPT), "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "us_per_layer" in done.stdout
