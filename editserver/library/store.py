"""Named, versioned, content-addressed artefacts of one kind, as files in one folder.

::

    vectors/names/formal.json              which content the name stands for now: version and digest
    vectors/objects/<digest>.safetensors   its content, one or more files

Objects never change, names are replaced atomically, so several servers may share the folder without coordination. A
name reaches the file system only after it matched :data:`NAME`; a digest is always our own.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from safetensors import SafetensorError

from interventions.errors import Code, InterventionError
from interventions.wording import choices, nearest, show

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Names of artefacts: no separators, no leading dot."""

_CACHED = 256


class Artefact(Protocol):
    """What can be stored."""

    @property
    def digest(self) -> str:
        """sha256 (hex) of the content, never of the name."""


T = TypeVar("T", bound=Artefact)


@dataclass(frozen=True)
class Listing:
    """A name and the content it stands for."""

    name: str
    version: int
    digest: str
    kind: str = "vector"

    def as_dict(self) -> dict[str, Any]:
        """The contract's form."""
        return {"name": self.name, "kind": self.kind, "version": self.version, "digest": self.digest}


class Library(ABC, Generic[T]):
    """Artefacts of one kind in one folder, which is made when the first one is put."""

    kind: ClassVar[str]
    """Singular, as in listings; its plural is the folder."""
    unknown: ClassVar[Code]
    suffixes: ClassVar[tuple[str, ...]]
    """Of the files that make up one object."""

    def __init__(self, root: Path) -> None:
        self._names = root / f"{self.kind}s" / "names"
        self._objects = root / f"{self.kind}s" / "objects"
        self._cache: OrderedDict[str, T] = OrderedDict()

    @abstractmethod
    def encode(self, artefact: T) -> Mapping[str, bytes]:
        """Suffix → content of the files."""

    @abstractmethod
    def decode(self, files: Mapping[str, bytes]) -> T:
        """Inverse of :meth:`encode`; any of the usual exceptions where the files are damaged."""

    def listings(self) -> list[Listing]:
        """Every name, sorted."""
        names = sorted(path.stem for path in self._names.glob("*.json") if NAME.fullmatch(path.stem))
        return [listing for name in names if (listing := self._read_name(name)) is not None]

    def find(self, name: str) -> Listing:
        """What ``name`` stands for now; raises ``unknown_…``."""
        listing = self._read_name(name) if NAME.fullmatch(name) else None
        if listing is None:
            have = [listing.name for listing in self.listings()]
            shown = choices(have[:20]) + (", …" if len(have) > 20 else "")
            message = f"no {self.kind} {show(name)} in the library, which has {shown}.{nearest(name, have)}"
            raise InterventionError(self.unknown, message)
        return listing

    def get(self, name: str) -> T:
        """The content of ``name``; raises ``unknown_…``, or ``invalid_artifact`` if its files are damaged."""
        listing = self.find(name)
        cached = self._cache.get(listing.digest)
        if cached is None:
            cached = self._cache[listing.digest] = self._load(listing)
            if len(self._cache) > _CACHED:
                self._cache.popitem(last=False)
        self._cache.move_to_end(listing.digest)
        return cached

    def put(self, name: str, artefact: T) -> Listing:
        """Store ``artefact`` and let ``name`` stand for it; the same content again is the same version."""
        if not NAME.fullmatch(name):
            message = f"{show(name)} is not a name: letters, digits, '.', '_', '-', at most 128, not starting with '.'"
            raise InterventionError("invalid_artifact", message, "name")
        before = self._read_name(name)
        listing = Listing(name, before.version if before else 1, artefact.digest, self.kind)
        if before is not None and before.digest != listing.digest:
            listing = Listing(name, before.version + 1, listing.digest, self.kind)
        for suffix, data in self.encode(artefact).items():
            _write(self._objects / f"{listing.digest}.{suffix}", data)
        _write(self._names / f"{name}.json", json.dumps(listing.as_dict()).encode())
        return listing

    def delete(self, name: str) -> Listing:
        """Forget ``name``, and its content if no other name has it; raises ``unknown_…``."""
        listing = self.find(name)
        (self._names / f"{name}.json").unlink(missing_ok=True)
        if all(other.digest != listing.digest for other in self.listings()):
            for suffix in self.suffixes:
                (self._objects / f"{listing.digest}.{suffix}").unlink(missing_ok=True)
            self._cache.pop(listing.digest, None)
        return listing

    def _read_name(self, name: str) -> Listing | None:
        try:
            raw = json.loads((self._names / f"{name}.json").read_bytes())
            version, digest = raw["version"], raw["digest"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            version, digest = 0, ""
        if isinstance(version, int) and isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest):
            return Listing(name, version, digest, self.kind)
        raise InterventionError("invalid_artifact", f"the library's entry {name!r} is damaged; put it again")

    def _load(self, listing: Listing) -> T:
        try:
            artefact = self.decode({s: (self._objects / f"{listing.digest}.{s}").read_bytes() for s in self.suffixes})
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            message = f"the content of {self.kind} {listing.name!r} cannot be read ({error}); put it again"
            raise InterventionError("invalid_artifact", message) from error
        if artefact.digest != listing.digest:
            message = f"the content of {self.kind} {listing.name!r} does not match its digest; put it again"
            raise InterventionError("invalid_artifact", message)
        return artefact


def _write(path: Path, data: bytes) -> None:
    """Write beside the final place, then rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
