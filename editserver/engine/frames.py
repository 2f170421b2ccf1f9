"""Room for Python's frames, so that no call inside a step waits for memory to be mapped.

CPython keeps the frames of Python functions one after another in chunks of 16 KiB (``Objects/obmalloc.c``,
``Python/pystate.c``: ``push_chunk``; 3.11 and later). A frame that does not fit into the last one begins another, which is mapped
for it and unmapped as soon as it returns. Where the depth of a loop happens to be such that the calls in it are the ones that do
not fit, *each* of them costs a mapping, a page fault, cleared memory and the unmapping, which the other threads' translation
caches have to be told of. A step of a model calls some functions per layer: in vLLM's CPU worker (0.32, one process per rank) their
depth is the unlucky one, and a step has several faults per layer.

The chunk that is begun for a frame is as large as that frame needs, and more; what is left of it serves the frames inside.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

SLOTS = 16_384
"""Of 8 bytes: 128 KiB, for which CPython maps 256 KiB; the other half is the room. What is not written to takes no memory."""


def with_room(function: Callable[P, R]) -> Callable[P, R]:
    """``function`` with about 120 KiB for the frames of what it calls, mapped once per call of it.

    The frame of the wrapper claims an operand stack of :data:`SLOTS`, which it has no use for.
    """

    def roomy(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **kwargs)

    roomy.__code__ = roomy.__code__.replace(co_stacksize=SLOTS)
    return functools.update_wrapper(roomy, function)
