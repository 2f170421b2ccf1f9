"""Keeps slow memory from the systems that are compared, by holding it.

A virtual machine's memory may be fast in one place and half as fast in another (pages that its host keeps small, or on
another node), and a process that landed in the wrong place is slow for its life, whatever it does. Here nearly all free
memory is taken as large pages, each is timed, and only those are given back that are about as fast as the others.
"""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import psutil
from rich.console import Console

from benchmarks.engine_process import ROOT

PAGE = 2 << 20
PASSES = 6
CUT = 0.85
"""Of the speed that a tenth of all pages surpass: what is slower is held."""
LEFT_FREE = 1 << 30


def slow(seconds: np.ndarray) -> np.ndarray:
    """Which pages are to be held: bool ``[pages]``, from ``seconds [passes, pages]`` that reading each took."""
    speed = 1.0 / np.median(seconds, axis=0)
    return np.asarray(speed < CUT * np.percentile(speed, 90))


def time_pages(words: np.ndarray, passes: int = PASSES) -> np.ndarray:
    """Seconds ``[passes, pages]`` that reading each page of ``words [pages, …]`` takes, page after page, pass after pass."""
    took = np.empty((passes, len(words)))
    for one in took:
        for i, page in enumerate(words):
            before = time.perf_counter()
            page.max()
            one[i] = time.perf_counter() - before
    return took


@contextmanager
def held(console: Console) -> Iterator[dict[str, float]]:
    """Slow memory is held, by a process of its own; yields the GiB that were timed and those that are held.

    Raises:
        RuntimeError: memory could not be timed.
    """
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.slow_memory"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with console.status("nearly all free memory is timed: a minute or two …"):
                said = process.stdout.readline()
            if not said:
                raise RuntimeError("memory could not be timed; run without --hold-slow-memory")
            gib = json.loads(said)
            console.print(f"[dim]slow memory is held: {gib['held_gib']:g} of {gib['timed_gib']:g} GiB[/dim]")
            yield gib
        finally:
            process.stdin.close()
            process.wait()


def hold(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Take ``n`` pages and give the fast ones back; their words, uint64 ``[n, PAGE / 8]``, and which are held, bool ``[n]``.

    A held page has ones in its first words; one that was given back reads as zeros.
    """
    memory = mmap.mmap(-1, (n + 1) * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    words = np.frombuffer(memory, np.uint64)
    first = -words.ctypes.data % PAGE
    pages = words[first // 8 : first // 8 + n * (PAGE // 8)].reshape(n, -1)
    pages[:, :: mmap.PAGESIZE // 8] = 1
    kept = slow(time_pages(pages))
    for i in np.flatnonzero(~kept):
        memory.madvise(mmap.MADV_DONTNEED, first + int(i) * PAGE, PAGE)
    return pages, kept


def main() -> None:
    """Hold what is slow until standard input ends."""
    pages, kept = hold((psutil.virtual_memory().available - LEFT_FREE) // PAGE)
    gib = {"timed_gib": round(len(pages) * PAGE / 2**30, 1), "held_gib": round(int(kept.sum()) * PAGE / 2**30, 1)}
    print(json.dumps(gib), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
