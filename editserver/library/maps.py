"""Latent maps: one safetensors file each; their JSON form is that of :mod:`interventions.maps.body`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from editserver.library.store import Library
from interventions.errors import Code
from interventions.maps.body import from_bytes, to_bytes
from interventions.maps.map import LatentMap


class MapLibrary(Library[LatentMap]):
    """Maps of one folder."""

    kind: ClassVar[str] = "map"
    unknown: ClassVar[Code] = "unknown_map"
    suffixes: ClassVar[tuple[str, ...]] = ("safetensors",)

    def encode(self, artefact: LatentMap) -> Mapping[str, bytes]:
        """The artefact's own file."""
        return {"safetensors": to_bytes(artefact)}

    def decode(self, files: Mapping[str, bytes]) -> LatentMap:
        """The map."""
        return from_bytes(files["safetensors"])
