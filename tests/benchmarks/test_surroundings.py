"""What the systems that are compared are started with."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.engine_process import BARE, surroundings

LISTED = """
from importlib.metadata import entry_points
from vllm import envs
for one in entry_points(group="vllm.general_plugins"):
    if one.name in envs.VLLM_PLUGINS:
        print(one.name, one.load().__module__)
"""


def plugins(plugin: str) -> set[str]:
    """Plugins that a process of such a system loads, and where they are."""
    ran = subprocess.run(
        [sys.executable, "-c", LISTED], env=surroundings(plugin), capture_output=True, text=True, check=True
    )
    return set(ran.stdout.splitlines())


@pytest.mark.parametrize("bare", [False, True])
def test_vanilla_has_the_room_that_editserver_has_unless_it_is_to_be_bare(
    bare: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BARE, "1" if bare else "0")
    room = set() if bare else {"room editserver.engine.compat.loops"}
    assert plugins("") == room
    assert plugins("editserver") == {"editserver editserver.engine.plugin"} | room
