"""What a server keeps under names: steering vectors, concepts, maps and rule sets, versioned and content-addressed."""

from __future__ import annotations

from editserver.library.concepts import ConceptLibrary, concept_body, parse_concept
from editserver.library.maps import MapLibrary
from editserver.library.rulesets import RulesetLibrary, StoredRuleset, parse_ruleset_body, split_source
from editserver.library.store import NAME, Library, Listing
from editserver.library.vectors import MAX_NOTES_BYTES, Vector, VectorLibrary, parse_vector

__all__ = [
    "MAX_NOTES_BYTES",
    "NAME",
    "ConceptLibrary",
    "Library",
    "Listing",
    "MapLibrary",
    "RulesetLibrary",
    "StoredRuleset",
    "Vector",
    "VectorLibrary",
    "concept_body",
    "parse_concept",
    "parse_ruleset_body",
    "parse_vector",
    "split_source",
]
