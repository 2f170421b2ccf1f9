"""The text form: its grammar, and the reader that turns it into the tree of :mod:`interventions.rules.syntax`."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, cast

from lark import Lark, Token, Transformer, v_args
from lark.exceptions import UnexpectedCharacters, UnexpectedEOF, UnexpectedInput, UnexpectedToken

from interventions.rules import numbers
from interventions.rules.errors import Place, RuleError
from interventions.rules.grammar import GRAMMAR, KEYWORDS
from interventions.rules.proposition import MAX_TREE_DEPTH, Comparison, Leaf, Split
from interventions.rules.syntax import (
    MAX_CHARACTERS,
    Chain,
    Clause,
    Connective,
    Declaration,
    Deed,
    Ended,
    Expression,
    Inline,
    Name,
    Negation,
    Operator,
    Scope,
    Statement,
    depth_of,
    located,
)
from interventions.wording import choices, nearest, show


def _place(token: Token) -> Place:
    return Place(token.line or 1, token.column or 1)


class _Value:
    """A parsed piece with the place where it starts."""

    def __init__(self, place: Place, value: Any) -> None:
        self.place, self.value = place, value


@v_args(inline=True, meta=False)
class _Reader(Transformer[Token, Any]):
    def ruleset(self, *statements: Statement) -> list[Statement]:
        return list(statements)

    # statements

    def name(self, token: Token) -> _Value:
        return _Value(_place(token), str(token))

    def declaration(self, name: _Value, inline: Inline) -> Declaration:
        return Declaration(name.place, name.value, inline)

    def clause(
        self, label: _Value | None, variables: Any, body: Expression, latch: Token | None, head: _Value
    ) -> Clause:
        place = label.place if label else body.place
        words = label.value if label else ""
        return Clause(place, words, body, head.value, head.place, latch is not None, variables or ())

    def variables(self, *pairs: Any) -> Any:
        return pairs

    def variable(self, name: _Value, *values: _Value) -> tuple[str, tuple[str, ...]]:
        chosen = tuple(value.value for value in values)
        _distinct(values, "value")
        return name.value, chosen

    def deed(self, name: _Value, what: Any) -> Deed:
        if isinstance(what, Token):
            return Deed(name.place, name.value, "flag" if what.type == "FLAG" else "log")
        kind, payload, tokens = what
        return Deed(name.place, name.value, kind, payload, tokens)

    def refusing(self, message: Token) -> Any:
        return "refuse", _string(message), None

    def doing(self, target: _Value, strength: _Value | None, tokens: _Value | None) -> Any:
        if strength is not None:
            if "strength" in target.value:
                raise RuleError("the intervention has a strength already", strength.place)
            target.value["strength"] = strength.value
        return "do", target.value, 1 if tokens is None else tokens.value

    def one(self, _: Token) -> _Value:
        return _Value(Place(), 1)

    def forever(self) -> _Value:
        return _Value(Place(), None)

    def several(self, count: Token) -> _Value:
        return _Value(_place(count), numbers.whole(str(count), _place(count), "a duration"))

    # expressions

    def when(self, body: Expression) -> Expression:
        return body

    def implication(self, *parts: Expression) -> Expression:
        return _connective("implies", parts)

    def disjunction(self, *parts: Expression) -> Expression:
        return _connective("or", parts)

    def exclusive(self, *parts: Expression) -> Expression:
        return _connective("xor", parts)

    def conjunction(self, *parts: Expression) -> Expression:
        return _connective("and", parts)

    def negation(self, token: Token, part: Expression) -> Expression:
        place = _place(token)
        return Negation(place, part, depth_of(place, part))

    def sequence(self, *parts: Expression) -> Expression:
        return Chain(parts[0].place, parts, depth_of(parts[0].place, *parts))

    def mention(self, token: Token) -> Expression:
        return Name(_place(token), str(token))

    def inline(self, inline: Inline) -> Expression:
        return inline

    def ended(self, token: Token) -> Expression:
        return Ended(_place(token))

    def within(self, word: Token, part: Expression) -> Scope:
        place = _place(word)
        return Scope(place, cast(Any, str(word)), part, depth_of(place, part))

    def window(self, size: Token, part: Expression) -> Scope:
        place = _place(size)
        tokens = numbers.whole(str(size), place, "a window", most=numbers.MAX_WINDOW)
        return Scope(place, "last", part, depth_of(place, part), tokens)

    def counted(self, *pieces: Any) -> Scope:
        (number, percent), scope = pieces[-2], pieces[-1]
        place = _place(number)
        if scope.scope == "token":
            raise RuleError("a count needs a scope of many tokens: seen, prompt or last", scope.place)
        if percent is None:
            least, part = numbers.whole(str(number), place, "a count"), 0
        else:
            least, part = 0, numbers.share(str(number), place)
        return Scope(scope.place, scope.scope, scope.part, scope.depth, scope.window, least, part)

    def quantity(self, number: Token, percent: Token | None) -> tuple[Token, Token | None]:
        return number, percent

    # propositions

    def comparison(self, score: Any, operator: Token, limit: _Value) -> Inline:
        place, sae, built = score
        sign = str(operator).replace("≥", ">=").replace("≤", "<=")
        found, negated = numbers.proposition(sae, built, sign, numbers.real(str(limit.value), limit.place))
        return Inline(place, found, negated)

    def sum(self, *pieces: Any) -> Any:
        sign, terms, saes = 1.0, [], {}
        place = None
        for piece in pieces:
            if piece is None:
                continue
            if isinstance(piece, Token):
                sign = -1.0 if piece == "-" else 1.0
                continue
            where, sae, feature, weight = piece
            place = place or where
            saes[sae] = where
            terms.append((feature, sign * weight))
        if len(saes) > 1:
            names = " and ".join(saes)
            raise RuleError(f"a proposition reads one SAE, got {names}", list(saes.values())[1])
        assert place is not None
        sae = next(iter(saes))
        return place, sae, numbers.weighted(sae, terms, place)

    def term(self, weight: Token | None, sae: _Value, feature: Token) -> Any:
        index = numbers.whole(str(feature), _place(feature), "a feature", 0, numbers.MAX_FEATURE)
        factor = 1.0 if weight is None else numbers.real(str(weight), _place(weight))
        return sae.place, sae.value, index, factor

    def tree(self, sae: _Value, branch: tuple[Leaf | Split, int]) -> Any:
        return sae.place, sae.value, numbers.tree(branch[0], sae.place)

    def leaf(self, value: _Value) -> tuple[Leaf, int]:
        return Leaf(numbers.real(str(value.value), value.place)), 0

    def split(self, feature: Token, operator: Token, limit: _Value, then: Any, other: Any) -> tuple[Split, int]:
        depth = 1 + max(then[1], other[1])
        if depth > MAX_TREE_DEPTH:
            raise RuleError(f"a tree is at most {MAX_TREE_DEPTH} deep", _place(feature), "limit_exceeded")
        index = numbers.whole(str(feature), _place(feature), "a feature", 0, numbers.MAX_FEATURE)
        comparison: Comparison = ">" if operator.type == "GT" else ">="
        return Split(index, comparison, numbers.real(str(limit.value), limit.place), then[0], other[0]), depth

    def sae(self, token: Token) -> _Value:
        value = _string(token) if token.type == "STRING" else str(token)
        if not value:
            raise RuleError("the SAE has no name", _place(token))
        return _Value(_place(token), value)

    def signed(self, sign: Token | None, number: Token) -> _Value:
        words = str(number)
        value = int(words) if words.isdigit() and len(words) < 18 else float(words)
        return _Value(_place(sign or number), -value if sign == "-" else value)

    # JSON

    def object(self, *pairs: tuple[Token, Any] | None) -> _Value:
        found: dict[str, Any] = {}
        for pair in pairs:
            if pair is not None:
                key = _string(pair[0])
                if key in found:
                    raise RuleError(f"{show(key)} is given twice", _place(pair[0]))
                found[key] = _plain(pair[1])
        return _Value(Place(), found)

    def pair(self, key: Token, value: Any) -> tuple[Token, Any]:
        return key, value

    def array(self, *values: Any) -> list[Any]:
        return [_plain(value) for value in values]

    def string(self, token: Token) -> str:
        return _string(token)

    def true(self) -> bool:
        return True

    def false(self) -> bool:
        return False

    def null(self) -> None:
        return None


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, _Value) else value


def _string(token: Token) -> str:
    try:
        return cast(str, json.loads(str(token)))
    except ValueError:
        raise RuleError("the string has an escape that JSON does not have", _place(token)) from None


def _distinct(values: tuple[_Value, ...], what: str) -> None:
    seen: set[str] = set()
    for value in values:
        if value.value in seen:
            raise RuleError(f"{what} {show(value.value)} is given twice", value.place)
        seen.add(value.value)


def _connective(operator: Operator, parts: tuple[Expression, ...]) -> Expression:
    place = parts[0].place
    return Connective(place, operator, parts, depth_of(place, *parts))


# reading -------------------------------------------------------------------------------------------------------------


@lru_cache
def _parser() -> Lark:
    return Lark(GRAMMAR, parser="lalr", start=["ruleset", "when"], transformer=_Reader(), maybe_placeholders=True)


def read_ruleset(text: str, path: str = "") -> list[Statement]:
    """The statements of a rule set's text.

    Raises:
        RuleError: ``rule_syntax`` with line and column.
    """
    return cast(list[Statement], _read(text, "ruleset", path))


def read_expression(text: str, path: str = "") -> Expression:
    """One expression, as in ``when``.

    Raises:
        RuleError: ``rule_syntax`` with line and column.
    """
    return located(cast(Expression, _read(text, "when", path)), path)


def _read(text: str, start: str, path: str) -> Any:
    if len(text) > MAX_CHARACTERS:
        message = f"expected at most {MAX_CHARACTERS} characters, got {len(text)}"
        raise RuleError(message, Place(path=path), "limit_exceeded")
    try:
        return _parser().parse(text, start=start)
    except RuleError as error:
        raise error.under(path) from None
    except UnexpectedInput as error:
        raise _syntax(error, text, path) from None


_SHOWN = {
    "NAME": "a name", "NUMBER": "a number", "STRING": "a string", "SAE": "an SAE id", "SIGN": "a sign",
    "LPAR": "(", "RPAR": ")", "LBRACE": "{", "RBRACE": "}", "LSQB": "[", "RSQB": "]", "COMMA": ",", "COLON": ":",
    "EQUAL": "=", "STAR": "*", "GE": ">=", "GT": ">", "LE": "<=", "LT": "<", "PERCENT": "%", "$END": "the end",
    "ENDED": "prompt_ended", "__ANON_0": "->",
}  # fmt: skip


_MEANT = {
    "&": "and", "∧": "and", "|": "or", "∨": "or", "!": "not", "¬": "not", "~": "not", "^": "xor", "⊕": "xor",
    "→": "->", "⇒": "->", "'": '"', "“": '"', "”": '"', ";": "nothing: statements need no end",
}  # fmt: skip


def _word(terminal: str) -> str:
    return _SHOWN.get(terminal, terminal.lower())


def _syntax(error: UnexpectedInput, text: str, path: str) -> RuleError:
    expected: set[str] = set()
    hint = ""
    if isinstance(error, UnexpectedCharacters):
        expected = set(error.allowed or ())
        letter = text[error.pos_in_stream or 0]
        got = show(letter)
        hint = f" Write {_MEANT[letter]}." if letter in _MEANT else ""
    elif isinstance(error, UnexpectedToken):
        expected = set(error.accepts or error.expected or ())
        got = "the end" if error.token.type == "$END" else show(str(error.token))
    else:
        assert isinstance(error, UnexpectedEOF)
        got = "the end"
    place = Place(max(1, error.line), max(1, error.column), path)
    if isinstance(error, UnexpectedToken) and error.token.type == "$END":
        lines = text.split("\n")
        place = Place(len(lines), len(lines[-1]) + 1, path)
    words = sorted(map(_word, expected))
    if isinstance(error, UnexpectedToken) and error.token.type == "NAME":
        hint = nearest(str(error.token), [word for word in words if word in KEYWORDS])
    if isinstance(error, UnexpectedToken) and str(error.token) == "->" and not hint:
        hint = " An implication inside a rule's body stands in parentheses."
    return RuleError(f"expected one of {choices(words)}; got {got}.{hint}", place)
