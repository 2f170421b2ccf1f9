"""What all tests start with, and which of several processes runs which.

Before anything loads torch, threads that wait for each other are told to sleep instead of spinning: several engines and their
tests share few cores; with spinning barriers each of them slows the others down twentyfold.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("KMP_BLOCKTIME", "0")
os.environ.pop("COLUMNS", None)  # or commands that run in this process have the width of whatever started it

ENGINES = [
    "gates",
    "memory",
    "mutants",
    "neighbours",
    "noop",
    "oracle",
    "prefix_cache",
    "rules",
    "schedule",
    "smoke",
    "speculation",
]
TOGETHER = {"tests/api/": "server", **{f"tests/engine/test_{name}.py": "engine" for name in ENGINES}}
"""What shares a server or an engine, by the beginning of its path: one process runs it all. Else a module is run by one."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of several processes, which one runs a test (``make test``; a plain ``pytest`` has one and does not ask)."""
    from xdist.scheduler import LoadScopeScheduling

    class ByWhatTestsShare(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.partition("::")[0]
            return next((shared for begins, shared in TOGETHER.items() if module.startswith(begins)), module)

    return ByWhatTestsShare(config, log)
