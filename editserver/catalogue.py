"""What one server offers: its model's shape, armed layers, dictionaries and library, as the compiler asks for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from editserver.engine.config import EngineConfig, SAESource
from editserver.library import VectorLibrary
from editserver.settings import Settings
from interventions.errors import InterventionError
from interventions.limits import Limits
from interventions.wording import choices, nearest, show
from sae_weights.catalogue import BUNDLED_FOLDER, bundled, resolve
from sae_weights.errors import SAEFormatError
from sae_weights.formats.saelens import load_sae
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
    path: Path
    layer: int
    sae: SAE

    def source(self) -> SAESource:
        """What every process of the server is told."""
        return SAESource(self.id, str(self.path), self.sae.digest, self.layer)


def open_sae(source: str) -> OpenedSAE:
    """Open ``[NAME=]SOURCE``.

    Raises:
        CatalogueError: no such SAE, a damaged one, or one whose hook has no edit site (named in the message).
    """
    try:
        name, sae = resolve(source)
    except SAEFormatError as error:
        raise CatalogueError(f"--sae {source}: {error}") from error
    layer = sae.hook.edit_layer
    if layer is None:
        raise CatalogueError(
            f"--sae {source}: trained on {sae.hook}, a hook that is not served; "
            "served are resid_post(L), and resid_pre(L) for L > 0"
        )
    place = source.removeprefix(f"{name}=")
    path = BUNDLED_FOLDER / place if place in bundled() else Path(place).expanduser().resolve()
    return OpenedSAE(name, path, layer, sae)


def full_encode_ids(opened: Sequence[OpenedSAE], chosen: Sequence[str]) -> tuple[str, ...]:
    """Which dictionaries get the full-encode path: those of ``--full-encode``, or by default the small ones.

    Raises:
        CatalogueError: an id that no ``--sae`` has.
    """
    if "none" in chosen:
        if len(chosen) > 1:
            raise CatalogueError("--full-encode none does not go with --full-encode ID")
        return ()
    ids = [one.id for one in opened]
    for name in chosen:
        if name not in ids:
            raise CatalogueError(
                f"--full-encode {name}: no such SAE here; served are {choices(ids)}.{nearest(name, ids)}"
            )
    small = [one.id for one in opened if one.sae.n_features <= FULL_ENCODE_DEFAULT]
    return tuple(one for one in ids if one in chosen or one in small)


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
        return self.sae.row_separable or self.full_encode

    def as_dict(self) -> dict[str, Any]:
        """The contract's SAE object."""
        return {
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
        }


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
    tokenizer: Any
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
        return self.library.get(name).layers

    def encode_text(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode_token(self, token_id: int) -> str:
        """Text of one token, its leading space included."""
        text = self._token_text.get(token_id)
        if text is None:
            text = self._token_text[token_id] = token_text(self.tokenizer, token_id)
        return text


def build_catalogue(
    config: EngineConfig, settings: Settings, *, d_model: int, n_layers: int, vocab_size: int, tokenizer: Any
) -> ServedCatalogue:
    """Open what ``config`` names, as the engine's processes do.

    Raises:
        CatalogueError: an SAE that changed on disk since the server was started, or does not fit the model.
    """
    served: dict[str, ServedSAE] = {}
    for source in config.saes:
        sae = load_sae(source.path)
        if sae.digest != source.digest:
            raise CatalogueError(f"SAE {source.id}: {source.path} changed while the server was starting")
        if sae.d_model != d_model:
            raise CatalogueError(f"SAE {source.id} has d_model {sae.d_model}, the model has {d_model}")
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
        tokenizer=tokenizer,
    )
