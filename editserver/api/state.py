"""What the API process of an editing server holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from editserver.api.capacity import Capacity
from editserver.api.jobs import Jobs
from editserver.api.knowledge import FeatureKnowledge
from editserver.catalogue import ServedCatalogue
from editserver.engine.config import EngineConfig
from editserver.settings import Settings
from interventions.errors import InterventionError


@dataclass
class EditState:
    """State shared by all requests.

    Attributes:
        catalogue: model shape, armed layers, dictionaries, library.
        capacity: bank rows of the requests in flight.
        vllm_version: of the running vLLM.
        model: the served model's name.
        jobs: work that outlives its request.
    """

    config: EngineConfig
    settings: Settings
    catalogue: ServedCatalogue
    capacity: Capacity
    vllm_version: str
    model: str
    app_state: Any
    jobs: Jobs = field(default_factory=Jobs)
    _knowledge: dict[str, FeatureKnowledge] = field(default_factory=dict)

    def knowledge(self, sae: str) -> FeatureKnowledge:
        """What is known about the features of SAE ``sae`` (read once)."""
        known = self._knowledge.get(sae)
        if known is None:
            path = next(source.path for source in self.config.saes if source.id == sae)
            known = self._knowledge[sae] = FeatureKnowledge.read(path, self.catalogue.sae(sae).sae)
        return known


def editing(request: Request) -> EditState:
    """The state of an editing server; 404 on one that was not started by ``editserver serve``."""
    state: EditState | None = getattr(request.app.state, "editserver", None)
    if state is None:
        message = "this server was not started for editing; start it with `editserver serve`"
        raise InterventionError("unsupported_with_interventions", message, None, 404)
    return state
