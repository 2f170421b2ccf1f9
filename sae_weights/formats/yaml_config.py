"""A YAML file that holds an object: read without constructing anything but plain values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from sae_weights.errors import SAEFormatError

from .devices import refuse_devices

MAX_BYTES = 1 << 20
# Aliases let a short file stand for an exponentially long one, or for one without end.
MAX_VALUES = 100_000


def read_yaml_object(path: Path) -> dict[str, Any]:
    """A YAML mapping with string keys from a file; SAEFormatError names the file and the place otherwise.

    Tags of Python objects, documents longer than 1 MiB, and aliases that expand to more than 100,000 values are refused.
    """
    refuse_devices(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise SAEFormatError(
                f"{path}: {path.stat().st_size} bytes; expected a configuration of at most {MAX_BYTES}"
            )
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SAEFormatError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise SAEFormatError(f"{path}: not UTF-8 text ({error})") from error
    except OSError as error:
        raise SAEFormatError(f"{path}: cannot be read ({error.strerror})") from error
    except SAEFormatError:
        raise
    # ValueError: dates and numbers that only look like ones; the others: mappings as keys, and nesting without end.
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise SAEFormatError(f"{path}: not YAML ({' '.join(str(error).split())[:300]})") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise SAEFormatError(f"{path}: holds no YAML mapping with names as keys")
    _refuse_expansion(path, content)
    return content


def _refuse_expansion(path: Path, content: dict[str, Any]) -> None:
    pending: list[Any] = [content]
    seen = 0
    while pending:
        value = pending.pop()
        inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
        seen += len(inner)
        if seen > MAX_VALUES:
            raise SAEFormatError(f"{path}: its aliases expand to more than {MAX_VALUES} values")
        pending.extend(inner)
