"""The file's layout, and the checked way from and to it.

``features.sqlite`` can be read with any SQLite that has FTS5::

    meta(name TEXT PRIMARY KEY, value TEXT)          value is JSON: sae_digest, n_features, tokens, sources, demo, …
    feature("index" INTEGER PRIMARY KEY, label TEXT, label_source TEXT, density REAL, max_activation REAL,
            mean_activation REAL, facts BLOB)         facts: zlib-compressed JSON (below), or NULL
    dictionary(data BLOB)                            at most one row: zlib's preset dictionary for ``facts``
    search USING fts5(label, words, promoted, around)    contentless; rowid = feature index + 1 (rowids start at 1)

``facts`` has the fields, all optional::

    {"quantiles": {"0.5": 3.2, …}, "promoted": [[" music", 0.31], …], "suppressed": […], "neighbours": [[17, 0.62], …],
     "words": ["music", …], "topics": […],
     "contexts": [{"tokens": [" the", " violin"], "activations": {"1": 8.1}, "peak": 1, "source": "brown"}, …]}

where activations are by index of the token and those left out are 0. ``PRAGMA application_id`` is 0x73616566 ("saef") and
``PRAGMA user_version`` the version of the layout. One feature, with Python alone::

    db = sqlite3.connect("features.sqlite")
    data = db.execute("SELECT data FROM dictionary").fetchone()
    facts = db.execute('SELECT facts FROM feature WHERE "index" = 7').fetchone()[0]
    stream = zlib.decompressobj(zdict=data[0]) if data else zlib.decompressobj()
    print(json.loads(stream.decompress(facts)))

Reading trusts nothing: sizes are bounded, types and ranges are checked.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from typing import Any

from .facts import MAX_LABEL, Context, Feature, KnowledgeError

APPLICATION_ID = 0x73616566
VERSION = 1

STATEMENTS = {
    "meta": "CREATE TABLE meta(name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "feature": 'CREATE TABLE feature("index" INTEGER PRIMARY KEY, label TEXT, label_source TEXT, density REAL, '
    "max_activation REAL, mean_activation REAL, facts BLOB)",
    "dictionary": "CREATE TABLE dictionary(data BLOB NOT NULL)",
    # Without content, bm25 needs the positions that detail=full keeps.
    "search": "CREATE VIRTUAL TABLE search USING fts5(label, words, promoted, around, content='', tokenize='porter unicode61')",
}
"""What makes the tables; a file whose tables were made otherwise is refused."""
OBJECTS = dict.fromkeys(
    ("meta", "feature", "dictionary", "search", "search_data", "search_idx", "search_docsize", "search_config"), "table"
)
"""All that the file may hold, FTS5's shadow tables included: no view and no trigger that a reader would run."""

MAX_BLOB = 1 << 20
"""Bytes of one feature's facts, unpacked."""
MAX_TEXT = 1 << 20
"""Bytes of one value of ``meta``."""
MAX_FEATURES = 1 << 25
MAX_DICTIONARY = 1 << 15
"""Bytes of zlib's window: a longer dictionary is of no use."""
_MAX_LIST = 512
_MAX_WORD = 400

Row = tuple[Any, ...]
COLUMNS = '"index", label, label_source, density, max_activation, mean_activation'


