"""The front door: text or JSON in, the checked normal form out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from interventions.rules.build import Context, build
from interventions.rules.errors import Place, RuleError
from interventions.rules.json_form import expression, read_json
from interventions.rules.ruleset import Ruleset
from interventions.rules.syntax import Clause, Statement
from interventions.rules.text import read_ruleset

OPEN = Context()
"""Knows no server: any SAE id and index goes, there is no library."""

WHEN = "when"
"""Label of the rule, and name of the conclusion, that a ``when`` expression becomes."""


def parse_ruleset(raw: Any, context: Context = OPEN, param: str = "") -> Ruleset:
    """Read a rule set: its text, or ``{"propositions", "rules", "actions"}``.

    Args:
        raw: a string, or parsed JSON.
        context: what the server knows.
        param: path of the field that holds it, for messages.

    Raises:
        RuleError: what is wrong and where: line and column in a text, the path in JSON.
    """
    statements = read_ruleset(raw, param) if isinstance(raw, str) else read_json(raw, param)
    return _built(statements, context, param)


def parse_when(raw: Any, context: Context = OPEN, param: str = "", conclusions: Collection[str] = ()) -> Ruleset:
    """Read a ``when`` expression (text or JSON): a rule set of one rule that concludes ``when``.

    Args:
        raw: the expression.
        context: what the server knows.
        param: path of the field, for messages.
        conclusions: what the request's rule sets conclude; the expression may name it.

    Raises:
        RuleError: as for :func:`parse_ruleset`.
    """
    place = Place(path=param)
    body = expression(raw, place)
    return _built([Clause(body.place, WHEN, body, WHEN, body.place, False)], context, param, conclusions)


def _built(statements: Sequence[Statement], context: Context, param: str, conclusions: Collection[str] = ()) -> Ruleset:
    try:
        return build(statements, context, conclusions)
    except RuleError as error:
        raise error.under(param) from None
