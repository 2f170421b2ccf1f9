"""What is known about the features of a dictionary: measured, labelled, imported, kept in one file beside its weights.

>>> from sae_weights.knowledge import KnowledgeStore
>>> store = KnowledgeStore.open("features.sqlite")
>>> store.search("music", 3)[0].index
2018
"""

from __future__ import annotations

from .facts import Context, Feature, KnowledgeError
from .store import FILE, Found, KnowledgeStore
from .writer import KnowledgeWriter

__all__ = ["FILE", "Context", "Feature", "Found", "KnowledgeError", "KnowledgeStore", "KnowledgeWriter"]
