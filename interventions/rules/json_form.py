"""The JSON form: the same tree as the text form's, from parsed JSON. Wherever an expression stands, its text may stand too."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, Literal, cast

from interventions.rules import numbers
from interventions.rules.errors import Place, RuleError
from interventions.rules.grammar import NAME
from interventions.rules.proposition import MAX_TREE_DEPTH, Leaf, Proposition, Split
from interventions.rules.syntax import (
    MAX_DEPTH,
    Chain,
    Clause,
    Connective,
    Declaration,
    Deed,
    Ended,
    Expression,
    Inline,
    Negation,
    Operator,
    Scope,
    Statement,
    depth_of,
)
from interventions.rules.text import read_expression
from interventions.wording import choices, nearest, show

_SCOPES = ("token", "seen", "prompt", "last")
_CONNECTIVES = ("and", "or", "xor", "implies")
_HEADS = (*_CONNECTIVES, "not", "before", "prompt_ended", *_SCOPES, "at_least", "at_least_percent", "sae")


def read_json(raw: Any, path: str = "") -> list[Statement]:
    """The statements of ``{"propositions", "rules", "actions"}``.

    Raises:
        RuleError: ``rule_syntax``, the place being the path of the member.
    """
    place = Place(path=path)
    fields = _object(raw, place, ("propositions", "rules", "actions"))
    statements: list[Statement] = []
    declared = fields.get("propositions", {})
    if not isinstance(declared, dict):
        raise RuleError(f"expected an object of name → proposition, got {show(declared)}", place.below("propositions"))
    for name, value in declared.items():
        at = place.below("propositions", str(name))
        statements.append(Declaration(at, _name(name, at), _proposition(value, at)))
    for key, read in (("rules", _clause), ("actions", _deed)):
        items = fields.get(key, [])
        if not isinstance(items, list):
            raise RuleError(f"expected a list, got {show(items)}", place.below(key))
        statements += [read(item, place.below(key, i)) for i, item in enumerate(items)]
    return statements


def _object(raw: Any, place: Place, known: Collection[str], needed: Collection[str] = ()) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise RuleError(f"expected an object, got {show(raw)}", place)
    fields = {key: value for key, value in raw.items() if value is not None}
    for key in fields:
        if key not in known:
            hint = nearest(str(key), known)
            raise RuleError(f"unknown field; known are {choices(known)}.{hint}", place.below(str(key)))
    for key in needed:
        if key not in fields:
            raise RuleError("is required", place.below(key))
    return fields


def _name(raw: Any, place: Place) -> str:
    if not isinstance(raw, str) or not re.fullmatch(NAME, raw):
        raise RuleError(f"expected a name (letters, digits, _, and - or . between them), got {show(raw)}", place)
    return raw


def _real(raw: Any, place: Place) -> float:
    if isinstance(raw, bool) or not isinstance(raw, (int, float)) or (isinstance(raw, int) and raw.bit_length() > 200):
        raise RuleError(f"expected a number, got {show(raw)}", place)
    return numbers.real(repr(raw), place)


def _whole(raw: Any, place: Place, what: str, least: int = 1, most: int = numbers.MAX_COUNT) -> int:
    words = str(raw) if isinstance(raw, int) and not isinstance(raw, bool) and raw.bit_length() < 64 else show(raw)
    return numbers.whole(words, place, what, least, most)


def _index(raw: Any, place: Place) -> int:
    return _whole(raw, place, "a feature", 0, numbers.MAX_FEATURE)


def _one_of(raw: Any, place: Place, options: Collection[str]) -> str:
    if not isinstance(raw, str) or raw not in options:
        raise RuleError(f"{show(raw)} is not one of {choices(options)}", place)
    return raw


# propositions --------------------------------------------------------------------------------------------------------


def _proposition(raw: Any, place: Place) -> Inline:
    fields = _object(raw, place, ("sae", "features", "tree", "op", "threshold"), ("sae", "op", "threshold"))
    sae = fields["sae"]
    if not isinstance(sae, str) or not sae:
        raise RuleError(f"expected an SAE id, got {show(sae)}", place.below("sae"))
    if ("features" in fields) == ("tree" in fields):
        raise RuleError("needs exactly one of features and tree", place)
    operator = _one_of(fields["op"], place.below("op"), (">=", ">", "<=", "<"))
    limit = _real(fields["threshold"], place.below("threshold"))
    score = _sum(sae, fields["features"], place.below("features")) if "features" in fields else None
    found: tuple[Proposition, bool]
    if score is not None:
        found = numbers.proposition(sae, score, operator, limit)
    else:
        at = place.below("tree")
        found = numbers.proposition(sae, numbers.tree(_branch(fields["tree"], at, 0), at), operator, limit)
    return Inline(place, *found)


def _sum(sae: str, raw: Any, place: Place) -> Any:
    if not isinstance(raw, list) or not raw:
        raise RuleError(f'expected a non-empty list of {{"index", "weight"}}, got {show(raw)}', place)
    terms = []
    for i, item in enumerate(raw):
        at = place.below(i)
        fields = _object(item, at, ("index", "weight"), ("index",))
        weight = _real(fields.get("weight", 1), at.below("weight"))
        terms.append((_index(fields["index"], at.below("index")), weight))
    return numbers.weighted(sae, terms, place)


def _branch(raw: Any, place: Place, depth: int) -> Leaf | Split:
    if not isinstance(raw, dict):
        return Leaf(_real(raw, place))
    if depth >= MAX_TREE_DEPTH:
        raise RuleError(f"a tree is at most {MAX_TREE_DEPTH} deep", place, "limit_exceeded")
    known = ("feature", "op", "threshold", "then", "else")
    fields = _object(raw, place, known, known)
    return Split(
        _index(fields["feature"], place.below("feature")),
        cast(Literal[">=", ">"], _one_of(fields["op"], place.below("op"), (">=", ">"))),
        _real(fields["threshold"], place.below("threshold")),
        _branch(fields["then"], place.below("then"), depth + 1),
        _branch(fields["else"], place.below("else"), depth + 1),
    )


# expressions ---------------------------------------------------------------------------------------------------------


def expression(raw: Any, place: Place, depth: int = 0) -> Expression:
    """An expression in the JSON form, or as text.

    Raises:
        RuleError: ``rule_syntax``.
    """
    if depth > MAX_DEPTH:
        raise RuleError(f"the expression is nested more than {MAX_DEPTH} deep", place)
    if isinstance(raw, str):
        return read_expression(raw, place.path)
    heads = [key for key in raw if key in _HEADS] if isinstance(raw, dict) else []
    if len(heads) != 1:
        raise RuleError(f"expected text, or an object with exactly one of {choices(_HEADS)}; got {show(raw)}", place)
    head = heads[0]
    at = place.below(head)
    if head == "sae":
        return _proposition(raw, place)
    if head in ("at_least", "at_least_percent"):
        return _counted(_object(raw, place, (head, "of"), (head, "of")), head, place, depth)
    fields = _object(raw, place, (head, "tokens") if head == "last" else (head,))
    if head not in fields:
        raise RuleError("is required", at)
    inside = fields[head]
    if head == "prompt_ended":
        if inside is not True:
            raise RuleError(f"expected true, got {show(inside)}", at)
        return Ended(place)
    if head == "not":
        part = expression(inside, at, depth + 1)
        return Negation(place, part, depth_of(place, part))
    if head in _SCOPES:
        return _scope(fields, head, place, depth)
    if not isinstance(inside, list) or len(inside) < 2 or (head == "implies" and len(inside) > 2):
        count = "two" if head == "implies" else "two or more"
        raise RuleError(f"expected a list of {count} expressions, got {show(inside)}", at)
    parts = tuple(expression(item, at.below(i), depth + 1) for i, item in enumerate(inside))
    deep = depth_of(place, *parts)
    return Chain(place, parts, deep) if head == "before" else Connective(place, cast(Operator, head), parts, deep)


def _scope(fields: dict[str, Any], head: str, place: Place, depth: int) -> Scope:
    part = expression(fields[head], place.below(head), depth + 1)
    window = 0
    if head == "last":
        if "tokens" not in fields:
            raise RuleError("is required: the size of the window", place.below("tokens"))
        window = _whole(fields["tokens"], place.below("tokens"), "a window", most=numbers.MAX_WINDOW)
    return Scope(place, cast(Any, head), part, depth_of(place, part), window)


def _counted(fields: dict[str, Any], head: str, place: Place, depth: int) -> Scope:
    at = place.below("of")
    scope = expression(fields["of"], at, depth + 1)
    if not isinstance(scope, Scope) or scope.scope == "token" or scope.least != 1 or isinstance(fields["of"], str):
        raise RuleError("a count needs a scope of many tokens: seen, prompt or last", at)
    least, share = 0, 0
    if head == "at_least":
        least = _whole(fields[head], place.below(head), "a count")
    else:
        value = fields[head]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise RuleError(f"expected a number, got {show(value)}", place.below(head))
        share = numbers.share(repr(value), place.below(head))
    return Scope(place, scope.scope, scope.part, scope.depth, scope.window, least, share)


# rules and actions ---------------------------------------------------------------------------------------------------


def _flag(fields: dict[str, Any], key: str, place: Place) -> bool:
    value = fields.get(key, False)
    if not isinstance(value, bool):
        raise RuleError(f"expected true or false, got {show(value)}", place.below(key))
    return value


def _clause(raw: Any, place: Place) -> Clause:
    fields = _object(raw, place, ("label", "for", "if", "then", "latch"), ("if", "then"))
    label = _name(fields["label"], place.below("label")) if "label" in fields else ""
    domains = fields.get("for", {})
    if not isinstance(domains, dict):
        raise RuleError(f"expected an object of variable → names, got {show(domains)}", place.below("for"))
    variables = []
    for name, values in domains.items():
        at = place.below("for", str(name))
        if not isinstance(values, list) or not values:
            raise RuleError(f"expected a non-empty list of names, got {show(values)}", at)
        chosen = tuple(_name(value, at.below(i)) for i, value in enumerate(values))
        if len(set(chosen)) < len(chosen):
            raise RuleError("a value is given twice", at)
        variables.append((_name(name, at), chosen))
    body = expression(fields["if"], place.below("if"))
    then = place.below("then")
    return Clause(
        place, label, body, _name(fields["then"], then), then, _flag(fields, "latch", place), tuple(variables)
    )


def _deed(raw: Any, place: Place) -> Deed:
    kinds = ("do", "refuse", "flag", "log")
    fields = _object(raw, place, ("on", *kinds, "strength", "tokens"), ("on",))
    given = [kind for kind in kinds if kind in fields]
    if len(given) != 1:
        raise RuleError(f"needs exactly one of {choices(kinds)}", place)
    kind = given[0]
    at = place.below(kind)
    on = _name(fields["on"], place.below("on"))
    value = fields[kind]
    for key in ("strength", "tokens"):
        if key in fields and kind != "do":
            raise RuleError("goes with do only", place.below(key))
    if kind == "refuse":
        if not isinstance(value, str):
            raise RuleError(f"expected the message, got {show(value)}", at)
        return Deed(place, on, "refuse", value, None)
    if kind != "do":
        if value is not True:
            raise RuleError(f"expected true, got {show(value)}", at)
        return Deed(place, on, cast(Literal["flag", "log"], kind))
    if not isinstance(value, dict):
        raise RuleError(f"expected an intervention, got {show(value)}", at)
    if "strength" in fields:
        if "strength" in value:
            raise RuleError("the intervention has a strength already", place.below("strength"))
        value = value | {"strength": fields["strength"]}
    tokens = fields.get("tokens", 1)
    if tokens == "from now on":
        return Deed(place, on, "do", value, None)
    if tokens == "token":
        return Deed(place, on, "do", value)
    return Deed(place, on, "do", value, _whole(tokens, place.below("tokens"), "a duration"))
