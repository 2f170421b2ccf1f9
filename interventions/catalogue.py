"""What the compiler must know about a server: the seam between what a request means and what runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from interventions.concepts.concept import Concept
from interventions.limits import Limits
from interventions.maps.map import LatentMap
from interventions.rules.build import Context
from sae_weights.architectures import ARCHITECTURES
from sae_weights.sae import SAE


class CatalogueSAE(Protocol):
    """One dictionary that the server offers."""

    @property
    def id(self) -> str:
        """The name that requests use."""

    @property
    def layer(self) -> int:
        """The decoder layer whose ``resid_post`` it reads and writes."""

    @property
    def sae(self) -> SAE:
        """The weights."""

    @property
    def full_encode(self) -> bool:
        """Whether the engine computes all its latents (TopK edits and ``top_k`` need that)."""


class Catalogue(Protocol):
    """What the compiler must know about the server."""

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""

    @property
    def n_layers(self) -> int:
        """Number of decoder layers of the model."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""

    @property
    def armed_layers(self) -> Sequence[int]:
        """Layers that can be edited and read."""

    @property
    def limits(self) -> Limits:
        """Bounds per request."""

    @property
    def max_dose(self) -> float:
        """Bound of ||delta|| / ||h||, ``inf`` for none."""

    @property
    def refuse_over_dose(self) -> bool:
        """Whether an excess ends the request (else the delta is scaled down)."""

    def sae(self, name: str) -> CatalogueSAE:
        """The dictionary of that name; raises ``unknown_sae``."""

    def vector(self, name: str) -> Mapping[int, Any]:
        """The library vector of that name: layer → float32 ``[d_model]``, numpy or torch; raises ``unknown_vector``."""

    def concept(self, name: str) -> tuple[CatalogueSAE, Concept]:
        """The library concept of that name, and the dictionary that it was fitted on.

        Raises ``unknown_concept``, or ``invalid_artifact`` where it was fitted on something else than what is here.
        """

    def map(self, name: str) -> tuple[CatalogueSAE, LatentMap]:
        """The library map of that name, and the dictionary that it was fitted on.

        Raises ``unknown_map``, or ``invalid_artifact`` where it was fitted on something else than what is here.
        """

    def ruleset(self, name: str) -> Any:
        """The library rule set of that name, as text or in the JSON form; raises ``unknown_ruleset``."""

    def rule_context(self) -> Context:
        """What rules may name: the dictionaries that can be read, the library's propositions, the limits."""

    def encode_text(self, text: str) -> list[int]:
        """Token ids of ``text``, without special tokens."""

    def decode_token(self, token_id: int) -> str:
        """Text of one token."""


def needs_full_encode(sae: SAE) -> bool:
    """Whether an edit of one latent needs all of them: to know which are on, or what the decoder makes of them."""
    return not (sae.row_separable and sae.additive)


def how_to_edit(offered: CatalogueSAE) -> str:
    """What to start the server with, so that the latents of this dictionary can be edited, and why."""
    form = ARCHITECTURES[offered.sae.architecture]
    told = f"start the server with --full-encode {offered.id} ({offered.sae.architecture} SAE): "
    told += "which latents are on depends on the whole dictionary" if form.additive else "its decoder is not additive"
    if form.thresholdable:
        told += f"; or with --approximate {offered.id}, which lets one calibrated threshold decide"
    return told
