"""Steps through the C++ op, as a compiled graph calls it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from editserver.engine import native, op
from editserver.engine.worker import EngineWorker
from interventions.program import ReadKind
from tests.engine.kernel_steps import new_worker

SIMPLE = (ReadKind.NONE, ReadKind.NORM, ReadKind.DOT, ReadKind.LATENT)
"""Channels that need nothing but their own rows."""


@contextmanager
def op_in_front() -> Iterator[None]:
    """The C++ op, and afterwards whichever engine this process had."""
    before = op.current()
    assert native.load(), "g++ is among what the tests need (docs/development.md)"
    yield
    if before is None:
        op._worker = None
        native.serve(None)
    else:
        op.install(before)


def served(dtype: torch.dtype) -> EngineWorker:
    """An engine as a server makes it."""
    worker = new_worker(dtype)
    worker.give_jobs()
    op.install(worker)
    return worker


class ThroughTheOp(EngineWorker):
    """Has steps run through the dispatcher; notes what came back to Python."""

    def __init__(self, worker: EngineWorker) -> None:
        self.__dict__ = worker.__dict__
        self.asked: list[int] = []
        self.inside = False
        op.install(self)

    def run(self, layer: int, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        if self.inside:
            self.asked.append(layer)
            super().run(layer, hidden, residual)
            return
        self.inside = True
        try:
            if residual is None:
                torch.ops.editserver.edit_stream(hidden, layer)
            else:
                torch.ops.editserver.edit(hidden, residual, layer)
        finally:
            self.inside = False
