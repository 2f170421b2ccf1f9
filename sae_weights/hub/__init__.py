"""Dictionaries on the Hugging Face Hub: which files one needs, their download, and the record of their hashes."""

from __future__ import annotations

from .download import Fetched, fetch
from .files import CONFIGS, TENSORS
from .place import SCHEME, HubPath
from .record import hashes

__all__ = ["CONFIGS", "SCHEME", "TENSORS", "Fetched", "HubPath", "fetch", "hashes"]
