"""Work that outlives its request: one job runs at a time, a few wait, and what came of them is kept for a while.

Jobs belong to the server's event loop, not to a connection: a client may hang up and ask again. Nothing is written to disk; a
server that stops cancels them.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from interventions.errors import InterventionError
from interventions.wording import printable, show

log = logging.getLogger(__name__)

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
FINISHED: tuple[State, ...] = ("succeeded", "failed", "cancelled")

MAX_WAITING = 8
"""Jobs that may wait behind the one that runs."""
MAX_KEPT = 32
"""Finished jobs that are remembered; the oldest are forgotten."""


@dataclass(frozen=True)
class Progress:
    """How far a job is.

    Attributes:
        done, total: units of work (forward passes of one text, for a fit); ``total`` may grow while it runs, never shrinks.
        stage: what it is doing.
    """

    done: int
    total: int
    stage: str


@dataclass(eq=False)
class Job:
    """One piece of work.

    Attributes:
        kind: what it does, as ``"concept"``.
        name: of what it makes.
        created: seconds since the epoch.
        result: JSON, once it succeeded.
        error: OpenAI's error object, once it failed.
    """

    kind: str
    name: str
    progress: Progress
    id: str = field(default_factory=lambda: f"job-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    state: State = "queued"
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None

    def advance(self, done: int, stage: str) -> None:
        """Note what was done so far."""
        self.progress = Progress(done, max(done, self.progress.total), stage)

    def as_dict(self, *, whole: bool = True) -> dict[str, Any]:
        """The contract's form; without ``whole``, as in a list: no result."""
        progress = self.progress
        shown: dict[str, Any] = {
            "id": self.id,
            "object": "job",
            "kind": self.kind,
            "name": self.name,
            "created": self.created,
            "state": self.state,
            "progress": {"done": progress.done, "total": progress.total, "stage": progress.stage},
        }
        if whole and self.result is not None:
            shown["result"] = self.result
        if self.error is not None:
            shown["error"] = self.error
        return shown


Work = Callable[[Job], Awaitable[dict[str, Any]]]
"""What a job does: reports by :meth:`Job.advance`, returns its result."""


class Jobs:
    """All jobs of one server."""

    def __init__(self, max_waiting: int = MAX_WAITING, max_kept: int = MAX_KEPT) -> None:
        self.max_waiting = max_waiting
        self.max_kept = max_kept
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._waiting: deque[tuple[Job, Work]] = deque()
        self._running: tuple[Job, asyncio.Task[None]] | None = None
        self._closed = False

    def submit(self, kind: str, name: str, total: int, work: Work) -> Job:
        """Start ``work``, or queue it behind what runs.

        Raises:
            InterventionError: ``capacity``: the queue is full, or the server is stopping.
        """
        self.check_room()
        job = Job(kind, name, Progress(0, total, "waiting"))
        self._jobs[job.id] = job
        self._waiting.append((job, work))
        self._next()
        return job

    def check_room(self) -> None:
        """Raise ``capacity`` if :meth:`submit` would."""
        if self._closed:
            raise InterventionError("capacity", "the server is stopping")
        if self._running is not None and len(self._waiting) >= self.max_waiting:
            message = f"one job runs and {len(self._waiting)} wait, which is all that this server keeps waiting"
            raise InterventionError("capacity", f"{message}; try again later, or DELETE /v1/jobs/{{id}}")

    def all(self) -> list[Job]:
        """In the order in which they came."""
        return list(self._jobs.values())

    def get(self, job_id: str) -> Job:
        """One of them; raises ``unknown_job`` (404)."""
        job = self._jobs.get(job_id)
        if job is None:
            message = f"no job {show(job_id)}; jobs are forgotten when the server stops, when they are deleted"
            raise InterventionError("unknown_job", f"{message}, and {self.max_kept} finished ones later", None, 404)
        return job

    async def delete(self, job_id: str) -> tuple[Job, bool]:
        """Cancel a job that waits or runs; forget one that has finished. The job, and whether it was forgotten."""
        job = self.get(job_id)
        if job.state in FINISHED:
            del self._jobs[job_id]
            return job, True
        if self._running is not None and self._running[0] is job:
            task = self._running[1]
            task.cancel()
            await asyncio.wait({task})
        else:
            self._waiting = deque(entry for entry in self._waiting if entry[0] is not job)
            self._finish(job, "cancelled")
        return job, False

    async def close(self) -> None:
        """Cancel everything; nothing is accepted afterwards."""
        self._closed = True
        for job, _ in self._waiting:
            self._finish(job, "cancelled")
        self._waiting.clear()
        if self._running is not None:
            self._running[1].cancel()
            await asyncio.wait({self._running[1]})

    def _next(self) -> None:
        if self._running is None and self._waiting:
            job, work = self._waiting.popleft()
            task = asyncio.create_task(self._run(job, work), name=job.id)
            self._running = job, task
            task.add_done_callback(lambda _: self._ended(job))

    async def _run(self, job: Job, work: Work) -> None:
        job.state = "running"
        try:
            job.result = await work(job)
            self._finish(job, "succeeded")
        except InterventionError as error:
            job.error = _error(error.message, error.code, error.param)
            self._finish(job, "failed")
        except Exception as error:
            log.exception("job %s (%s %r) failed", job.id, job.kind, job.name)
            job.error = _error(f"the job failed: {type(error).__name__}", "intervention_failed", None)
            self._finish(job, "failed")

    def _ended(self, job: Job) -> None:
        if job.state not in FINISHED:  # cancelled, perhaps before its first step
            self._finish(job, "cancelled")
        self._running = None
        self._next()

    def _finish(self, job: Job, state: State) -> None:
        job.state = state
        finished = [job_id for job_id, one in self._jobs.items() if one.state in FINISHED]
        for job_id in finished[: max(0, len(finished) - self.max_kept)]:
            del self._jobs[job_id]


def _error(message: str, code: str, param: str | None) -> dict[str, Any]:
    return {"message": printable(message), "param": param, "code": code}
