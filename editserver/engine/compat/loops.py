"""The loops in which workers and engine cores spend their lives have room for the frames of a step."""

from __future__ import annotations

from typing import Any

from editserver.engine.frames import with_room


def install() -> None:
    """Wrap them in the classes that have them; they begin after plugins are loaded. Idempotent; what is not there is left out."""
    from vllm.v1.engine.core import DPEngineCoreProc, EngineCoreProc
    from vllm.v1.executor.multiproc_executor import WorkerProc

    for owner, name in (
        (WorkerProc, "worker_busy_loop"),
        (EngineCoreProc, "run_busy_loop"),
        (DPEngineCoreProc, "run_busy_loop"),
    ):
        loop: Any = vars(owner).get(name)
        if loop is not None and not getattr(loop, "editserver", False):
            roomy: Any = with_room(loop)
            roomy.editserver = True
            setattr(owner, name, roomy)
