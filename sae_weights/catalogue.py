"""From what a person types to an SAE: ``[NAME=]SOURCE``.

SOURCE is, in this order: a path (written as one: ``./``, ``../``, ``/``, ``~``), the id of a bundled dictionary, an id
``release/sae_id`` of the registry, a folder or file that exists, a place on the Hub (``hf://org/repo/path``; without
``hf://`` where nothing else can be meant). Registry ids and Hub places take ``@revision``.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .architectures import ARCHITECTURES
from .errors import SAEFormatError
from .formats import FORMATS, Hints, load_sae
from .formats.json_object import read_json_object
from .formats.saelens import CONFIG_FILE
from .formats.saelens_config import SCALED_INPUT
from .hub import SCHEME, Fetched, HubPath, fetch
from .registry import Entry, registry
from .sae import SAE
from .sidecar import read_sidecar

BUNDLED_FOLDER = Path(__file__).parent / "bundled"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


@dataclass(frozen=True)
class Located:
    """Where a dictionary is, before it is opened.

    Attributes:
        name: what it is called: NAME, else the id as typed without ``@revision``, else the path's last part.
        path: the folder or file, on this machine by now.
        hints: what the registry knows about it.
        entry, fetched: its registry entry and its download, where it has them.
    """

    name: str
    path: Path
    hints: Hints = field(default_factory=Hints)
    entry: Entry | None = None
    fetched: Fetched | None = None

    def provenance(self) -> dict[str, Any] | None:
        """Where it was downloaded from; None for what was on this machine."""
        if self.fetched is None:
            return None
        stated = self.fetched.provenance()
        return stated if self.entry is None else {**stated, "registry": self.entry.as_dict()}

    def open(self, *, format: str | None = None, hints: Hints | None = None) -> SAE:
        """The dictionary; ``hints`` win over the registry's. Raises SAEFormatError."""
        given = (hints or Hints()).as_dict()
        sae = load_sae(self.path, format=format, hints=replace(self._known(), **given))
        provenance = self.provenance()
        known = {} if provenance is None else {"provenance": provenance}
        sae.metadata = {**sae.metadata, **read_sidecar(self.path), **known}
        return sae

    def _known(self) -> Hints:
        """The registry's hints. Its factor is for dictionaries that were trained on scaled inputs; others ignore it."""
        config = self.path / CONFIG_FILE
        if self.entry is None or self.entry.loader != "sae_lens" or not config.is_file():
            return self.hints
        stated = {**read_json_object(config), **(self.hints.overrides or {})}.get("normalize_activations")
        return self.hints if stated in (SCALED_INPUT, True) else replace(self.hints, norm_scaling_factor=None)


def bundled() -> list[str]:
    """Ids of the dictionaries that ship with the package, sorted: ``smollm2-135m/l15``."""
    return sorted(config.parent.relative_to(BUNDLED_FOLDER).as_posix() for config in BUNDLED_FOLDER.rglob(CONFIG_FILE))


def resolve(source: str) -> tuple[str, SAE]:
    """``[NAME=]SOURCE`` → (name, SAE); ``sae.origin`` says how another process opens it, without a network.

    Raises SAEFormatError, with the nearest ids, if SOURCE names nothing or cannot be opened.
    """
    found = locate(source)
    return found.name, found.open()


def locate(source: str) -> Located:
    """``[NAME=]SOURCE`` → where it is; downloads it if it is on the Hub and not in the cache yet.

    Raises SAEFormatError, with the nearest ids, if SOURCE names nothing.
    """
    name, rest = _split(source)
    ids = bundled()
    if not rest:
        raise SAEFormatError(
            f"{source!r}: names no SAE; expected [NAME=]SOURCE with a folder or one of {_listed(bundled())}"
        )
    if rest.startswith(SCHEME):
        where = HubPath.parse(rest)
        return _on_hub(name or _id(rest.removeprefix(SCHEME)), where, _entry_at(where))
    if not rest.startswith((".", "/", "~")):
        if rest in ids:
            return Located(name or rest, BUNDLED_FOLDER / rest)
        place, _, revision = rest.partition("@")
        entry = registry().get(place)
        if entry is not None:
            return _on_hub(name or place, HubPath(entry.repo, entry.hub_path, revision or None), entry)
    path = Path(rest).expanduser()
    if path.exists():
        # "." has no name of its own; a link is called as it is written, not as what it points to.
        return Located(name or path.name or path.resolve().name, path)
    if (where_else := _unmistakably_hub(rest)) is not None:
        return _on_hub(name or _id(rest), where_else, _entry_at(where_else))
    raise SAEFormatError(f"{rest!r}: {_nowhere(rest, ids)}")


def _split(source: str) -> tuple[str, str]:
    """(NAME or "", SOURCE)."""
    name, separator, rest = source.partition("=")
    if not separator:
        return "", source
    if _NAME.fullmatch(name):
        return name, rest
    # A path may hold "=" itself: then what stands before it is no name.
    if source.startswith(SCHEME) or Path(source).expanduser().exists():
        return "", source
    raise SAEFormatError(f"{source!r}: {name!r} is no name; expected letters, digits, '.', '_', '-', '/' before '='")


def _id(typed: str) -> str:
    return typed.partition("@")[0].strip("/")


def _on_hub(name: str, where: HubPath, entry: Entry | None) -> Located:
    if entry is not None and entry.loader in ARCHITECTURES and ARCHITECTURES[entry.loader].execution == "sequence":
        raise SAEFormatError(f"{where}: not supported: {ARCHITECTURES[entry.loader].why_not}")
    fetched = fetch(where)
    path, folder = fetched.local, fetched.snapshot / where.path
    if folder.is_dir() and path != folder and any(one.recognises(folder) for one in FORMATS):
        path = folder
    return Located(name, path, entry.hints() if entry is not None else Hints(), entry, fetched)


def _entry_at(where: HubPath) -> Entry | None:
    """The registry's entry for a place on the Hub: it may know what the files do not say."""
    if where.repo not in registry().repos:
        return None
    return next((e for e in registry() if e.repo == where.repo and e.hub_path == where.path), None)


def _unmistakably_hub(rest: str) -> HubPath | None:
    """A place on the Hub written without ``hf://``: a repository that the registry knows, or a path of three parts and
    more whose first resembles no folder here and no id."""
    try:
        where = HubPath.parse(rest)
    except SAEFormatError:
        return None
    if where.repo in registry().repos:
        return where
    first = rest.split("/")[0]
    resembles = Path(first).exists() or registry().nearest(rest) or any(i.startswith(f"{first}/") for i in bundled())
    return None if resembles or not where.path else where


def _nowhere(rest: str, ids: list[str]) -> str:
    near = difflib.get_close_matches(rest, ids, n=3, cutoff=0.5)
    published = [] if near else registry().nearest(_id(rest))
    if published:
        nearest = f"nearest in the registry: {_listed(published)}"
    else:
        nearest = f"nearest bundled: {_listed(near)}" if near else f"bundled: {_listed(ids)}"
    return f"neither a folder or file, nor a bundled SAE, nor an id of the registry (release/sae_id); {nearest}"


def _listed(ids: list[str]) -> str:
    return ", ".join(ids) if ids else "(none)"
