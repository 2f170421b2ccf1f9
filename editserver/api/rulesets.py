"""A rule set against this server: parsed, its names looked up, its actions compiled; and its normal form as JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from editserver.api.errors import envelope, moved
from editserver.api.state import EditState
from editserver.library import StoredRuleset, parse_ruleset_body, split_source
from interventions.errors import InterventionError
from interventions.rules.reading import parse_ruleset
from interventions.rules.ruleset import Ruleset
from interventions.spec import parse_interventions

SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "description": "A rule set: its text, or its JSON form.",
    "properties": {
        "text": {"type": "string", "description": "The text form."},
        "propositions": {"type": "object", "description": "Name → proposition."},
        "rules": {"type": "array", "items": {"type": "object"}},
        "actions": {"type": "array", "items": {"type": "object"}},
    },
    "examples": [
        {
            "text": "proposition music = feature(smollm2-135m/l15, 1234) >= 4\n"
            "rule topic: at least 2 of prompt(music) -> latch musical\n"
            "on musical: flag\n"
        }
    ],
}


def check_ruleset(source: str | Mapping[str, Any], state: EditState) -> Ruleset:
    """The normal form of a rule set that this server can run, alone in a request.

    Raises:
        RuleError: what is wrong, with line and column of the text or the path in the JSON form.
        InterventionError: more than the limits allow, evidence that this server cannot read, or what its engine does not do.
    """
    form = {"text": source} if isinstance(source, str) else dict(source)
    ruleset = parse_ruleset(source, state.catalogue.rule_context(), "text" if isinstance(source, str) else "")
    if ruleset.rules:
        try:
            state.compile(parse_interventions([{"type": "rules"} | form]), [])
        except InterventionError as error:
            raise _at_top(error) from None
    return ruleset


def _at_top(error: InterventionError) -> InterventionError:
    """The same error where the fields of the rule set stand at top level."""
    param = re.sub(r"^interventions(\[0\]\.?)?", "", error.param or "")
    message = error.message.removeprefix(f"{error.param}: ")
    return moved(error, f"{param}: {message}" if param else message, param or None)


def normal_form(ruleset: Ruleset) -> dict[str, Any]:
    """``{"text", "json", "digest", "propositions", "conclusions", "rules", "actions"}``: what it says, written in one way.

    The last four are what there is of each: propositions by name with their text, conclusions by name, rules and actions
    as text.
    """
    return {
        "text": ruleset.text,
        "json": ruleset.as_json(),
        "digest": ruleset.digest,
        "propositions": {name: found.text for name, found in ruleset.propositions.items()},
        "conclusions": sorted({rule.head for rule in ruleset.rules}),
        "rules": [rule.text for rule in ruleset.rules],
        "actions": [action.text for action in ruleset.actions],
    }


def parse_stored(raw: Any, state: EditState) -> StoredRuleset:
    """The body of a library rule set, checked against this server.

    Raises:
        InterventionError: ``invalid_artifact``, or as :func:`check_ruleset`.
    """
    stored = parse_ruleset_body(raw)
    check_ruleset(stored.source, state)
    return stored


def shown_normal(name: str, stored: StoredRuleset, state: EditState) -> dict[str, Any]:
    """``{"normal": …}`` of the rule set ``name`` as this server would run it now, or ``{"normal": null, "problem": …}``."""
    try:
        return {"normal": normal_form(check_ruleset(stored.source, state))}
    except InterventionError as error:
        return {"normal": None, "problem": envelope(error)["error"]}


def check_body(raw: Any, state: EditState) -> dict[str, Any]:
    """The answer of ``POST /v1/rulesets/check``."""
    source, _ = split_source(raw)
    return normal_form(check_ruleset(source, state))
