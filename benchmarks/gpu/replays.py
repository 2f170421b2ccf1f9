"""Captured graphs, and how long their replays take when they take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

WINDOW_MS, MOST_AT_ONCE = 12.0, 16
"""Replays that are timed together: as many as take that long, so that starting the first of them counts for little."""

FEWEST, ENOUGH, PATIENCE = 5, 15, 6
"""Rounds of a measurement: FEWEST at least; ENOUGH where PATIENCE times the seconds that it was given do for that."""


class Replay:
    """A captured graph, or under the interpreter the call itself."""

    def __init__(self, call: Callable[[], None], device: torch.device) -> None:
        self._graph = None
        if device.type != "cuda":
            self._call = call
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, and lets cuBLAS choose: neither may happen under capture
                call()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            call()
        self._call = self._graph.replay

    def __call__(self) -> None:
        self._call()

    def ms(self, at_once: int = 1) -> float:
        """One replay, by device events around several: the host is then ahead of the device."""
        if self._graph is None:
            began = time.perf_counter()
            self._call()
            return (time.perf_counter() - began) * 1e3
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(at_once):
            self._call()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / at_once


def in_turns(replays: Sequence[Replay], seconds: float) -> list[list[float]]:
    """Milliseconds of each, round by round, taken in turns, so that a drift of the clock meets all alike; 0 seconds: one round."""
    times: list[list[float]] = [[] for _ in replays]
    slowest = max(replay.ms() for replay in replays)
    at_once = max(1, min(MOST_AT_ONCE, int(WINDOW_MS / slowest))) if seconds else 1
    began = time.perf_counter()
    while True:
        for replay, mine in zip(replays, times, strict=True):
            mine.append(replay.ms(at_once))
        rounds, passed = len(times[0]), time.perf_counter() - began
        enough = passed > (PATIENCE * seconds if rounds < ENOUGH else seconds)
        if not seconds or (rounds >= FEWEST and enough):
            return times
