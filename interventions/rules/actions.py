"""From ``on conclusion: …`` to an action whose payload has one spelling."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from interventions.errors import InterventionError
from interventions.rules.errors import RuleError
from interventions.rules.ruleset import Action
from interventions.rules.syntax import Deed
from interventions.spec import parse_interventions
from interventions.wording import nearest, printable, show

MAX_PAYLOAD_DEPTH = 16
"""Deepest nesting of an intervention."""


def _nested(value: Any) -> int:
    """Depth of a JSON value, at most one more than allowed."""
    depth, level = 0, [value]
    while level and depth <= MAX_PAYLOAD_DEPTH:
        depth += 1
        inside = [list(item.values()) if isinstance(item, dict) else item for item in level]
        level = [child for item in inside if isinstance(item, list) for child in item]
    return depth


def _plain_numbers(value: Any) -> Any:
    """The same JSON with 2.0 written as 2."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, dict):
        return {key: _plain_numbers(item) for key, item in value.items()}
    return [_plain_numbers(item) for item in value] if isinstance(value, list) else value


def action(deed: Deed, conclusions: Collection[str]) -> Action:
    """An action on one of ``conclusions``; its intervention is checked by itself, without the server.

    Raises:
        RuleError: ``rule_syntax``.
    """
    if deed.conclusion not in conclusions:
        message = f"no rule concludes {show(deed.conclusion)}.{nearest(deed.conclusion, conclusions)}"
        raise RuleError(message, deed.place)
    payload = ""
    if deed.kind == "refuse":
        payload = json.dumps(deed.payload, ensure_ascii=False)
    elif deed.kind == "do":
        if _nested(deed.payload) > MAX_PAYLOAD_DEPTH:
            raise RuleError("the intervention is nested too deep", deed.place)
        given = {key: value for key, value in deed.payload.items() if value is not None}
        for key in ("id", "when"):
            if key in given:
                raise RuleError(f"the intervention of an action has no {key!r}", deed.place)
        if given.get("type") == "rules":
            raise RuleError("an action is no rule set", deed.place)
        try:
            parse_interventions([given])
        except InterventionError as error:
            message, place = error.message, deed.place
            if place.path:
                message = message.removeprefix(f"{error.param}: ")
                place = replace(place, path=f"{place.path}.do{(error.param or '').removeprefix('interventions[0]')}")
            raise RuleError(message.replace("interventions[0]", "intervention"), place) from None
        payload = json.dumps(_plain_numbers(given), ensure_ascii=False, sort_keys=True, allow_nan=False)
    if printable(payload) != payload:
        raise RuleError("the text is not valid Unicode", deed.place)
    return Action(deed.conclusion, deed.kind, payload, deed.tokens if payload else 1, deed.place)
