"""Rule sets: what was written, and what its author says about it, in one JSON file each.

A rule set is tied to nothing but names. Those of SAEs and concepts are looked up when it is used, so the normal form (and
with it the digest in receipts) is the using server's to make; what is kept, and content-addressed, is the writing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from editserver.library.store import Library
from editserver.library.vectors import MAX_NOTES_BYTES
from interventions.errors import Code, InterventionError
from interventions.rules.errors import Place, RuleError
from interventions.wording import choices, nearest, printable, show

FORM = ("propositions", "rules", "actions")
"""Fields of the JSON form."""
FIELDS = ("text", *FORM, "description", "meta")

MAX_RULESET_BYTES = 1024 * 1024
"""Largest rule set as JSON."""


@dataclass(frozen=True)
class StoredRuleset:
    """A rule set as it was put: ``source`` is its text, or its JSON form."""

    source: str | Mapping[str, Any]
    description: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """sha256 (hex) of the content, never of the name; not the digest of its normal form."""
        return hashlib.sha256(b"editserver-ruleset/1" + _encoded(self)).hexdigest()

    def body(self) -> dict[str, Any]:
        """JSON form, as it was put."""
        source = {"text": self.source} if isinstance(self.source, str) else dict(self.source)
        return source | {"description": self.description, "meta": dict(self.meta)}


def parse_ruleset_body(raw: Any) -> StoredRuleset:
    """Read the JSON body of a rule set: its form only; what it says is for :mod:`interventions.rules`.

    Raises:
        InterventionError: ``invalid_artifact``, or ``rule_syntax`` where the rule set itself is missing; ``param`` names
            the field.
    """
    source, rest = split_source(raw, ("description", "meta"))
    description, meta = rest.get("description"), rest.get("meta")
    if description is not None and not isinstance(description, str):
        raise _invalid(f"expected a string, got {show(description)}", "description")
    if meta is not None and not isinstance(meta, dict):
        raise _invalid(f"expected an object, got {show(meta)}", "meta")
    stored = StoredRuleset(source, description, meta or {})
    try:
        notes = len(json.dumps([description, meta], ensure_ascii=False, allow_nan=False).encode())
        size = len(_encoded(stored))
    except (UnicodeEncodeError, ValueError):
        raise _invalid("holds text or numbers that JSON cannot carry", None) from None
    if notes > MAX_NOTES_BYTES:
        raise _invalid(f"description and meta are {notes} bytes; at most {MAX_NOTES_BYTES}", "meta")
    if size > MAX_RULESET_BYTES:
        raise _invalid(f"the rule set is {size} bytes as JSON; at most {MAX_RULESET_BYTES}", None)
    return stored


def split_source(raw: Any, others: tuple[str, ...] = ()) -> tuple[str | dict[str, Any], dict[str, Any]]:
    """``(rule set, other fields)`` of an object with ``text``, or with ``propositions``, ``rules``, ``actions``.

    Raises:
        RuleError: ``rule_syntax``: neither, both, or another field than those and ``others``.
    """
    known = ("text", *FORM, *others)
    if not isinstance(raw, dict):
        raise RuleError(f"expected an object with text, or with propositions, rules and actions; got {show(raw)}")
    given = {key: value for key, value in raw.items() if value is not None}
    for key in given:
        if key not in known:
            place = Place(path=printable(key[:64]))
            raise RuleError(f"unknown field; known are {choices(known)}.{nearest(key, known)}", place)
    rest = {key: value for key, value in given.items() if key in others}
    form = {key: value for key, value in given.items() if key in FORM}
    if "text" in given:
        if form:
            raise RuleError(f"goes without {choices(form)}: a rule set is a text or the JSON form", Place(path="text"))
        if not isinstance(given["text"], str):
            raise RuleError(f"expected a string, got {show(given['text'])}", Place(path="text"))
        return given["text"], rest
    if not form:
        raise RuleError("needs text, or propositions, rules and actions")
    return form, rest


def _encoded(stored: StoredRuleset) -> bytes:
    return json.dumps(stored.body(), sort_keys=True, ensure_ascii=False, allow_nan=False).encode()


def _invalid(message: str, param: str | None) -> InterventionError:
    return InterventionError("invalid_artifact", f"{param}: {message}" if param else message, param)


class RulesetLibrary(Library[StoredRuleset]):
    """Rule sets of one folder."""

    kind: ClassVar[str] = "ruleset"
    unknown: ClassVar[Code] = "unknown_ruleset"
    suffixes: ClassVar[tuple[str, ...]] = ("json",)

    def encode(self, artefact: StoredRuleset) -> Mapping[str, bytes]:
        """One JSON file."""
        return {"json": _encoded(artefact)}

    def decode(self, files: Mapping[str, bytes]) -> StoredRuleset:
        """The rule set."""
        body = json.loads(files["json"])
        source = body["text"] if "text" in body else {key: body[key] for key in FORM if key in body}
        return StoredRuleset(source, body["description"], body["meta"])
