"""Work that the server does in the background, as it tells it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from .catalogue import Artifact
from .inspection import ANSWER


class Progress(BaseModel):
    """Units of work done, of how many, and what is being done."""

    model_config = ANSWER
    done: int
    total: int
    stage: str

    @property
    def share(self) -> float:
        """Between 0 and 1."""
        return min(1.0, self.done / self.total) if self.total else 0.0


class JobStatus(BaseModel):
    """A job as the server tells it; `result` once it succeeded, `error` (message, param, code) once it failed."""

    model_config = ANSWER
    id: str
    state: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    progress: Progress
    kind: str = ""
    name: str = ""
    created: int | None = None
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in ("succeeded", "failed", "cancelled")


class ConceptFit(BaseModel):
    """What a fit brought: the concept in the library, and its report (see docs/concepts.md)."""

    model_config = ANSWER
    concept: Artifact
    report: dict[str, Any]
