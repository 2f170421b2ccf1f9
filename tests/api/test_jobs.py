"""Jobs: one runs, a few wait, all can be stopped, and a server that stops leaves none behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI

from editserver.api.jobs import Job, Jobs
from editserver.api.routes_jobs import cancelling
from interventions.errors import InterventionError


class Gate:
    """Work that waits until it is let go, and notes when it runs."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.running = 0
        self.most = 0
        self.cancelled = 0

    async def work(self, job: Job) -> dict[str, Any]:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            job.advance(1, "waiting for the gate")
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        return {"name": job.name}


async def until(job: Job, *states: str) -> None:
    async with asyncio.timeout(5):
        while job.state not in states:
            await asyncio.sleep(0)


def run(main: Any) -> None:
    asyncio.run(main())


def test_one_job_runs_at_a_time_in_the_order_in_which_they_came() -> None:
    async def main() -> None:
        jobs, gate = Jobs(), Gate()
        given = [jobs.submit("concept", f"c{i}", 3, gate.work) for i in range(3)]
        await until(given[0], "running")
        assert [job.state for job in given] == ["running", "queued", "queued"]
        assert given[1].as_dict()["progress"] == {"done": 0, "total": 3, "stage": "waiting"}
        assert given[0].as_dict()["progress"]["done"] == 1
        gate.open.set()
        for job in given:
            await until(job, "succeeded")
        assert gate.most == 1
        assert [job.result for job in given] == [{"name": f"c{i}"} for i in range(3)]
        assert jobs.all() == given

    run(main)


def test_the_queue_is_bounded_and_says_so_as_429() -> None:
    async def main() -> None:
        jobs, gate = Jobs(max_waiting=2), Gate()
        given = [jobs.submit("concept", "c", 1, gate.work) for _ in range(3)]
        with pytest.raises(InterventionError) as caught:
            jobs.submit("concept", "c", 1, gate.work)
        assert (caught.value.code, caught.value.status) == ("capacity", 429)
        await jobs.delete(given[1].id)
        jobs.submit("concept", "c", 1, gate.work)  # there is room again
        await jobs.close()

    run(main)


def test_a_job_that_waits_never_runs_once_it_is_cancelled() -> None:
    async def main() -> None:
        jobs, gate = Jobs(), Gate()
        first, second, third = (jobs.submit("concept", "c", 1, gate.work) for _ in range(3))
        job, forgotten = await jobs.delete(second.id)
        assert (job.state, forgotten) == ("cancelled", False)
        gate.open.set()
        await until(third, "succeeded")
        assert (first.state, second.state, second.result) == ("succeeded", "cancelled", None)

    run(main)


@pytest.mark.parametrize("started", [True, False])
def test_a_running_job_is_stopped_and_the_next_one_starts(started: bool) -> None:
    async def main() -> None:
        jobs, gate = Jobs(), Gate()
        first, second = jobs.submit("concept", "a", 1, gate.work), jobs.submit("concept", "b", 1, gate.work)
        if started:
            await until(first, "running")
        job, forgotten = await jobs.delete(first.id)
        assert (job.state, forgotten) == ("cancelled", False)
        assert gate.cancelled == int(started)
        gate.open.set()
        await until(second, "succeeded")
        assert jobs.get(first.id).state == "cancelled"
        assert (await jobs.delete(first.id))[1] is True
        with pytest.raises(InterventionError) as caught:
            jobs.get(first.id)
        assert (caught.value.code, caught.value.status) == ("unknown_job", 404)

    run(main)


def test_a_failure_says_why_and_what_is_not_ours_to_tell_stays_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def refuse(job: Job) -> dict[str, Any]:
        raise InterventionError("invalid_artifact", "no latent qualifies", "concepts")

    async def break_down(job: Job) -> dict[str, Any]:
        raise RuntimeError("/a/path of this machine")

    async def main() -> None:
        jobs = Jobs()
        refused, broken = jobs.submit("concept", "a", 1, refuse), jobs.submit("concept", "b", 1, break_down)
        await until(broken, "failed")
        assert refused.as_dict()["error"] == {
            "message": "no latent qualifies",
            "param": "concepts",
            "code": "invalid_artifact",
        }
        assert refused.state == "failed"
        assert broken.error is not None
        assert broken.error["code"] == "intervention_failed"
        assert "machine" not in broken.error["message"]

    run(main)
    assert "of this machine" in caplog.text


def test_old_finished_jobs_are_forgotten_and_running_ones_never() -> None:
    async def main() -> None:
        jobs, gate = Jobs(max_waiting=20, max_kept=3), Gate()
        gate.open.set()
        done = [jobs.submit("concept", f"c{i}", 1, gate.work) for i in range(6)]
        await until(done[-1], "succeeded")
        gate.open.clear()
        live = [jobs.submit("concept", "x", 1, gate.work) for _ in range(4)]
        assert jobs.all() == [*done[3:], *live]
        await jobs.close()

    run(main)


def test_progress_never_exceeds_its_total() -> None:
    job = Job("concept", "c", SimpleNamespace(done=0, total=2, stage=""))  # type: ignore[arg-type]
    job.advance(5, "more than thought")
    assert (job.progress.done, job.progress.total) == (5, 5)


def test_a_server_that_stops_cancels_what_runs_and_what_waits() -> None:
    async def main() -> None:
        app, jobs, gate = FastAPI(), Jobs(), Gate()

        @asynccontextmanager
        async def engine(app: FastAPI) -> AsyncIterator[dict[str, int]]:
            yield {"x": 1}
            assert gate.cancelled == 1, "the engine goes before the jobs"

        async with cancelling(engine)(app) as state:
            assert state == {"x": 1}
            app.state.editserver = SimpleNamespace(jobs=jobs)
            running, waiting = (jobs.submit("concept", "c", 1, gate.work) for _ in range(2))
            await until(running, "running")
        assert (running.state, waiting.state, gate.cancelled) == ("cancelled", "cancelled", 1)
        with pytest.raises(InterventionError, match="stopping"):
            jobs.submit("concept", "c", 1, gate.work)

    run(main)


def test_a_server_that_does_not_edit_stops_as_well() -> None:
    @asynccontextmanager
    async def nothing(app: FastAPI) -> AsyncIterator[None]:
        yield

    async def main() -> None:
        async with cancelling(nothing)(FastAPI()):
            pass

    run(main)
