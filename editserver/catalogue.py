"""What one server offers: its model's shape, armed layers, dictionaries and library, as the compiler asks for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from editserver.engine.config import EngineConfig, SAESource
from editserver.library import ConceptLibrary, MapLibrary, RulesetLibrary, VectorLibrary
from editserver.settings import Settings
from interventions.catalogue import how_to_edit, needs_full_encode
from interventions.concepts.concept import Concept
from interventions.errors import InterventionError
from interventions.limits import Limits
from interventions.maps.map import LatentMap
from interventions.remapping import check_map
from interventions.rules.build import Context, Dictionary
from interventions.rules.proposition import Proposition
from interventions.wording import choices, nearest, show
from sae_weights.architectures import ARCHITECTURES
from sae_weights.catalogue import resolve
from sae_weights.errors import SAEFormatError
from sae_weights.formats import Origin
from sae_weights.knowledge.words import token_text
from sae_weights.sae import SAE

FULL_ENCODE_DEFAULT = 32_768
"""Dictionaries up to this many latents get the full-encode path unless the operator says otherwise."""


class CatalogueError(ValueError):
    """A dictionary or layer that this server cannot offer; the message is for the operator who named it."""


@dataclass(frozen=True)
class OpenedSAE:
    """A dictionary as named on the command line: ``[NAME=]SOURCE``."""

    id: str
    layer: int
    sae: SAE

    @property
    def origin(self) -> Origin:
        """What opens it in another process."""
        assert self.sae.origin is not None, "an SAE that was loaded knows from where"
        return self.sae.origin

    def source(self) -> SAESource:
        """What every process of the server is told."""
        return SAESource(self.id, self.origin.as_dict(), self.sae.digest, self.layer)

    def approximate(self) -> OpenedSAE:
        """The stand-in whose calibrated threshold takes the place of the membership rule.

        Raises:
            CatalogueError: no threshold stands in for this dictionary, or nobody calibrated one.
        """
        if self.sae.row_separable:
            raise CatalogueError(
                f"--approximate {self.id}: its latents are edited exactly, row by row ({self.sae.architecture} SAE)"
            )
        if not ARCHITECTURES[self.sae.architecture].thresholdable:
            raise CatalogueError(
                f"--approximate {self.id}: no threshold can stand in for what a {self.sae.architecture} SAE computes; "
                f"--full-encode {self.id} edits it exactly"
            )
        theta = self.sae.metadata.get("calibrated_threshold")
        if isinstance(theta, bool) or not isinstance(theta, (int, float)):
            raise CatalogueError(
                f"--approximate {self.id}: {self.origin.path} has no calibrated threshold; "
                f"measure one with: editserver sae calibrate {self.origin.path} --model MODEL"
            )
        try:
            sae = replace(self.origin, hints=replace(self.origin.hints, threshold=float(theta))).open()
        except SAEFormatError as error:
            raise CatalogueError(f"--approximate {self.id}: {error}") from error
        return replace(self, sae=sae)


def open_sae(source: str) -> OpenedSAE:
    """Open ``[NAME=]SOURCE``.

    Raises:
        CatalogueError: no such SAE, a damaged one, or one that no server can edit (the message names its hook).
    """
    try:
        name, sae = resolve(source)
    except SAEFormatError as error:
        raise CatalogueError(f"--sae {source}: {error}") from error
    if sae.refusal is not None:
        raise CatalogueError(f"--sae {source}: {sae.refusal}")
    layer = sae.hook.edit_layer
    assert layer is not None
    return OpenedSAE(name, layer, sae)


def approximated(opened: Sequence[OpenedSAE], chosen: Sequence[str]) -> list[OpenedSAE]:
    """``opened``, those of ``--approximate`` replaced by their stand-ins.

    Raises:
        CatalogueError: an id that no ``--sae`` has, or one without a stand-in.
    """
    _check_named("--approximate", opened, chosen)
    return [one.approximate() if one.id in chosen else one for one in opened]


def check_distinct(opened: Sequence[OpenedSAE]) -> None:
    """Where two files carry one digest, read both: programs know dictionaries by it, and a file may claim another's.

    Raises:
        CatalogueError: a file whose content is not what its digest says.
    """
    for i, one in enumerate(opened):
        twins = [other for other in opened[:i] if other.sae.digest == one.sae.digest and other.origin != one.origin]
        for sae in {id(twin): twin for twin in (*twins, one)}.values() if twins else ():
            if sae.sae.compute_digest() != sae.sae.digest:
                raise CatalogueError(
                    f"SAE {sae.id}: {sae.origin.path} carries the digest {sae.sae.digest[:12]}… of another dictionary; "
                    "import it anew with: editserver sae import"
                )


def check_fit(opened: Sequence[OpenedSAE], d_model: int, n_layers: int) -> None:
    """Refuse dictionaries of another model.

    Raises:
        CatalogueError: of another width, or behind a layer that the model does not have.
    """
    for one in opened:
        _check_width(one.id, one.sae, d_model)
        if not one.layer < n_layers:
            raise CatalogueError(
                f"SAE {one.id} ({one.origin.path}) belongs to {one.sae.hook}; the model has the layers 0..{n_layers - 1}"
            )


def _check_width(name: str, sae: SAE, d_model: int) -> None:
    if sae.d_model != d_model:
        path = "" if sae.origin is None else f" ({sae.origin.path})"
        raise CatalogueError(
            f"SAE {name}{path} has d_model {sae.d_model}, the model has {d_model}: it is another model's"
        )


def _check_named(flag: str, opened: Sequence[OpenedSAE], chosen: Sequence[str]) -> None:
    ids = [one.id for one in opened]
    for name in chosen:
        if name not in ids:
            raise CatalogueError(f"{flag} {name}: no such SAE here; served are {choices(ids)}.{nearest(name, ids)}")


def full_encode_ids(opened: Sequence[OpenedSAE], chosen: Sequence[str]) -> tuple[str, ...]:
    """Which dictionaries get the full-encode path: those of ``--full-encode``, or by default the small ones.

    Raises:
        CatalogueError: an id that no ``--sae`` has.
    """
    if "none" in chosen:
        if len(chosen) > 1:
            raise CatalogueError("--full-encode none does not go with --full-encode ID")
        return ()
    _check_named("--full-encode", opened, chosen)
    return tuple(one.id for one in opened if one.id in chosen or one.sae.n_features <= FULL_ENCODE_DEFAULT)


@dataclass(frozen=True)
class ServedSAE:
    """One dictionary on offer."""

    id: str
    layer: int
    sae: SAE
    full_encode: bool

    @property
    def editable(self) -> bool:
        """Whether its latents can be edited: row by row, or with the full-encode path."""
        return self.full_encode or not needs_full_encode(self.sae)

    def as_dict(self) -> dict[str, Any]:
        """The contract's SAE object."""
        shown = {
            "id": self.id,
            "object": "sae",
            "layer": self.layer,
            "hook": str(self.sae.hook),
            "architecture": self.sae.architecture,
            "d_model": self.sae.d_model,
            "n_features": self.sae.n_features,
            "digest": self.sae.digest,
            "editable": self.editable,
            "top_k": self.full_encode,
            "execution": "dictionary" if needs_full_encode(self.sae) else "row",
            "approximate": self.sae.approximates is not None,
        }
        if self.sae.approximates is not None:
            shown["approximates"] = self.sae.approximates
        if not self.editable:
            shown["reason"] = how_to_edit(self)
        return shown


