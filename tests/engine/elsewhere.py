"""Tests run in a process of their own, under a pytest plugin that makes another machine of it."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from tests.engine.tiny import REPOSITORY

PROBLEMS = ("failure", "error", "skipped")


def cases_in(module: ModuleType) -> list[str]:
    """The tests of a module of this folder, as :func:`run_elsewhere` takes them."""
    return [f"{module.__name__.rpartition('.')[2]}.py::{name}" for name in vars(module) if name.startswith("test_")]


def run_elsewhere(plugin: str, names: Sequence[str], folder: Path) -> dict[str, str]:
    """Test (``module.py::name`` of this folder) → what became of it, "" for passed.

    Raises:
        RuntimeError: the process ended without a report.
    """
    report = folder / "report.xml"
    flags = ["-q", "-p", plugin, "-p", "no:cacheprovider", f"--junitxml={report}"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "PYTEST_"))}
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *flags, *(f"tests/engine/{name}" for name in names)],
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": path},
        cwd=REPOSITORY,
        timeout=1500,
        check=False,
    )
    if not report.exists():
        raise RuntimeError(f"the process ended with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")
    found = {}
    for case in ET.parse(report).iter("testcase"):
        problems = [f"{child.tag}: {child.get('message')}" for child in case if child.tag in PROBLEMS]
        found[f"{case.get('classname', '').rpartition('.')[2]}.py::{case.get('name')}"] = "; ".join(problems)
    return found
