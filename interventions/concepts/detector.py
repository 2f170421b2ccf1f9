"""When a concept counts as present: propositions that a rule set can use.

A detector scores each token by a few latents of the concept's dictionary: one of them (*single*), a weighted sum (*multi*), or a
shallow decision tree (*relation*). A token counts where ``score >= threshold``. A text counts by its tokens from position 1 on,
in one of two ways: its largest score reaches a threshold of its own (:class:`Peak`, in rules ``prompt(name.text)``), or a share
of its tokens counts (:class:`Share`, in rules ``at least 12 % of prompt(name)``).

R_single, R_multi and R_relation of ActivationReasoning (arXiv 2510.18184). Unlike its public code, the threshold decides, and
the boundary belongs to the positives.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, get_args

import numpy as np
import numpy.typing as npt

from interventions.errors import InterventionError
from interventions.rules.errors import Place, RuleError
from interventions.rules.formula import PPM, percent
from interventions.rules.grammar import KEYWORDS, NAME
from interventions.rules.json_form import read_json
from interventions.rules.numbers import MAX_FEATURE, share, tree, weighted
from interventions.rules.proposition import MAX_TREE_DEPTH, Leaf, Proposition, Readings, Split, Sum, Tree, shown
from interventions.rules.syntax import Declaration
from interventions.wording import choices, nearest, printable, show

Kind = Literal["single", "multi", "relation"]
KINDS: tuple[Kind, ...] = get_args(Kind)

MAX_NODES = 2 ** (MAX_TREE_DEPTH + 1) - 1
ARRAYS: dict[str, tuple[str, int]] = {
    "detector_features": ("int64", 1),
    "detector_weights": ("float32", 1),
    "detector_nodes": ("int64", 2),
    "detector_values": ("float32", 1),
}
"""Name → dtype and dimensions of what a file holds: the first two of a sum, the last two of a tree."""

_TEXT = ".text"
_SAE = "sae"


@dataclass(frozen=True)
class Peak:
    """A text counts where its largest score is at least ``threshold``."""

    threshold: float


@dataclass(frozen=True)
class Share:
    """A text counts where at least ``ppm`` millionths of its tokens count."""

    ppm: int


@dataclass(frozen=True)
class Detector:
    """A score of tokens, and from where on a token and a text count.

    Attributes:
        kind: "single", "multi" or "relation".
        score: over latents of the concept's dictionary.
        threshold: τ: a token counts where ``score >= threshold`` (float32).
        text: when a text counts; ``None`` where that was not calibrated.

    Raises:
        InterventionError: ``invalid_artifact``, ``param`` naming the field.
    """

    kind: Kind
    score: Sum | Tree
    threshold: float
    text: Peak | Share | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            _fail("kind", f"expected one of {choices(KINDS)}, got {show(self.kind)}")
        if isinstance(self.score, Tree) != (self.kind == "relation"):
            _fail("kind", f"{self.kind!r} is not the kind of this score")
        if isinstance(self.score, Sum) and self.kind == "single" and len(self.score.terms) != 1:
            _fail("kind", f"'single' reads one latent, got {len(self.score.terms)}")
        _check_real(self.threshold, "threshold")
        if isinstance(self.text, Peak):
            _check_real(self.text.threshold, "text.threshold")
        elif isinstance(self.text, Share) and not (type(self.text.ppm) is int and 0 < self.text.ppm <= PPM):
            _fail("text.percent", f"expected more than 0 and at most 100 %, got {show(self.text.ppm)} ppm")

    def features(self) -> tuple[int, ...]:
        """The latents that are read, ascending."""
        return self.score.features()

    @property
    def own_text_level(self) -> bool:
        """Whether texts have a threshold of scores that is not the tokens'."""
        return isinstance(self.text, Peak) and self.text.threshold != self.threshold

    def propositions(self, sae_id: str, name: str) -> dict[str, Proposition]:
        """What rules may use: ``name`` for tokens, and ``name.text`` where texts have a threshold of their own.

        Args:
            sae_id: under which the concept's dictionary is served.
            name: the concept's, in the library.
        """
        found = {name: Proposition(sae_id, self.score, ">=", self.threshold)}
        if isinstance(self.text, Peak) and self.own_text_level:
            found[name + _TEXT] = Proposition(sae_id, self.score, ">=", self.text.threshold)
        return found

    def expressions(self, sae_id: str, name: str) -> dict[str, str]:
        """How to write "this token" (``token``) and "this prompt" (``text``, where texts were calibrated) in a rule."""
        written = {key: key if _writable(key) else one.text for key, one in self.propositions(sae_id, name).items()}
        token = written[name]
        if self.text is None:
            return {"token": token}
        if isinstance(self.text, Share):
            return {"token": token, "text": f"at least {percent(self.text.ppm)} % of prompt({token})"}
        return {"token": token, "text": f"prompt({written.get(name + _TEXT, token)})"}

    def scores(self, activation: Mapping[int, npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
        """The score of each token, float32 ``[n]``, of latent → activations ``[n]``: what rules compute, to the bit."""
        readings: Readings = {(_SAE, feature): activation[feature] for feature in self.features()}
        return Proposition(_SAE, self.score, ">=", self.threshold).scores(readings)

    def tokens(self, scores: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        """Which tokens count."""
        return scores >= np.float32(self.threshold)

    def holds(self, scores: npt.NDArray[np.float32]) -> bool:
        """Whether a text counts whose tokens from position 1 on have these scores.

        Raises:
            ValueError: texts were not calibrated.
        """
        if isinstance(self.text, Share):
            return int(self.tokens(scores).sum()) * PPM >= self.text.ppm * max(1, len(scores))
        if self.text is None:
            raise ValueError("the detector has no threshold for texts")
        return bool((scores >= np.float32(self.text.threshold)).any())

    # forms -----------------------------------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        """JSON, in the words of rules: ``{"kind", "features" or "tree", "op", "threshold", "text"}``."""
        written = Proposition(_SAE, self.score, ">=", self.threshold).as_json()
        del written[_SAE]
        text = self._text()
        if isinstance(self.text, Peak):
            text = {"threshold": float(shown(self.text.threshold))}
        return {"kind": self.kind, **written, "text": text}

    def _text(self) -> dict[str, float] | None:
        if isinstance(self.text, Share):
            return {"percent": self.text.ppm * 100 / PPM}
        return None if self.text is None else {"threshold": self.text.threshold}

    def facts(self) -> dict[str, Any]:
        """What of it is no array: ``{"kind", "threshold", "text"}``."""
        return {"kind": self.kind, "threshold": self.threshold, "text": self._text()}

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The score as plain arrays, see :data:`ARRAYS`.

        A node of a tree is ``(feature, then, other)`` with numbers of later nodes and its value the threshold of
        ``activation >= value``; a leaf is ``(−1, 0, 0)`` and its value the score. Node 0 is the root, depth first.
        """
        if isinstance(self.score, Sum):
            features, weights = zip(*self.score.terms, strict=True)
            return {"detector_features": np.array(features, np.int64), "detector_weights": np.array(weights, "<f4")}
        nodes: list[tuple[int, int, int]] = []
        values: list[float] = []
        _flatten(self.score.root, nodes, values)
        return {"detector_nodes": np.array(nodes, np.int64), "detector_values": np.array(values, "<f4")}

    @classmethod
    def from_arrays(cls, facts: Any, arrays: Mapping[str, npt.NDArray[Any]]) -> Detector:
        """Inverse of :meth:`facts` and :meth:`arrays`; nothing in them is trusted.

        Raises:
            InterventionError: ``invalid_artifact``.
        """
        fields = _fields(facts, ("kind", "threshold", "text"))
        wanted = tuple(ARRAYS)[2:] if fields["kind"] == "relation" else tuple(ARRAYS)[:2]
        if set(arrays) != set(wanted):
            _fail(None, f"expected the tensors {choices(wanted)}, got {choices(sorted(arrays))}")
        for name in wanted:
            dtype, ndim = ARRAYS[name]
            array = arrays[name]
            if array.dtype != dtype or array.ndim != ndim or not 0 < len(array) <= MAX_NODES:
                _fail(name, f"expected {dtype} with {ndim} dimensions and 1 to {MAX_NODES} rows, got {array.shape}")
            if not np.isfinite(array).all():
                _fail(name, "holds a value that is not finite")
        one, two = (arrays[name] for name in wanted)
        if len(one) != len(two):
            _fail(wanted[1], f"expected {len(one)} numbers, got {len(two)}")
        score = _grown(one, two) if fields["kind"] == "relation" else _summed(one, two)
        return cls(fields["kind"], score, _number(fields["threshold"], "threshold"), _text_of(fields["text"]))


def detector_from_dict(raw: Any) -> Detector:
    """Read :meth:`Detector.as_dict`.

    Raises:
        InterventionError: ``invalid_artifact``, ``param`` naming the field.
    """
    fields = _fields(raw, ("kind", "threshold"), ("features", "tree", "op", "text"))
    if fields["op"] not in (None, ">="):
        _fail("op", f"a token counts where score >= threshold; got {show(fields['op'])}")
    given = {key: fields[key] for key in ("features", "tree", "threshold") if fields[key] is not None}
    try:
        (one,) = read_json({"propositions": {"detector": {_SAE: _SAE, "op": ">=", **given}}})
    except RuleError as error:
        _fail((error.param or "").removeprefix("propositions.detector").lstrip(".") or None, error.detail)
    assert isinstance(one, Declaration)
    found = one.inline.proposition
    return Detector(fields["kind"], found.score, found.threshold, _text_of(fields["text"]))


def _flatten(node: Leaf | Split, nodes: list[tuple[int, int, int]], values: list[float]) -> int:
    number = len(nodes)
    nodes.append((-1, 0, 0))
    if isinstance(node, Leaf):
        values.append(node.value)
        return number
    values.append(node.threshold)
    if node.comparison != ">=":
        raise ValueError("splits of a detector compare activation >= threshold")
    then = _flatten(node.then, nodes, values)
    nodes[number] = (node.feature, then, _flatten(node.other, nodes, values))
    return number


def _summed(features: npt.NDArray[Any], weights: npt.NDArray[Any]) -> Sum:
    if features[0] < 0 or not (np.diff(features) > 0).all() or features[-1] > MAX_FEATURE:
        _fail("detector_features", "expected indices ≥ 0, ascending, each once")
    if not weights.all():
        _fail("detector_weights", "holds a weight of 0")
    terms = [(int(feature), float(weight)) for feature, weight in zip(features, weights, strict=True)]
    try:
        return weighted(_SAE, terms, Place())
    except RuleError as error:
        _fail("detector_features", error.detail)


def _grown(nodes: npt.NDArray[Any], values: npt.NDArray[Any]) -> Tree:
    if nodes.shape[1] != 3:
        _fail("detector_nodes", f"expected three numbers a node, got {nodes.shape[1]}")
    rows, seen = nodes.tolist(), 0

    def branch(depth: int) -> Leaf | Split:
        nonlocal seen
        number, seen = seen, seen + 1
        feature, then, other = rows[number]
        if feature == -1:
            return Leaf(float(values[number]) + 0.0)
        if not 0 <= feature <= MAX_FEATURE or depth == MAX_TREE_DEPTH:
            _fail("detector_nodes", f"node {number}: expected a latent, at most {MAX_TREE_DEPTH} below the root")
        # Depth first: the first branch follows its split, the second one the whole first branch.
        if then != seen or seen == len(rows):
            _fail("detector_nodes", f"node {number}: expected its branches behind it, depth first")
        first = branch(depth + 1)
        if other != seen or seen == len(rows):
            _fail("detector_nodes", f"node {number}: expected its branches behind it, depth first")
        return Split(int(feature), ">=", float(values[number]) + 0.0, first, branch(depth + 1))

    root = branch(0)
    if seen != len(rows):
        _fail("detector_nodes", f"{len(rows) - seen} nodes hang on nothing")
    try:
        found = tree(root, Place())
    except RuleError as error:
        _fail("detector_nodes", error.detail)
    if found.root != root:
        _fail("detector_nodes", "holds a split whose two sides are equal")
    return found


def _fields(raw: Any, needed: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    known = (*needed, *optional)
    if not isinstance(raw, Mapping):
        _fail(None, f"expected an object with {choices(known)}; got {show(raw)}")
    for name in raw:
        if name not in known:
            _fail(printable(str(name)[:64]), f"unknown field.{nearest(str(name), known)}")
    for name in needed:
        if name not in raw:
            _fail(name, "is required")
    fields = {name: raw.get(name) for name in known}
    if fields["kind"] not in KINDS:
        _fail("kind", f"expected one of {choices(KINDS)}, got {show(fields['kind'])}")
    return fields


def _text_of(raw: Any) -> Peak | Share | None:
    if raw is None:
        return None
    if not isinstance(raw, Mapping) or set(raw) not in ({"threshold"}, {"percent"}):
        _fail("text", f"expected an object with either threshold or percent, got {show(raw)}")
    if "threshold" in raw:
        return Peak(_number(raw["threshold"], "text.threshold"))
    value = _number(raw["percent"], "text.percent", exact=True)
    try:
        return Share(share(repr(value), Place()))
    except RuleError as error:
        _fail("text.percent", error.detail)


def _number(raw: Any, param: str, exact: bool = False) -> float:
    if isinstance(raw, bool) or not isinstance(raw, int | float) or not -1e38 < raw < 1e38:
        _fail(param, f"expected a number, got {show(raw)}")
    return float(raw) if exact else float(np.float32(raw)) + 0.0


def _check_real(value: float, param: str) -> None:
    if not isinstance(value, float) or not math.isfinite(value) or float(np.float32(value)) != value:
        _fail(param, f"expected a finite float32, got {show(value)}")


def _writable(name: str) -> bool:
    return re.fullmatch(NAME, name) is not None and name not in KEYWORDS


def _fail(param: str | None, message: str) -> NoReturn:
    where = f"detector.{param}" if param and not param.startswith("detector") else param or "detector"
    raise InterventionError("invalid_artifact", printable(f"{where}: {message}"), where)