@dataclass
class ServedCatalogue:
    """The compiler's view of one server (``interventions.compile.Catalogue``)."""

    d_model: int
    n_layers: int
    vocab_size: int
    armed_layers: Sequence[int]
    limits: Limits
    max_dose: float
    refuse_over_dose: bool
    saes: Mapping[str, ServedSAE]
    library: VectorLibrary
    concepts: ConceptLibrary
    maps: MapLibrary
    rulesets: RulesetLibrary
    tokenizer: Any
    model: str = ""
    """The served name; empty where nobody gave it one: then concepts and maps are bound by their SAE alone."""
    library_uses: int = 0
    """How often somebody asked for what a name of the library stands for, which may be another thing the next time."""
    _token_text: dict[int, str] = field(default_factory=dict)

    def sae(self, name: str) -> ServedSAE:
        """The dictionary called ``name``; raises ``unknown_sae``."""
        found = self.saes.get(name)
        if found is None:
            message = f"no SAE {show(name)}; this server has {choices(self.saes)}.{nearest(name, self.saes)}"
            raise InterventionError("unknown_sae", message)
        return found

    def vector(self, name: str) -> Mapping[int, npt.NDArray[np.float32]]:
        """The library vector called ``name``; raises ``unknown_vector``."""
        self.library_uses += 1
        return self.library.get(name).layers

    def concept(self, name: str) -> tuple[ServedSAE, Concept]:
        """The library concept called ``name`` and its dictionary.

        Raises:
            InterventionError: ``unknown_concept``, or ``invalid_artifact`` for one that :meth:`dictionary_of` refuses.
        """
        self.library_uses += 1
        concept = self.concepts.get(name)
        with _of_this_server("concept", name):
            return self.dictionary_of(concept), concept

    def map(self, name: str) -> tuple[ServedSAE, LatentMap]:
        """The library map called ``name`` and its dictionary.

        Raises:
            InterventionError: ``unknown_map``, or ``invalid_artifact`` for one that :meth:`dictionary_of_map` refuses.
        """
        self.library_uses += 1
        found = self.maps.get(name)
        with _of_this_server("map", name):
            return self.dictionary_of_map(found), found

    def ruleset(self, name: str) -> str | Mapping[str, Any]:
        """The library rule set called ``name`` as it was written, in text or JSON; raises ``unknown_ruleset``."""
        self.library_uses += 1
        return self.rulesets.get(name).source

    def rule_context(self) -> Context:
        """What rules may name here: the dictionaries whose latents can be read, and the library's detectors."""
        self.library_uses += 1
        dictionaries = {sae.id: Dictionary(sae.layer, sae.sae.n_features) for sae in self.saes.values() if sae.editable}
        return Context(dictionaries, self._detectors(), self.limits)

    def _detectors(self) -> dict[str, Proposition]:
        """The propositions that concepts of the library bring, of those that were fitted on what is served here."""
        found: dict[str, Proposition] = {}
        for listing in self.concepts.listings():
            try:
                served, concept = self.concept(listing.name)
            except InterventionError:
                continue  # another server's, or damaged: a rule that names it is told that there is none
            if concept.detector is not None and served.editable:
                found |= concept.detector.propositions(sae_id=served.id, name=listing.name)
        return found

    def dictionary_of(self, concept: Concept) -> ServedSAE:
        """The dictionary on which ``concept`` was fitted.

        Raises:
            InterventionError: ``invalid_artifact``: another model's, or no such dictionary at that layer is served.
        """
        if self.model and concept.model != self.model:
            message = f"fitted on the model {show(concept.model)}; this server has {show(self.model)}"
            raise InterventionError("invalid_artifact", f"model: {message}", "model")
        served = self._by_digest(concept.sae_digest, "sae_digest")
        concept.check_sae(served.sae.digest, served.layer, served.sae.n_features)
        return served

    def dictionary_of_map(self, found: LatentMap) -> ServedSAE:
        """The dictionary on which the map was fitted.

        Raises:
            InterventionError: ``invalid_artifact``: another model's, no such dictionary at that layer is served, or
                something in it that the model does not have.
        """
        served = self._by_digest(found.sae, "sae")
        found.check(served.sae.digest, served.layer, served.sae.n_features, self.model or None)
        check_map(found, self.vocab_size)
        return served

    def _by_digest(self, digest: str, param: str) -> ServedSAE:
        served = next((sae for sae in self.saes.values() if sae.sae.digest == digest), None)
        if served is None:
            have = choices(f"{sae.id} ({sae.sae.digest[:12]}…)" for sae in self.saes.values())
            message = f"fitted on the SAE {digest[:12]}…; this server has {have}"
            raise InterventionError("invalid_artifact", f"{param}: {message}", param)
        return served

    def encode_text(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode_token(self, token_id: int) -> str:
        """Text of one token, its leading space included."""
        text = self._token_text.get(token_id)
        if text is None:
            text = self._token_text[token_id] = token_text(self.tokenizer, token_id)
        return text


@contextmanager
def _of_this_server(kind: str, name: str) -> Iterator[None]:
    """In a request, an artefact that is refused is named, not its field."""
    try:
        yield
    except InterventionError as error:
        raise InterventionError("invalid_artifact", f"{kind} {show(name)} is not of this server: {error}") from None


def build_catalogue(
    config: EngineConfig,
    settings: Settings,
    *,
    d_model: int,
    n_layers: int,
    vocab_size: int,
    tokenizer: Any,
    model: str = "",
) -> ServedCatalogue:
    """Open what ``config`` names, as the engine's processes do.

    Raises:
        CatalogueError: an SAE that changed on disk since the server was started, or does not fit the model.
    """
    served: dict[str, ServedSAE] = {}
    for source in config.saes:
        try:
            sae = source.open()
        except ValueError as error:
            raise CatalogueError(str(error)) from error
        _check_width(source.id, sae, d_model)
        served[source.id] = ServedSAE(source.id, source.layer, sae, source.id in config.full_encode)
    return ServedCatalogue(
        d_model=d_model,
        n_layers=n_layers,
        vocab_size=vocab_size,
        armed_layers=config.armed,
        limits=settings.limits,
        max_dose=settings.dose.maximum,
        refuse_over_dose=settings.dose.refuse,
        saes=served,
        library=VectorLibrary(settings.library),
        concepts=ConceptLibrary(settings.library),
        maps=MapLibrary(settings.library),
        rulesets=RulesetLibrary(settings.library),
        tokenizer=tokenizer,
        model=model,
    )