def pack(feature: Feature, dictionary: bytes = b"") -> Row:
    """One row of ``feature``."""
    facts = {
        "quantiles": {name: _rounded(value) for name, value in feature.quantiles.items()},
        "promoted": [[token, _rounded(weight)] for token, weight in feature.promoted],
        "suppressed": [[token, _rounded(weight)] for token, weight in feature.suppressed],
        "neighbours": [[index, round(cosine, 3)] for index, cosine in feature.neighbours],
        "words": list(feature.words),
        "topics": list(feature.topics),
        "contexts": [_pack_context(context) for context in feature.contexts],
    }
    stated = {name: value for name, value in facts.items() if value}
    text = json.dumps(stated, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    blob = deflate(text.encode("utf-8", "replace"), dictionary) if stated else None
    numbers = (feature.density, feature.max_activation, feature.mean_activation)
    return feature.index, feature.label, feature.label_source, *numbers, blob


def deflate(text: bytes, dictionary: bytes) -> bytes:
    """zlib, with a preset dictionary if there is one."""
    stream = zlib.compressobj(9, zdict=dictionary) if dictionary else zlib.compressobj(9)
    return stream.compress(text) + stream.flush()


def _pack_context(context: Context) -> dict[str, Any]:
    fired = {str(i): _rounded(a) for i, a in enumerate(context.activations) if a}
    return {"tokens": list(context.tokens), "activations": fired, "peak": context.peak, "source": context.source}


def unpack(row: Row, n_features: int, dictionary: bytes = b"") -> Feature:
    """A feature from its row (``COLUMNS``, or these and ``facts``). Raises KnowledgeError naming the field."""
    index, label, label_source, density, largest, mean, *rest = row
    where = f"feature {index!r}"
    if type(index) is not int or not 0 <= index < n_features:
        raise KnowledgeError(f"{where}: expected an index 0..{n_features - 1}")
    facts = unzip(rest[0], where, dictionary) if rest and rest[0] is not None else {}
    return Feature(
        index,
        _optional_text(label, f"{where}: label", MAX_LABEL),
        _optional_text(label_source, f"{where}: label_source", 100),
        _optional_number(density, f"{where}: density"),
        _optional_number(largest, f"{where}: max_activation"),
        _optional_number(mean, f"{where}: mean_activation"),
        {
            _text(name, f"{where}: quantiles", 20): _number(value, f"{where}: quantiles")
            for name, value in _mapping(facts.get("quantiles", {}), f"{where}: quantiles").items()
        },
        tuple(_context(item, f"{where}: contexts") for item in _list(facts.get("contexts", []), f"{where}: contexts")),
        _weighted(facts.get("promoted", []), f"{where}: promoted"),
        _weighted(facts.get("suppressed", []), f"{where}: suppressed"),
        tuple(
            (_index(index, n_features, f"{where}: neighbours"), _number(cosine, f"{where}: neighbours"))
            for index, cosine in _pairs(facts.get("neighbours", []), f"{where}: neighbours")
        ),
        _texts(facts.get("words", []), f"{where}: words"),
        _texts(facts.get("topics", []), f"{where}: topics"),
    )


def inflate(blob: object, where: str, dictionary: bytes) -> bytes:
    """What a zlib blob holds, at most ``MAX_BLOB`` bytes. Raises zlib.error for other bytes, KnowledgeError for no bytes."""
    if not isinstance(blob, bytes):
        raise KnowledgeError(f"{where}: facts are {type(blob).__name__}; expected a zlib blob")
    stream = zlib.decompressobj(zdict=dictionary) if dictionary else zlib.decompressobj()
    text = stream.decompress(blob, MAX_BLOB)
    if not stream.eof:
        raise KnowledgeError(f"{where}: facts are cut off, or unpack to more than {MAX_BLOB} bytes")
    return text


def unzip(blob: object, where: str, dictionary: bytes) -> dict[str, Any]:
    """The JSON object in a zlib blob."""
    try:
        facts = json.loads(inflate(blob, where, dictionary))
    except (zlib.error, UnicodeDecodeError, ValueError, RecursionError) as error:
        if isinstance(error, KnowledgeError):
            raise
        raise KnowledgeError(f"{where}: facts are not zlib-compressed JSON ({error})") from None
    return _mapping(facts, f"{where}: facts")


def _context(item: object, where: str) -> Context:
    stated = _mapping(item, where)
    tokens = _texts(stated.get("tokens", []), where)
    if not tokens:
        raise KnowledgeError(f"{where}: without tokens")
    activations = [0.0] * len(tokens)
    for place, value in _mapping(stated.get("activations", {}), where).items():
        if not (place.isascii() and place.isdigit() and len(place) < 6 and int(place) < len(tokens)):
            raise KnowledgeError(f"{where}: an activation at {place!r}; the context has tokens 0..{len(tokens) - 1}")
        activations[int(place)] = _number(value, where)
    peak = _index(stated.get("peak"), len(tokens), f"{where}: peak")
    return Context(tokens, tuple(activations), peak, _text(stated.get("source", ""), where, _MAX_WORD))


def _weighted(item: object, where: str) -> tuple[tuple[str, float], ...]:
    return tuple((_text(token, where, _MAX_WORD), _number(weight, where)) for token, weight in _pairs(item, where))


def _pairs(item: object, where: str) -> Sequence[tuple[Any, Any]]:
    pairs = []
    for pair in _list(item, where):
        if not isinstance(pair, list) or len(pair) != 2:
            raise KnowledgeError(f"{where}: {str(pair)[:60]!r}; expected a pair")
        pairs.append((pair[0], pair[1]))
    return pairs


def _texts(item: object, where: str) -> tuple[str, ...]:
    return tuple(_text(entry, where, _MAX_WORD) for entry in _list(item, where))


def _mapping(item: object, where: str) -> dict[str, Any]:
    if not isinstance(item, dict) or len(item) > _MAX_LIST:
        raise KnowledgeError(f"{where}: expected an object with at most {_MAX_LIST} entries, got {str(item)[:60]!r}")
    return item


def _list(item: object, where: str) -> list[Any]:
    if not isinstance(item, list) or len(item) > _MAX_LIST:
        raise KnowledgeError(f"{where}: expected a list of at most {_MAX_LIST} entries, got {str(item)[:60]!r}")
    return item


def _text(item: object, where: str, longest: int) -> str:
    if not isinstance(item, str) or len(item) > longest:
        raise KnowledgeError(f"{where}: expected text of at most {longest} characters, got {str(item)[:60]!r}")
    return item


def _optional_text(item: object, where: str, longest: int) -> str | None:
    return None if item is None else _text(item, where, longest)


def _number(item: object, where: str) -> float:
    if isinstance(item, bool) or not isinstance(item, int | float) or not abs(item) < math.inf or abs(item) > 1e300:
        raise KnowledgeError(f"{where}: expected a finite number, got {str(item)[:60]!r}")
    return float(item)


def _optional_number(item: object, where: str) -> float | None:
    return None if item is None else _number(item, where)


def _index(item: object, count: int, where: str) -> int:
    if type(item) is not int or not 0 <= item < count:
        raise KnowledgeError(f"{where}: {str(item)[:60]!r}; expected 0..{count - 1}")
    return item


def _rounded(value: float) -> float:
    """Three significant digits."""
    rounded = float(f"{value:.3g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
