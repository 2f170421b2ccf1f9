"""What the API process of an editing server holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from fastapi import Request

from editserver.api.capacity import Capacity
from editserver.api.jobs import Jobs
from editserver.api.knowledge import FeatureKnowledge
from editserver.catalogue import ServedCatalogue, ServedSAE
from editserver.engine.abilities import NOT_ENCODED, ON_GPU, Abilities, Fields
from editserver.engine.config import EngineConfig
from editserver.settings import Settings
from interventions.compile import Compiled, compile_request
from interventions.errors import InterventionError
from interventions.spec import Inspect, Intervention, parse_inspect, parse_interventions

MOST_KEPT = 256
"""Compiled requests that are kept, at most, each of at most ``KEPT_BYTES``."""
KEPT_BYTES = 1 << 16


@dataclass
class EditState:
    """State shared by all requests.

    Attributes:
        catalogue: model shape, armed layers, dictionaries, library.
        capacity: bank rows of the requests in flight.
        vllm_version: of the running vLLM.
        model: the served model's name.
        jobs: work that outlives its request.
        device: what the engine can do, where it is one of kernels; None: everything.
        unheard: why rules and gates over a sequence are not served, as a request that asks for one is told; None where they are.
    """

    config: EngineConfig
    settings: Settings
    catalogue: ServedCatalogue
    capacity: Capacity
    vllm_version: str
    model: str
    app_state: Any
    jobs: Jobs = field(default_factory=Jobs)
    unheard: str | None = None
    device: Abilities | None = None
    _knowledge: dict[str, FeatureKnowledge] = field(default_factory=dict)
    _compiled: dict[bytes, tuple[Compiled, frozenset[str]]] = field(default_factory=dict)
    """In the order in which they came."""

    def knowledge(self, sae: str) -> FeatureKnowledge:
        """What is known about the features of SAE ``sae`` (read once)."""
        known = self._knowledge.get(sae)
        if known is None:
            path = next(source.path for source in self.config.saes if source.id == sae)
            known = self._knowledge[sae] = FeatureKnowledge.read(path, self.catalogue.sae(sae).sae)
        return known

    def compiled(self, interventions: Any, inspect: Any) -> tuple[Compiled, frozenset[str]]:
        """What a request's fields (parsed JSON) mean here, and the types that it names.

        Many requests say the same: an answer in which no name of the library has a part is kept for the next one.

        Raises:
            InterventionError: with the contract's codes.
        """
        key = _key(interventions, inspect)
        if key is not None and (kept := self._compiled.get(key)) is not None:
            return kept
        specs, reads = parse_interventions(interventions), parse_inspect(inspect)
        uses = self.catalogue.library_uses
        found = self.compile(specs, reads), frozenset(spec.type for spec in specs)
        if key is not None and uses == self.catalogue.library_uses:
            while len(self._compiled) >= MOST_KEPT:
                self._compiled.pop(next(iter(self._compiled)), None)
            self._compiled[key] = found
        return found

    def compile(self, specs: Sequence[Intervention], reads: Sequence[Inspect]) -> Compiled:
        """What a request's fields mean here.

        Raises:
            InterventionError: with the contract's codes.
        """
        compiled = compile_request(specs, reads, self.catalogue)
        if self.unheard is not None and compiled.program is not None and compiled.program.listens:
            first = next((entry.param for entry in compiled.entries if entry.listens), "interventions")
            raise InterventionError("unsupported_with_interventions", self.unheard, first)
        self.check(compiled)
        return compiled

    def check(self, compiled: Compiled) -> None:
        """Refuse what the engine does not do, before anything of it is reached; raises InterventionError."""
        if self.device is not None:
            conditioned = (one for one in compiled.entries if one.type == "rules" or one.when is not None)
            fields = Fields(compiled.inspect_params, tuple(one.param for one in conditioned if not one.noop))
            self.device.check(compiled.payload(), fields)

    def encodes(self, sae: ServedSAE) -> bool:
        """Whether all latents of ``sae`` may be looked at."""
        return sae.full_encode and (self.device is None or sae.sae.digest not in self.device.not_encoded)

    def most_latents(self, sae: ServedSAE) -> int:
        """How many latents of ``sae`` one request may edit."""
        most = self.catalogue.limits.instructions
        if self.device is None:
            return most
        room = self.device.capacity
        return min(most, room.request_channels, room.members if sae.sae.digest in self.device.whole else most)

    def shown(self, sae: ServedSAE) -> dict[str, Any]:
        """The contract's SAE object: what may be asked of it on this server."""
        shown = sae.as_dict()
        if sae.full_encode and not self.encodes(sae):
            shown |= {"editable": False, "top_k": False, "reason": f"{ON_GPU}, {NOT_ENCODED}"}
        return shown


def _key(interventions: Any, inspect: Any) -> bytes | None:
    """Equal for fields that are the same in every number's type and bits; None for what is too long, or odd, to be kept."""
    try:
        key = msgspec.msgpack.encode((interventions, inspect))
    except (TypeError, OverflowError, ValueError, RecursionError):
        return None
    return key if len(key) <= KEPT_BYTES else None


def editing(request: Request) -> EditState:
    """The state of an editing server; 404 on one that was not started by ``editserver serve``."""
    state: EditState | None = getattr(request.app.state, "editserver", None)
    if state is None:
        message = "this server was not started for editing; start it with `editserver serve`"
        raise InterventionError("unsupported_with_interventions", message, None, 404)
    return state
