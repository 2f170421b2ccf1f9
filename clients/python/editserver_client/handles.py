"""Handles of the server's jobs: they ask, wait and cancel."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic

from . import calls
from .calls import T
from .exceptions import JobFailed
from .jobs import JobStatus

if TYPE_CHECKING:
    from .async_client import AsyncClient
    from .client import Client

POLL_S = 0.5
"""Seconds between two questions after a job."""

ProgressCallback = Callable[[JobStatus], None]


class Job(Generic[T]):
    """A job of a `Client`; `kind` is what its result is read as."""

    def __init__(self, client: Client, id: str, kind: type[T]) -> None:
        self._client = client
        self._kind = kind
        self.id = id

    def status(self) -> JobStatus:
        """Where it stands."""
        return self._client.jobs.get(self.id)

    def wait(
        self, progress: ProgressCallback | None = None, *, poll: float = POLL_S, timeout: float | None = None
    ) -> T:
        """Its result; asks every `poll` seconds and tells `progress` each time.

        Raises:
            JobFailed: it failed, or was cancelled.
            TimeoutError: `timeout` seconds went by; the job goes on.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            status = self.status()
            if progress is not None:
                progress(status)
            if status.finished:
                return result_of(status, self._kind)
            _check(deadline, status)
            time.sleep(poll)

    def cancel(self) -> JobStatus:
        """Stop it; one that has finished is forgotten by the server."""
        return self._client.jobs.delete(self.id)


class AsyncJob(Generic[T]):
    """A job of an `AsyncClient`: `Job` with await."""

    def __init__(self, client: AsyncClient, id: str, kind: type[T]) -> None:
        self._client = client
        self._kind = kind
        self.id = id

    async def status(self) -> JobStatus:
        """Where it stands."""
        return await self._client.jobs.get(self.id)

    async def wait(
        self, progress: ProgressCallback | None = None, *, poll: float = POLL_S, timeout: float | None = None
    ) -> T:
        """Its result; asks every `poll` seconds and tells `progress` each time.

        Raises:
            JobFailed: it failed, or was cancelled.
            TimeoutError: `timeout` seconds went by; the job goes on.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            status = await self.status()
            if progress is not None:
                progress(status)
            if status.finished:
                return result_of(status, self._kind)
            _check(deadline, status)
            await asyncio.sleep(poll)

    async def cancel(self) -> JobStatus:
        """Stop it; one that has finished is forgotten by the server."""
        return await self._client.jobs.delete(self.id)


class Jobs:
    """The server's jobs."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self) -> list[JobStatus]:
        """All of them, without results."""
        return self._client._send(calls.list_jobs())

    def get(self, id: str) -> JobStatus:
        """One, with its result."""
        return self._client._send(calls.get_job(id))

    def delete(self, id: str) -> JobStatus:
        """Stop one that waits or runs; forget one that has finished."""
        return self._client._send(calls.delete_job(id))


class AsyncJobs:
    """The server's jobs."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self) -> list[JobStatus]:
        """All of them, without results."""
        return await self._client._send(calls.list_jobs())

    async def get(self, id: str) -> JobStatus:
        """One, with its result."""
        return await self._client._send(calls.get_job(id))

    async def delete(self, id: str) -> JobStatus:
        """Stop one that waits or runs; forget one that has finished."""
        return await self._client._send(calls.delete_job(id))


def result_of(status: JobStatus, kind: type[T]) -> T:
    """The result of a finished job.

    Raises:
        JobFailed: it has none.
    """
    if status.state == "succeeded":
        return calls.reader(kind)(status.result)
    error = status.error or {}
    message = error.get("message") or "it was cancelled"
    raise JobFailed(str(message), state=status.state, code=error.get("code"), param=error.get("param"))


def _check(deadline: float | None, status: JobStatus) -> None:
    if deadline is not None and time.monotonic() >= deadline:
        raise TimeoutError(f"job {status.id} is still {status.state} ({status.progress.stage})")
