"""Writing a file of feature knowledge: beside its final name, then moved there whole, so that no reader sees half of it."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from .facts import Feature, KnowledgeError, shorten
from .layout import (
    APPLICATION_ID,
    COLUMNS,
    MAX_DICTIONARY,
    MAX_FEATURES,
    STATEMENTS,
    VERSION,
    deflate,
    inflate,
    pack,
    unpack,
)

_SAMPLES = 40
_WORTH_IT = 500
"""Features from which on a shared dictionary saves more than it takes."""


class KnowledgeWriter:
    """A store that is being written. A context manager: leaving it without an exception puts the file in place.

    Raises KnowledgeError for a feature or label outside 0..n_features−1. A server that has the previous file open goes
    on reading that one.
    """

    def __init__(self, path: str | Path, n_features: int) -> None:
        self.path = Path(path)
        self.n_features = n_features
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
        os.close(handle)
        self._partial = Path(name)
        self._db: sqlite3.Connection | None = None
        self._dictionary = b""

    @classmethod
    def new(cls, path: str | Path, *, sae_digest: str, n_features: int, meta: Mapping[str, Any]) -> KnowledgeWriter:
        """An empty store for the SAE with this digest; ``meta`` is kept as JSON."""
        if type(n_features) is not int or not 1 <= n_features <= MAX_FEATURES:
            raise KnowledgeError(f"n_features: {n_features!r}; expected 1..{MAX_FEATURES}")
        writer = cls(path, n_features)
        db = writer._connect()
        db.execute("PRAGMA page_size=8192")
        db.execute(f"PRAGMA application_id={APPLICATION_ID}")
        db.execute(f"PRAGMA user_version={VERSION}")
        for statement in STATEMENTS.values():
            db.execute(statement)
        writer.set_meta({**meta, "sae_digest": sae_digest, "n_features": n_features})
        return writer

    @classmethod
    def change(cls, path: str | Path, n_features: int) -> KnowledgeWriter:
        """A changed copy of the store at ``path``, which it will replace."""
        writer = cls(path, n_features)
        shutil.copyfile(path, writer._partial)
        found = writer._connect().execute("SELECT data FROM dictionary").fetchone()
        writer._dictionary = found[0] if found else b""
        return writer

    def _connect(self) -> sqlite3.Connection:
        db = self._db = sqlite3.connect(self._partial)
        # The file is thrown away unless all goes well: no journal is needed.
        db.execute("PRAGMA journal_mode=OFF")
        db.execute("PRAGMA synchronous=OFF")
        return db

    @property
    def _open(self) -> sqlite3.Connection:
        if self._db is None:
            raise KnowledgeError(f"{self.path}: the writer is closed")
        return self._db

    def set_meta(self, meta: Mapping[str, Any]) -> None:
        """Set (or replace) these entries of ``meta``."""
        entries = [(name, json.dumps(value, ensure_ascii=False, allow_nan=False)) for name, value in meta.items()]
        self._open.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", entries)

    def add(self, features: Iterable[Feature]) -> None:
        """Write features (replacing what was known under their index)."""
        statement = "INSERT OR REPLACE INTO feature VALUES (?, ?, ?, ?, ?, ?, ?)"
        self._open.executemany(statement, (pack(self._checked(feature), self._dictionary) for feature in features))

    def set_labels(self, labels: Iterable[tuple[int, str, str]]) -> int:
        """Set labels from (index, label, label_source), adding features that were unknown; how many were set."""
        statement = (
            'INSERT INTO feature("index", label, label_source) VALUES (?, ?, ?) ON CONFLICT("index") '
            "DO UPDATE SET label = excluded.label, label_source = excluded.label_source"
        )
        count = 0
        for index, label, source in labels:
            feature = self._checked(Feature(index, shorten(label), source))
            self._open.execute(statement, (feature.index, feature.label, feature.label_source))
            count += 1
        return count

    def feature(self, index: int) -> Feature:
        """What was written about one feature so far."""
        query = f'SELECT {COLUMNS}, facts FROM feature WHERE "index" = ?'
        row = self._open.execute(query, (index,)).fetchone()
        return Feature(index) if row is None else unpack(row, self.n_features, self._dictionary)

    def _checked(self, feature: Feature) -> Feature:
        if type(feature.index) is not int or not 0 <= feature.index < self.n_features:
            raise KnowledgeError(f"feature {feature.index!r}; this SAE has 0..{self.n_features - 1}")
        return feature

    def _compress(self) -> None:
        """Pack all facts anew with a dictionary of what facts of this file look like; it saves a third."""
        db = self._open
        filled = [
            index for (index,) in db.execute('SELECT "index" FROM feature WHERE facts IS NOT NULL ORDER BY "index"')
        ]
        if self._dictionary or len(filled) < _WORTH_IT:
            return
        one = 'SELECT facts FROM feature WHERE "index" = ?'
        samples = (db.execute(one, (i,)).fetchone()[0] for i in filled[:: len(filled) // _SAMPLES])
        self._dictionary = b"".join(inflate(blob, "facts", b"") for blob in samples)[-MAX_DICTIONARY:]
        db.execute("INSERT INTO dictionary VALUES (?)", (self._dictionary,))
        for index in filled:
            text = inflate(db.execute(one, (index,)).fetchone()[0], "facts", b"")
            db.execute('UPDATE feature SET facts = ? WHERE "index" = ?', (deflate(text, self._dictionary), index))

    def _index(self) -> None:
        """Build the search index anew from what is in ``feature``."""
        db = self._open
        db.execute("DROP TABLE search")
        db.execute(STATEMENTS["search"])
        rows = db.execute(f'SELECT {COLUMNS}, facts FROM feature ORDER BY "index"')
        features = (unpack(row, self.n_features, self._dictionary) for row in rows)
        entries = ((f.index + 1, f.label or "", _words(f), _promoted(f), _around(f)) for f in features)
        db.executemany("INSERT INTO search(rowid, label, words, promoted, around) VALUES (?, ?, ?, ?, ?)", entries)
        db.execute("INSERT INTO search(search) VALUES ('optimize')")

    def close(self) -> None:
        """Index, compact and put the file in place."""
        self._compress()
        self._index()
        self._open.commit()
        self._open.execute("VACUUM")
        self._open.close()
        self._db = None
        self._partial.chmod(0o644)
        self._partial.replace(self.path)

    def discard(self) -> None:
        """Leave everything as it was."""
        if self._db is not None:
            self._db.close()
            self._db = None
        with suppress(FileNotFoundError):
            self._partial.unlink()

    def __enter__(self) -> KnowledgeWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is not None:
            self.discard()
            return
        try:
            self.close()
        finally:
            self.discard()


def _words(feature: Feature) -> str:
    """What a feature fires on: its words and topics, and its contexts' peaks."""
    return "\n".join((*feature.words, *feature.topics, *(c.tokens[c.peak] for c in feature.contexts)))


def _around(feature: Feature) -> str:
    """The strongest contexts next to their peaks."""
    return "\n".join("".join(c.tokens[max(0, c.peak - 1) : c.peak + 2]) for c in feature.contexts[:4])


def _promoted(feature: Feature) -> str:
    """Promoted tokens that begin a word: pieces of words are nothing that anybody searches for."""
    return " ".join(token for token, _ in feature.promoted if token[:1].isspace() or token[:1].isupper())
