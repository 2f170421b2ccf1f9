"""From what a person types to an SAE: ``[NAME=]SOURCE``, SOURCE a folder or the id of a bundled dictionary."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from .errors import SAEFormatError
from .formats import load_sae
from .formats.saelens import CONFIG_FILE
from .sae import SAE

BUNDLED_FOLDER = Path(__file__).parent / "bundled"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


def bundled() -> list[str]:
    """Ids of the dictionaries that ship with the package, sorted: ``smollm2-135m/l15``."""
    return sorted(config.parent.relative_to(BUNDLED_FOLDER).as_posix() for config in BUNDLED_FOLDER.rglob(CONFIG_FILE))


def resolve(source: str) -> tuple[str, SAE]:
    """``[NAME=]SOURCE`` → (name, SAE). Without NAME, a bundled SAE is called by its id and a folder by its last part.

    A folder that exists wins over a bundled id only when written as a path (``./``, ``../``, ``/``, ``~``). Raises
    SAEFormatError, with the nearest bundled ids, if SOURCE is neither.
    """
    name, separator, rest = source.partition("=")
    if not separator:
        name, rest = "", source
    # A path may hold "=" itself: then what stands before it is no name.
    elif not _NAME.fullmatch(name):
        if Path(source).expanduser().is_dir():
            name, rest = "", source
        else:
            raise SAEFormatError(
                f"{source!r}: {name!r} is no name; expected letters, digits, '.', '_', '-', '/' before '='"
            )
    if not rest:
        raise SAEFormatError(
            f"{source!r}: names no SAE; expected [NAME=]SOURCE with a folder or one of {_listed(bundled())}"
        )
    ids = bundled()
    written_as_path = rest.startswith((".", "/", "~"))
    if rest in ids and not written_as_path:
        return name or rest, load_sae(BUNDLED_FOLDER / rest)
    folder = Path(rest).expanduser()
    if folder.exists():
        return name or folder.resolve().name, load_sae(folder)
    near = difflib.get_close_matches(rest, ids, n=3, cutoff=0.5)
    nearest = f"nearest bundled: {_listed(near)}" if near else f"bundled: {_listed(ids)}"
    raise SAEFormatError(f"{rest!r}: neither a folder nor a bundled SAE; {nearest}")


def _listed(ids: list[str]) -> str:
    return ", ".join(ids) if ids else "(none)"
