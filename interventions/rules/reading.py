"""The front door: text or JSON in, the checked normal form out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from interventions.rules.build import Condition, Context, build
from interventions.rules.errors import Place, RuleError
from interventions.rules.json_form import expression, read_json
from interventions.rules.ruleset import Ruleset
from interventions.rules.syntax import Clause, Statement
from interventions.rules.text import read_ruleset

OPEN = Context()
"""Knows no server: any SAE id and index goes, there is no library."""

WHEN = "when"
"""Label of the rule, and name of the conclusion, that a ``when`` expression becomes."""


@dataclass(frozen=True)
class Guard:
    """A ``when`` on a whole rule set: a condition of each of its rules.

    It may name what the rule set itself declares and concludes, which comes first, and what ``context`` and
    ``conclusions`` hold.

    Attributes:
        raw: the expression, text or JSON.
        param: path of the field.
        context: the server, its library extended by the propositions that the request's rule sets declare.
        conclusions: conclusions of the other rule sets → whether they are decided at the last prompt token.
    """

    raw: Any
    param: str = ""
    context: Context = OPEN
    conclusions: Mapping[str, bool] = field(default_factory=dict)


def parse_ruleset(raw: Any, context: Context = OPEN, param: str = "", guard: Guard | None = None) -> Ruleset:
    """Read a rule set: its text, or ``{"propositions", "rules", "actions"}``.

    Args:
        raw: a string, or parsed JSON.
        context: what the server knows.
        param: path of the field that holds it, for messages.
        guard: a condition of every rule.

    Raises:
        RuleError: what is wrong and where: line and column in a text, the path in JSON.
    """
    statements = read_ruleset(raw, param) if isinstance(raw, str) else read_json(raw, param)
    condition = None
    if guard is not None:
        body = expression(guard.raw, Place(path=guard.param))
        condition = Condition(body, guard.context, guard.conclusions)
    return _built(statements, context, param, condition=condition)


def parse_when(
    raw: Any, context: Context = OPEN, param: str = "", conclusions: Mapping[str, bool] | Collection[str] = ()
) -> Ruleset:
    """Read a ``when`` expression (text or JSON): a rule set of one rule that concludes ``when``.

    Args:
        raw: the expression.
        context: what the server knows.
        param: path of the field, for messages.
        conclusions: what the request's rule sets conclude, which the expression may name; a mapping tells of each
            whether it is decided at the last prompt token.

    Raises:
        RuleError: as for :func:`parse_ruleset`.
    """
    place = Place(path=param)
    body = expression(raw, place)
    if WHEN in conclusions:
        raise RuleError(f"a rule set of this request concludes {WHEN!r}, which stands for this expression", place)
    return _built([Clause(body.place, WHEN, body, WHEN, body.place, False)], context, param, conclusions)


def _built(
    statements: Sequence[Statement],
    context: Context,
    param: str,
    conclusions: Mapping[str, bool] | Collection[str] = (),
    condition: Condition | None = None,
) -> Ruleset:
    given = conclusions if isinstance(conclusions, Mapping) else dict.fromkeys(conclusions, False)
    try:
        return build(statements, context, given, condition)
    except RuleError as error:
        raise error.under(param) from None
