"""A system whose turn it is not takes no time from the others, nor does anything that it started."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time

import psutil

from benchmarks.processes import Family

SPIN = "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'while True: pass']); child.wait()"


def _spent(processes: list[psutil.Process]) -> float:
    return sum(one.cpu_times().user for one in processes)


def test_a_held_family_spends_nothing_and_goes_on_when_it_is_released():
    process = subprocess.Popen([sys.executable, "-c", SPIN])
    members: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 30
        parent = psutil.Process(process.pid)
        while len(members) < 2 or _spent(members[1:]) < 0.05:
            assert time.monotonic() < deadline
            time.sleep(0.02)
            members = [parent, *parent.children(recursive=True)]
        family = Family(process.pid)
        family.hold()
        time.sleep(0.05)
        before = _spent(members)
        time.sleep(0.3)
        assert _spent(members) == before
        family.release()
        while _spent(members) == before:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        family.hold()
        family.end(patience=0.0)
        process.wait(10)
        assert not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in members)
    finally:
        for one in reversed(members):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.kill()
        process.wait()
