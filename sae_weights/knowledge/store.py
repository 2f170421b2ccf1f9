"""Reading what is known about an SAE's features, and finding features by words. The layout is in ``layout.py``."""

from __future__ import annotations

import json
import re
import sqlite3
import threading
import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .facts import Feature, KnowledgeError
from .layout import (
    APPLICATION_ID,
    COLUMNS,
    MAX_BLOB,
    MAX_DICTIONARY,
    MAX_FEATURES,
    MAX_TEXT,
    OBJECTS,
    STATEMENTS,
    VERSION,
    Row,
    unpack,
)
from .writer import KnowledgeWriter

if TYPE_CHECKING:
    from collections.abc import Iterator

FILE = "features.sqlite"
"""Its name beside the SAE's weights."""

COLUMN_WEIGHTS = (4.0, 1.0, 0.3, 0.1)
"""bm25 weights of label, words, promoted, around: low enough that a word at several peaks counts more than at one."""
PREFIX_SHARE = 0.4
"""What a word counts that only begins with the word that was asked for."""
MAX_WORDS = 12
"""Words of a query that are looked up."""
SECONDS = 30.0
"""A query that takes longer is given up: the file is made to be slow."""
_CANDIDATES = 5_000


@dataclass(frozen=True)
class Found:
    """A feature that a search found; ``score`` in (0, 1], the best first."""

    feature: Feature
    score: float

    @property
    def index(self) -> int:
        return self.feature.index


