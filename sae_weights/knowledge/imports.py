"""Published explanations into a store: what was read, which of several explanations wins, and what it replaces.

Of several explanations of one feature the best scored wins, then the newest (``createdAt``), then the one that came last.
An imported label replaces an automatic or an earlier imported one, never one given by hand. Other facts (density, contexts,
promoted tokens …) only fill in what the store does not know: what was measured here stays.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from sae_weights.sae import SAE

from .facts import Feature, KnowledgeError, shorten
from .store import KnowledgeStore
from .writer import KnowledgeWriter

MAX_LINE = 4 << 20
"""Bytes of one line; an explanation with its embedding has about ten thousand."""
MAX_JSON = 64 << 20
"""Bytes of a file that is not read line by line."""
_FREE, _RATIO = 64 << 20, 100
"""A gzip file may unpack to ``_FREE`` bytes, and beyond that to ``_RATIO`` times its own size."""


@dataclass(frozen=True)
class Explanation:
    """One explanation of one feature; ``created`` is an ISO time, "" if unknown."""

    index: int
    text: str
    source: str
    score: float | None = None
    created: str = ""

    @property
    def rank(self) -> tuple[float, str]:
        return (-1.0 if self.score is None else self.score, self.created)


@dataclass
class Imported:
    """What an export says about one SAE: the best explanation per feature, and facts."""

    format: str
    explanations: dict[int, Explanation] = field(default_factory=dict)
    facts: dict[int, Feature] = field(default_factory=dict)
    read: int = 0

    def offer(self, explanation: Explanation) -> None:
        """Keep the explanation if it is the best so far."""
        self.read += 1
        known = self.explanations.get(explanation.index)
        if known is None or explanation.rank >= known.rank:
            self.explanations[explanation.index] = explanation


def write(imported: Imported, sae: SAE, path: Path) -> int:
    """Put what was imported into the store at ``path``, made if it is missing; the number of labels that were set.

    Raises:
        KnowledgeError: the store there belongs to another SAE, or is damaged.
    """
    origin = {"format": imported.format, "explanations": imported.read, "features": len(imported.explanations)}
    if path.exists():
        with KnowledgeStore.open(path, sae_digest=sae.digest) as store:
            by_hand = {f.index for f in store.listing(0, store.n_features) if f.label_source == "hand"}
            earlier = store.meta.get("imports")
            writer = store.change()
    else:
        by_hand, earlier = set(), None
        facts = {"hook": str(sae.hook), "model": sae.metadata.get("model_name")}
        writer = KnowledgeStore.create(path, sae_digest=sae.digest, n_features=sae.n_features, meta=facts)
    with writer:
        writer.set_meta({"imports": [*(earlier if isinstance(earlier, list) else []), origin]})
        writer.add(_filled(writer, imported.facts))
        chosen = (e for i, e in sorted(imported.explanations.items()) if i not in by_hand)
        return writer.set_labels((e.index, e.text, e.source) for e in chosen)


def _filled(writer: KnowledgeWriter, facts: Mapping[int, Feature]) -> Iterator[Feature]:
    for index, new in sorted(facts.items()):
        known = writer.feature(index)
        missing = {f.name: getattr(new, f.name) for f in fields(Feature) if not getattr(known, f.name)}
        yield replace(known, **(missing | {"index": index}))


# Reading what anybody may have written


def lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, the JSON object there) of a ``.jsonl`` or ``.jsonl.gz`` file, one line in memory at a time.

    Raises:
        KnowledgeError: a line that is too long or no JSON object; a damaged gzip file, or one that unpacks beyond reason.
    """
    most = _FREE + _RATIO * path.stat().st_size
    unpacked = 0
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        number = 0
        while True:
            number += 1
            where = f"{path}:{number}"
            try:
                line = file.readline(MAX_LINE + 1)
            except (OSError, EOFError, zlib.error) as error:
                raise KnowledgeError(f"{where}: not a gzip file, or damaged ({error})") from None
            if not line:
                return
            unpacked += len(line)
            if len(line) > MAX_LINE:
                raise KnowledgeError(f"{where}: longer than {MAX_LINE} bytes; expected one JSON object per line")
            if unpacked > most:
                raise KnowledgeError(f"{where}: the file unpacks to more than {most} bytes; refused")
            if line.strip():
                yield where, json_object(line, where)


def json_file(path: Path) -> object:
    """A whole JSON file of at most ``MAX_JSON`` bytes."""
    size = path.stat().st_size
    if size > MAX_JSON:
        raise KnowledgeError(f"{path}: {size} bytes; a JSON file of explanations has at most {MAX_JSON}")
    return parse(path.read_bytes(), str(path))


def json_object(line: bytes, where: str) -> dict[str, Any]:
    """The JSON object in ``line``."""
    found = parse(line, where)
    if not isinstance(found, dict):
        raise KnowledgeError(f"{where}: a JSON {type(found).__name__}; expected an object")
    return found


def parse(text: bytes, where: str) -> object:
    """JSON without NaN and infinities, nested no deeper than Python reads."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise KnowledgeError(f"{where}: not JSON ({error})") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def feature_index(given: object, n_features: int, where: str) -> int:
    """A feature's index, which exports write as a number or as a string of digits."""
    text = given if isinstance(given, str) else str(given) if type(given) is int else ""
    if not (text.isascii() and text.isdigit() and len(text) <= 12 and int(text) < n_features):
        raise KnowledgeError(f"{where}: index {str(given)[:40]!r}; this SAE has 0..{n_features - 1}")
    return int(text)


def explanation_text(given: object, where: str) -> str:
    """An explanation as one line."""
    if not isinstance(given, str):
        raise KnowledgeError(f"{where}: the explanation is {str(given)[:40]!r}; expected text")
    return shorten(given)


def sorted_files(files: Iterable[Path]) -> list[Path]:
    """``batch-2`` before ``batch-10``."""
    return sorted(files, key=lambda p: (str(p.parent), len(p.name), p.name))
