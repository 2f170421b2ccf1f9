"""Whose turn it is not, stands still: a vLLM worker spins for a second after its last step, on a core that others need."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import psutil

SETTLE_SECONDS = 0.05


class Family:
    """A process and everything that it started, held and released together."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.held = False

    def hold(self) -> None:
        """Stop it (SIGSTOP) where it is; it must not be at work."""
        if not self.held:
            self.held = True
            for one in self._members():
                one.suspend()

    def release(self) -> None:
        """Let it go on (SIGCONT), and find its feet."""
        if self.held:
            self.held = False
            for one in self._members():
                one.resume()
            time.sleep(SETTLE_SECONDS)

    def end(self, patience: float = 30.0) -> None:
        """Wait until they have all ended by themselves; after ``patience`` seconds they are told to, and then made to."""
        self.release()
        members = list(self._members())
        _, running = psutil.wait_procs(members, patience)
        for last in ("terminate", "kill"):
            for one in running:
                with contextlib.suppress(psutil.NoSuchProcess):
                    getattr(one, last)()
            _, running = psutil.wait_procs(running, 5.0)

    def _members(self) -> Iterator[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self._pid)
            for one in (parent, *parent.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    yield one
