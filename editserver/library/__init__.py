"""What a server keeps under names: steering vectors, concepts and maps, versioned and content-addressed."""

from __future__ import annotations

from editserver.library.concepts import ConceptLibrary, concept_body, parse_concept
from editserver.library.maps import MapLibrary
from editserver.library.store import NAME, Library, Listing
from editserver.library.vectors import MAX_NOTES_BYTES, Vector, VectorLibrary, parse_vector

__all__ = [
    "MAX_NOTES_BYTES",
    "NAME",
    "ConceptLibrary",
    "Library",
    "Listing",
    "MapLibrary",
    "Vector",
    "VectorLibrary",
    "concept_body",
    "parse_concept",
    "parse_vector",
]