class KnowledgeStore:
    """One open file, read-only, usable from any thread."""

    def __init__(self, path: Path, db: sqlite3.Connection) -> None:
        self.path = path
        self._db = db
        self._lock = threading.Lock()
        self._deadline = 0.0
        db.set_progress_handler(lambda: time.monotonic() > self._deadline, 100_000)
        self.meta: Mapping[str, Any] = self._read_meta()
        """Tokens judged, sources with their licences, the demo's scene …"""
        digest, n_features = self.meta.get("sae_digest"), self.meta.get("n_features")
        if not isinstance(digest, str) or type(n_features) is not int or not 1 <= n_features <= MAX_FEATURES:
            raise KnowledgeError(f"{path}: meta lacks sae_digest or n_features")
        found = self._rows("SELECT data FROM dictionary LIMIT 2", ())
        if len(found) > 1 or any(not isinstance(d, bytes) or not 0 < len(d) <= MAX_DICTIONARY for (d,) in found):
            raise KnowledgeError(f"{path}: the dictionary is not one row of at most {MAX_DICTIONARY} bytes")
        self._dictionary: bytes = found[0][0] if found else b""
        self.sae_digest = digest
        self.n_features = n_features

    @classmethod
    def create(cls, path: str | Path, *, sae_digest: str, n_features: int, meta: Mapping[str, Any]) -> KnowledgeWriter:
        """A new store, to be filled; see :class:`KnowledgeWriter`."""
        return KnowledgeWriter.new(path, sae_digest=sae_digest, n_features=n_features, meta=meta)

    @classmethod
    def open(cls, path: str | Path, *, sae_digest: str | None = None) -> KnowledgeStore:
        """Open the file at ``path``, for the SAE with ``sae_digest`` if that is given.

        Raises:
            KnowledgeError: the file is missing, is not what it should be, or belongs to another SAE.
        """
        path = Path(path)
        if not path.is_file():
            raise KnowledgeError(f"{path}: no such file; `editserver sae label` makes it")
        db = None
        try:
            db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False)
            _harden(db)
            _check_objects(path, db)
            store = cls(path, db)
            if sae_digest is not None and store.sae_digest != sae_digest:
                raise KnowledgeError(
                    f"{path}: describes the SAE with digest {store.sae_digest[:12]}…, not {sae_digest[:12]}…; "
                    "make it anew with `editserver sae label --force`"
                )
        except sqlite3.Error as error:
            if db is not None:
                db.close()
            raise KnowledgeError(f"{path}: not a file of feature knowledge ({error})") from None
        except KnowledgeError:
            if db is not None:
                db.close()
            raise
        return store

    def change(self) -> KnowledgeWriter:
        """A writer of a changed copy, which will replace the file; this store goes on reading the old one."""
        return KnowledgeWriter.change(self.path, self.n_features)

    def feature(self, index: int) -> Feature:
        """Everything known about one feature. Raises IndexError outside 0..n_features−1."""
        if not 0 <= index < self.n_features:
            raise IndexError(f"feature {index}; this SAE has 0..{self.n_features - 1}")
        rows = self._rows(f'SELECT {COLUMNS}, facts FROM feature WHERE "index" = ?', (index,))
        return self._unpack(rows[0]) if rows else Feature(index)

    def listing(self, offset: int, limit: int) -> list[Feature]:
        """Features offset, offset + 1, … (at most ``limit``), without contexts and what else one alone has."""
        stop = min(offset + limit, self.n_features)
        query = f'SELECT {COLUMNS} FROM feature WHERE "index" >= ? AND "index" < ?'
        known = {row[0]: self._unpack(row) for row in self._rows(query, (offset, stop))}
        return [known.get(index, Feature(index)) for index in range(offset, stop)]

    def labels(self) -> Mapping[int, str]:
        """The labels that are known, by feature (read once)."""
        return self._labels

    @cached_property
    def _labels(self) -> dict[int, str]:
        rows = self._rows(f"SELECT {COLUMNS} FROM feature WHERE label IS NOT NULL", ())
        return {feature.index: feature.label for row in rows if (feature := self._unpack(row)).label is not None}

    def search(self, query: str, limit: int) -> list[Found]:
        """Features whose label, words or promoted tokens have the query's words (or their beginnings), best first.

        A feature's rank is Σ over words of bm25 (columns weighted ``COLUMN_WEIGHTS``; a mere beginning counts
        ``PREFIX_SHARE``); score = rank / best rank × share of the words that it has. Any text is a valid query.
        """
        words = list(dict.fromkeys(re.findall(r"[^\W_]+", query.lower())))[:MAX_WORDS]
        ranks: dict[int, float] = {}
        hits: dict[int, int] = {}
        for word in words:
            for index, rank in self._matches(word).items():
                ranks[index] = ranks.get(index, 0.0) + rank
                hits[index] = hits.get(index, 0) + 1
        if not ranks:
            return []
        scores = {index: rank * hits[index] / len(words) for index, rank in ranks.items()}
        # The best feature's own coverage is kept: half of the words found is no full score.
        best = max(scores, key=lambda i: (scores[i], -i))
        top = hits[best] / len(words) / scores[best]
        chosen = sorted(scores, key=lambda i: (-scores[i], i))[:limit]
        features = self._some(chosen)
        return [Found(features.get(i, Feature(i)), min(1.0, max(1e-6, scores[i] * top))) for i in chosen]

    def _matches(self, word: str) -> dict[int, float]:
        """bm25 (positive, larger is better) per feature that has the word, or one that begins with it."""
        query = "SELECT rowid - 1, -bm25(search, ?, ?, ?, ?) AS rank FROM search WHERE search MATCH ? ORDER BY 2 DESC LIMIT ?"
        found: dict[int, float] = {}
        for suffix, share in (("*", PREFIX_SHARE), ("", 1.0)):
            if suffix and len(word) < 3:
                continue
            try:
                rows = self._rows(query, (*COLUMN_WEIGHTS, f'"{word}"{suffix}', _CANDIDATES))
            except _QueryError:
                continue  # no text is an error of its author: a word that FTS5 cannot read matches nothing
            for index, rank in rows:
                if type(index) is not int or not 0 <= index < self.n_features or not isinstance(rank, float):
                    raise KnowledgeError(f"{self.path}: the search index names feature {index!r}")
                # bm25 is never positive in FTS5, but may vanish where nearly every feature has the word.
                found[index] = max(found.get(index, 0.0), share * max(rank, 1e-6))
        return found

    def _some(self, indices: list[int]) -> dict[int, Feature]:
        known: dict[int, Feature] = {}
        for start in range(0, len(indices), 500):
            part = indices[start : start + 500]
            marks = ", ".join("?" * len(part))
            rows = self._rows(f'SELECT {COLUMNS} FROM feature WHERE "index" IN ({marks})', tuple(part))
            known |= {row[0]: self._unpack(row) for row in rows}
        return known

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def __enter__(self) -> KnowledgeStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # Reading

    def _unpack(self, row: Row) -> Feature:
        try:
            return unpack(row, self.n_features, self._dictionary)
        except KnowledgeError as error:
            raise KnowledgeError(f"{self.path}: {error}") from None

    def _rows(self, query: str, parameters: tuple[Any, ...]) -> list[Row]:
        with self._lock, self._reading():
            self._deadline = time.monotonic() + SECONDS
            return self._db.execute(query, parameters).fetchall()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            if "fts5: " in str(error) or "unterminated string" in str(error):
                raise _QueryError(str(error)) from None
            raise KnowledgeError(f"{self.path}: damaged ({error})") from None

    def _read_meta(self) -> dict[str, Any]:
        meta: dict[str, Any] = {}
        for name, value in self._rows("SELECT name, value FROM meta LIMIT 1000", ()):
            if not isinstance(name, str) or not isinstance(value, str) or len(value) > MAX_TEXT:
                raise KnowledgeError(f"{self.path}: meta has an entry that is no text")
            try:
                meta[name] = json.loads(value)
            except (ValueError, RecursionError):
                raise KnowledgeError(f"{self.path}: meta entry {name[:60]!r} is not JSON") from None
        return meta


class _QueryError(Exception):
    """FTS5 could not read a query."""


def _harden(db: sqlite3.Connection) -> None:
    """Bounds for a file that may come from anybody."""
    db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 4 * MAX_BLOB)
    db.execute("PRAGMA trusted_schema=OFF")
    db.execute("PRAGMA cell_size_check=ON")
    db.execute("PRAGMA query_only=ON")


def _check_objects(path: Path, db: sqlite3.Connection) -> None:
    ((application,),) = db.execute("PRAGMA application_id")
    if application != APPLICATION_ID:
        raise KnowledgeError(f"{path}: an SQLite file, but not one of feature knowledge")
    ((version,),) = db.execute("PRAGMA user_version")
    if version != VERSION:
        raise KnowledgeError(f"{path}: layout version {version}; this program reads {VERSION}")
    for name, kind, made_by in db.execute("SELECT name, type, sql FROM sqlite_master LIMIT 100").fetchall():
        if OBJECTS.get(name) != kind or (name in STATEMENTS and made_by != STATEMENTS[name]):
            raise KnowledgeError(f"{path}: holds a {kind} {str(name)[:60]!r} that does not belong there")
