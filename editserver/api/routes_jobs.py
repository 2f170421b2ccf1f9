"""Jobs over HTTP: how far they are, what came of them, and how to stop them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from pydantic import BaseModel, Field

from editserver.api.jobs import State
from editserver.api.state import EditState, editing

router = APIRouter()


class ProgressAnswer(BaseModel):
    """Units of work done, of how many, and what is being done."""

    done: int
    total: int
    stage: str


class JobAnswer(BaseModel):
    """One job; `result` once it succeeded, `error` (message, param, code) once it failed."""

    id: str
    object: str
    kind: str = Field(description="What it does: concept.")
    name: str = Field(description="Of what it makes.")
    created: int = Field(description="Seconds since the epoch.")
    state: State
    progress: ProgressAnswer
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


class DeletedJobAnswer(JobAnswer):
    """A job that was stopped, or that had finished and is forgotten now."""

    deleted: bool = Field(description="Whether it is forgotten; a job that was stopped can still be read.")


class JobList(BaseModel):
    """Jobs in the order in which they came, without results."""

    object: str
    data: list[JobAnswer]


@router.get("/v1/jobs", response_model=JobList, response_model_exclude_none=True)
async def list_jobs(request: Request) -> Any:
    """Every job that this server knows."""
    return {"object": "list", "data": [job.as_dict(whole=False) for job in editing(request).jobs.all()]}


@router.get("/v1/jobs/{job_id}", response_model=JobAnswer, response_model_exclude_unset=True)
async def show_job(request: Request, job_id: str) -> Any:
    """One job."""
    return editing(request).jobs.get(job_id).as_dict()


@router.delete("/v1/jobs/{job_id}", response_model=DeletedJobAnswer, response_model_exclude_unset=True)
async def delete_job(request: Request, job_id: str) -> Any:
    """Stop a job that waits or runs; forget one that has finished."""
    job, forgotten = await editing(request).jobs.delete(job_id)
    return job.as_dict(whole=False) | {"deleted": forgotten}


Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[Any]]


def cancelling(inner: Lifespan) -> Lifespan:
    """The lifespan ``inner``, at whose end the jobs are cancelled before the engine goes."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        async with inner(app) as state:
            try:
                yield state
            finally:
                held: EditState | None = getattr(app.state, "editserver", None)
                if held is not None:
                    await held.jobs.close()

    return lifespan
