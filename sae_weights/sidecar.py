"""What editserver has measured about a dictionary, in a JSON file beside its weights: ``editserver.json``.

``median_norm``, ``max_activation``, ``calibrated_threshold`` …; its fields join the metadata of the SAE.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .formats.json_object import read_json_object

FILE = "editserver.json"


def sidecar_path(path: Path) -> Path:
    """In the dictionary's folder; beside it for a single file, and where the folder's own one is a published file."""
    inside = path / FILE
    return inside if path.is_dir() and not inside.is_symlink() else path.with_name(f"{path.name}.{FILE}")


def read_sidecar(path: Path) -> dict[str, Any]:
    """The fields of the dictionary at ``path``; none where there is no file. SAEFormatError if it is not an object."""
    place = sidecar_path(path)
    return read_json_object(place) if place.exists() else {}


def write_sidecar(path: Path, fields: Mapping[str, Any]) -> Path:
    """Set these fields, keep the others; returns the file. Raises OSError where nothing can be written."""
    place = sidecar_path(path)
    content = {**read_sidecar(path), **fields}
    temporary = place.with_name(f".{place.name}.{os.getpid()}.part")
    temporary.write_text(json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(place)
    return place
