"""The request object that runs a latent map; :mod:`interventions.remapping` has what it compiles into."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from interventions.fields import Name, NotNegative
from interventions.items import Common


class Remap(Common):
    """Maps latents as a library map says: x ← clip(alpha·x + beta·s + gamma·a[source], lo, hi).

    The map brings its SAE, its scope (all tokens, those of a trigger, an entity's mentions) and its gate. It acts on the
    tokens that ``tokens`` selects and that are in its scope, while its gate is open. Strength λ: (1 − λ)·x + λ·(what the
    map makes of it), clipped; 0 changes nothing, above 1 it overshoots.
    """

    type: Literal["remap"] = Field("remap", description="Kind of intervention.")
    map: Name = Field(description="Name of a library map.")
    strength: NotNegative = Field(1.0, description="Factor λ between the identity (0) and the map (1).")
