"""Calls that map and unmap memory: where they do, and that they do not below a function with room."""

import gc
import resource
from collections.abc import Callable

import pytest
from vllm.v1.engine.core import DPEngineCoreProc, EngineCoreProc
from vllm.v1.executor.multiproc_executor import WorkerProc

from editserver.engine.compat import loops
from editserver.engine.frames import with_room

CALLS = 500
DEPTHS = range(240)  # of frames of about 100 bytes: more than one chunk of 16 KiB


def faults(depth: int) -> int:
    """Page faults while a loop that is ``depth`` calls further down calls :data:`CALLS` times."""
    if depth:
        return faults(depth - 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(CALLS):
        two(three)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def two(inner: Callable[[int], int]) -> int:
    return inner(1) + inner(2)


def three(x: int) -> int:
    return x + 1


def worst() -> int:
    gc.disable()
    try:
        return max(faults(depth) for depth in DEPTHS)
    finally:
        gc.enable()


def test_some_depth_maps_memory_at_every_call_and_none_does_where_there_is_room() -> None:
    assert worst() >= CALLS
    assert with_room(worst)() < CALLS / 2


def test_arguments_results_names_and_errors_pass_through() -> None:
    def divide(a: float, *, by: float) -> float:
        """Text."""
        return a / by

    roomy = with_room(divide)
    assert roomy(6, by=4) == 1.5
    assert (roomy.__name__, roomy.__doc__) == ("divide", "Text.")
    with pytest.raises(ZeroDivisionError):
        roomy(1, by=0)


def test_the_loops_of_vllms_processes_are_wrapped_once() -> None:
    loops.install()
    found = [WorkerProc.worker_busy_loop, EngineCoreProc.run_busy_loop, DPEngineCoreProc.run_busy_loop]
    assert all(getattr(loop, "editserver", False) for loop in found)
    loops.install()
    assert found == [WorkerProc.worker_busy_loop, EngineCoreProc.run_busy_loop, DPEngineCoreProc.run_busy_loop]
