"""Neuronpedia's exports: ``v1/{modelId}/{sourceId}/`` of its public bucket, or what its API returns.

A folder may hold ``explanations/``, ``features/`` and ``activations/``, each with ``batch-N.jsonl`` or ``.jsonl.gz``; a
single file of any of these, or a ``.json`` file with a list of explanations (or of features with ``explanations``), is
read too. Fields that are used (names as in its export script, ``utils/neuronpedia-utils/…/export-data.py``):

* explanations: ``index`` (a string), ``description``, ``typeName``; from the API also ``scores[].value``, ``createdAt``
* features: ``index``, ``frac_nonzero``, ``maxActApprox``, ``pos_str``/``pos_values``, ``neg_str``/``neg_values``,
  ``topkCosSimIndices``/``topkCosSimValues``
* activations: ``index``, ``tokens``, ``values``; the strongest few become contexts

``modelId`` and ``layer`` must be the same on all lines, and those of the SAE where its config names a ``neuronpedia_id``.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sae_weights.sae import SAE

from .facts import AFTER, BEFORE, Context, Feature, KnowledgeError, shorten
from .imports import Explanation, Imported, explanation_text, feature_index, json_file, lines, sorted_files

CONTEXTS = 8
_LISTED = 10
_TABLES = ("explanations", "features", "activations")


def read(path: Path, sae: SAE) -> Imported:
    """What the export at ``path`` says about ``sae``.

    Raises:
        KnowledgeError: naming file and line of what cannot be used; a path that holds no export.
    """
    reader = _Reader(sae)
    for where, row in _rows(path):
        reader.add(where, row)
    return reader.finish()


def looks_like(path: Path) -> bool:
    """Whether ``path`` is laid out as an export of Neuronpedia."""
    if path.is_file():
        return path.suffix in (".json", ".jsonl", ".gz")
    return any(_batches(path / table) for table in _TABLES) or bool(_batches(path))


def _batches(folder: Path) -> list[Path]:
    return sorted_files(p for p in folder.glob("batch-*.jsonl*") if p.name.endswith((".jsonl", ".jsonl.gz")))


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.is_dir():
        files = [file for table in _TABLES for file in _batches(path / table)] or _batches(path)
        if not files:
            raise KnowledgeError(f"{path}: no batch-N.jsonl(.gz), here or in {', '.join(_TABLES)}")
        for file in files:
            yield from lines(file)
    elif path.suffix == ".json":
        found = json_file(path)
        for number, row in enumerate(found if isinstance(found, list) else [found], 1):
            where = f"{path}: entry {number}"
            if not isinstance(row, dict):
                raise KnowledgeError(f"{where}: a JSON {type(row).__name__}; expected an explanation or a feature")
            explanations = row.get("explanations")
            for explanation in explanations if isinstance(explanations, list) else []:
                if not isinstance(explanation, dict):
                    raise KnowledgeError(f"{where}: explanations: expected objects")
                yield where, {"index": row.get("index")} | explanation
            yield where, row
    else:
        yield from lines(path)


@dataclass
class _Facts:
    feature: Feature
    contexts: list[tuple[float, int, Context]] = field(default_factory=list)


class _Reader:
    def __init__(self, sae: SAE) -> None:
        self._n = sae.n_features
        named = sae.metadata.get("neuronpedia_id")
        self._source: str | None = named if isinstance(named, str) else None
        self._imported = Imported("neuronpedia")
        self._facts: dict[int, _Facts] = {}
        self._order = 0

    def add(self, where: str, row: dict[str, Any]) -> None:
        """One line of any of the three tables, told by its fields."""
        self._check_source(where, row)
        index = feature_index(row.get("index"), self._n, where)
        if "description" in row:
            self._explanation(where, index, row)
        elif "tokens" in row and "values" in row:
            self._activation(where, index, row)
        else:
            known = self._known(index)
            known.feature = _with_facts(known.feature, row, self._n, where)

    def finish(self) -> Imported:
        for index, facts in self._facts.items():
            strongest = sorted(facts.contexts, key=lambda c: (-c[0], c[1]))
            contexts = tuple(context for _, _, context in strongest)
            self._imported.facts[index] = replace(facts.feature, contexts=contexts)
        return self._imported

    def _known(self, index: int) -> _Facts:
        return self._facts.setdefault(index, _Facts(Feature(index)))

    def _check_source(self, where: str, row: dict[str, Any]) -> None:
        model, layer = row.get("modelId"), row.get("layer")
        if model is None and layer is None:
            return
        given = f"{model}/{layer}"
        if self._source is None:
            self._source = given
        elif given != self._source:
            raise KnowledgeError(f"{where}: is about {given[:120]!r}; expected {self._source!r}")

    def _explanation(self, where: str, index: int, row: dict[str, Any]) -> None:
        text = explanation_text(row["description"], where)
        if not text:
            return
        method = row.get("typeName")
        scores = row.get("scores")
        values: list[Any] = [s.get("value") for s in scores if isinstance(s, dict)] if isinstance(scores, list) else []
        numbers = [float(v) for v in values if _is_number(v)]
        created = row.get("createdAt")
        self._imported.offer(
            Explanation(
                index,
                text,
                f"neuronpedia:{shorten(method, 60)}" if isinstance(method, str) and method else "neuronpedia",
                sum(numbers) / len(numbers) if numbers else None,
                created if isinstance(created, str) else "",
            )
        )

    def _activation(self, where: str, index: int, row: dict[str, Any]) -> None:
        tokens, values = row["tokens"], row["values"]
        if not (isinstance(tokens, list) and isinstance(values, list) and len(tokens) == len(values) and tokens):
            raise KnowledgeError(f"{where}: tokens and values must be lists of one length")
        if not all(isinstance(t, str) and len(t) <= 200 for t in tokens) or not all(map(_is_number, values)):
            raise KnowledgeError(f"{where}: tokens must be text and values finite numbers")
        peak = max(range(len(values)), key=lambda i: (values[i], -i))
        first, last = max(0, peak - BEFORE), min(len(tokens), peak + AFTER + 1)
        shown = tuple(t.replace("▁", " ") for t in tokens[first:last])
        context = Context(shown, tuple(float(v) for v in values[first:last]), peak - first, "neuronpedia")
        self._order += 1
        contexts = self._known(index).contexts
        # A heap of the strongest: its smallest goes first, of equals the one that came last.
        entry = (float(values[peak]), -self._order, context)
        if len(contexts) < CONTEXTS:
            heapq.heappush(contexts, entry)
        else:
            heapq.heappushpop(contexts, entry)


def _with_facts(feature: Feature, row: dict[str, Any], n_features: int, where: str) -> Feature:
    neighbours = _pairs(row.get("topkCosSimIndices"), row.get("topkCosSimValues"), where)
    near = tuple((feature_index(i, n_features, where), v) for i, v in neighbours)
    return replace(
        feature,
        density=_number(row.get("frac_nonzero"), f"{where}: frac_nonzero"),
        max_activation=_number(row.get("maxActApprox"), f"{where}: maxActApprox"),
        promoted=_tokens(_pairs(row.get("pos_str"), row.get("pos_values"), where), where),
        suppressed=_tokens(_pairs(row.get("neg_str"), row.get("neg_values"), where), where),
        neighbours=tuple((i, v) for i, v in near if i != feature.index)[:5],
    )


def _pairs(names: object, values: object, where: str) -> list[tuple[Any, float]]:
    if names is None or values is None:
        return []
    if not (isinstance(names, list) and isinstance(values, list) and len(names) == len(values)):
        raise KnowledgeError(f"{where}: two lists of one length were expected, as in pos_str and pos_values")
    if not all(map(_is_number, values)):
        raise KnowledgeError(f"{where}: a value is not a finite number")
    return [(name, float(value)) for name, value in zip(names, values, strict=True)][:64]


def _tokens(pairs: list[tuple[Any, float]], where: str) -> tuple[tuple[str, float], ...]:
    if not all(isinstance(token, str) and len(token) <= 200 for token, _ in pairs):
        raise KnowledgeError(f"{where}: a token is not text")
    return tuple((token.replace("▁", " "), weight) for token, weight in pairs[:_LISTED])


def _is_number(given: object) -> bool:
    return isinstance(given, int | float) and not isinstance(given, bool) and abs(given) < 1e30


def _number(given: object, where: str) -> float | None:
    if given is None:
        return None
    if not isinstance(given, int | float) or not _is_number(given):
        raise KnowledgeError(f"{where}: {str(given)[:40]!r}; expected a finite number")
    return float(given)
