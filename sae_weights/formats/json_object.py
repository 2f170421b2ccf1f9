"""JSON that came with a checkpoint: read, or refused with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sae_weights.errors import SAEFormatError

from .devices import refuse_devices


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file; SAEFormatError names the file and the place otherwise."""
    refuse_devices(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SAEFormatError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise SAEFormatError(f"{path}: not UTF-8 text ({error})") from error
    except (ValueError, RecursionError) as error:  # also: whole numbers of more digits than Python reads
        raise SAEFormatError(f"{path}: not JSON ({error})") from error
    except OSError as error:
        raise SAEFormatError(f"{path}: cannot be read ({error.strerror})") from error
    if not isinstance(content, dict):
        raise SAEFormatError(f"{path}: holds {_kind(content)}; expected a JSON object")
    return content


def _kind(value: Any) -> str:
    return {list: "a list", str: "a string", int: "a number", float: "a number", bool: "true or false"}.get(
        type(value), "null"
    )
