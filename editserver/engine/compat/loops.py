"""The loops in which workers and engine cores spend their lives have room for the frames of a step."""

from __future__ import annotations

from typing import Any

from editserver.engine.frames import with_room


def install() -> None:
    """Wrap them in the classes that have them; they begin after plugins are loaded. Idempotent; what is not there is left out."""
    from vllm.v1.engine import core
    from vllm.v1.executor import multiproc_executor

    for module, class_name, name in (
        (multiproc_executor, "WorkerProc", "worker_busy_loop"),
        (core, "EngineCoreProc", "run_busy_loop"),
        (core, "DPEngineCoreProc", "run_busy_loop"),
    ):
        owner: Any = getattr(module, class_name, object)
        loop: Any = vars(owner).get(name)
        if loop is not None and not getattr(loop, "editserver", False):
            roomy: Any = with_room(loop)
            roomy.editserver = True
            setattr(owner, name, roomy)
