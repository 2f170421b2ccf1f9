"""From what was written to the normal form: names resolved, variables expanded, meanings made canonical, all of it checked."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from interventions.limits import Limits
from interventions.rules.actions import action
from interventions.rules.canonical import alternatives, canonical
from interventions.rules.checks import check_latches, closed_conclusions, is_closed, stratify
from interventions.rules.errors import NOWHERE, Place, RuleError
from interventions.rules.formula import (
    PPM,
    And,
    Atom,
    Concluded,
    Evidence,
    Formula,
    Holds,
    Not,
    Or,
    Ordered,
    PromptEnded,
    Xor,
    atoms,
    held_names,
    nodes,
)
from interventions.rules.grammar import KEYWORDS
from interventions.rules.proposition import Proposition
from interventions.rules.ruleset import Rule, Ruleset
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
    Scope,
    Statement,
)
from interventions.wording import nearest, show

MAX_ALTERNATIVES = 4
"""``seen(a or b)`` is written as ``seen(a) or seen(b)`` up to so many parts."""
MAX_NODES = 4096
"""Most names and operators of all bodies of a rule set, variables expanded, as written and in the normal form."""
MAX_EVIDENCE = 256
"""Most distinct pieces of evidence over several tokens (scopes, counts, orders) of a rule set."""


@dataclass(frozen=True)
class Dictionary:
    """What the rules need to know about an SAE: the decoder layer after which it reads, and how many latents it has."""

    layer: int
    n_features: int


@dataclass(frozen=True)
class Context:
    """What a server knows: its SAEs by id (``None``: any name goes), its library's propositions, its limits."""

    dictionaries: Mapping[str, Dictionary] | None = None
    library: Mapping[str, Proposition] | None = None
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Condition:
    """A condition of every rule; what the rule set itself does not name is looked up in ``context`` and ``conclusions``.

    ``conclusions`` are those of other rule sets, with whether they are decided at the last prompt token.
    """

    body: Expression
    context: Context
    conclusions: Mapping[str, bool]


class _Names:
    """The propositions and conclusions of one rule set, found by name."""

    def __init__(self, context: Context, conclusions: Collection[str]) -> None:
        self.context = context
        self.conclusions = conclusions
        self.used: dict[str, Proposition] = {}
        self._by_text: dict[str, str] = {}

    def beside(self, context: Context, conclusions: Collection[str]) -> _Names:
        """The same propositions, and more names around them."""
        found = _Names(context, {*self.conclusions, *conclusions})
        found.used, found._by_text = self.used, self._by_text
        return found

    def declare(self, statement: Declaration) -> None:
        name, inline = statement.name, statement.inline
        check_name(name, statement.place)
        if name in self.used:
            raise RuleError(f"proposition {name!r} is declared twice", statement.place)
        if name in self.conclusions:
            raise RuleError(f"{name!r} is a proposition and a conclusion", statement.place)
        if inline.negated:
            raise RuleError("a proposition is true from its threshold on: expected >= or >", inline.place)
        text = inline.proposition.text
        if text in self._by_text:
            raise RuleError(f"proposition {name!r} says the same as {self._by_text[text]!r}", statement.place)
        self._add(name, inline.proposition, inline.place)

    def _add(self, name: str, found: Proposition, place: Place) -> None:
        known = self.context.dictionaries
        if known is not None:
            if found.sae not in known:
                message = f"the server has no SAE {show(found.sae)}.{nearest(found.sae, known)}"
                raise RuleError(message, place, "unknown_sae")
            last = known[found.sae].n_features - 1
            for _, feature in found.reads():
                if feature > last:
                    raise RuleError(f"index {feature}; {found.sae} has 0..{last}", place, "unknown_feature")
        self.used[name] = found
        self._by_text[found.text] = name
        if len(self.used) > self.context.limits.propositions:
            message = f"more than {self.context.limits.propositions} propositions"
            raise RuleError(message, place, "limit_exceeded")

    def mention(self, name: Name) -> Formula:
        word = name.name
        if word in self.used:
            return Holds(word)
        if word in self.conclusions:
            return Concluded(word)
        library = self.context.library or {}
        if word in library:
            return self._held(word, library[word], name.place)
        check_name(word, name.place)
        options = [*self.used, *self.conclusions, *library]
        message = f"no proposition, conclusion or library concept is called {show(word)}.{nearest(word, options)}"
        raise RuleError(message, name.place, "unknown_concept")

    def inline(self, inline: Inline) -> Formula:
        held = self._held(inline.proposition.text, inline.proposition, inline.place)
        return Not(held) if inline.negated else held

    def _held(self, name: str, found: Proposition, place: Place) -> Formula:
        if found.text not in self._by_text:
            self._add(name, found, place)
        return Holds(self._by_text[found.text])


def check_name(name: str, place: Place) -> None:
    """Refuse a word of the language as a name."""
    if name in KEYWORDS:
        raise RuleError(f"{name!r} is a word of the language, not a name", place)


# expressions ---------------------------------------------------------------------------------------------------------


_CONNECTIVES: dict[str, type[And] | type[Or] | type[Xor]] = {"and": And, "or": Or, "xor": Xor}


def _resolve(expression: Expression, names: _Names, inside: bool = False) -> Formula:
    """Names resolved; ``inside`` evidence, only propositions at one token may stand."""
    if isinstance(expression, Name):
        found = names.mention(expression)
        if inside and isinstance(found, Concluded):
            message = f"{found.name!r} is a conclusion; evidence is about propositions (to keep it, conclude latch)"
            raise RuleError(message, expression.place)
        return found
    if isinstance(expression, Inline):
        return names.inline(expression)
    if isinstance(expression, Negation):
        return Not(_resolve(expression.part, names, inside))
    if isinstance(expression, Connective):
        parts = tuple(_resolve(part, names, inside) for part in expression.parts)
        if expression.operator == "implies":
            return Or((Not(parts[0]), parts[1]))
        return _CONNECTIVES[expression.operator](parts)
    if isinstance(expression, Scope) and expression.scope == "token":
        return _resolve(expression.part, names, inside)
    if inside:
        raise RuleError("inside a scope stand propositions at one token; scopes do not nest", expression.place)
    if isinstance(expression, Ended):
        return PromptEnded()
    if isinstance(expression, Scope):
        return _evidence(expression, names)
    return Ordered("seen", tuple(_one_token(part, names) for part in expression.parts))


def _one_token(expression: Expression, names: _Names) -> Formula:
    found = canonical(_resolve(expression, names, inside=True), lambda _: False)
    if isinstance(found, bool):
        word = "always" if found else "never"
        raise RuleError(f"this {word} holds, whatever the evidence", expression.place)
    return found


def _evidence(scope: Scope, names: _Names) -> Formula:
    if isinstance(scope.part, Chain):
        if scope.scope == "last" or scope.least != 1:
            raise RuleError("an order (before) stands in seen or prompt, uncounted", scope.place)
        parts = tuple(_one_token(part, names) for part in scope.part.parts)
        return Ordered("prompt" if scope.scope == "prompt" else "seen", parts)
    assert scope.scope != "token"
    inner = _one_token(scope.part, names)
    least, share = scope.least, scope.share
    if scope.scope == "last" and share:  # a window has its full length at every token
        least, share = -(-share * scope.window // PPM), 0
    if scope.window and least > scope.window:
        raise RuleError(f"a window of {scope.window} tokens never has {least}", scope.place)
    if scope.window == 1:
        return inner
    if least == 1:
        options = alternatives(inner)
        if 1 < len(options) <= MAX_ALTERNATIVES:
            return Or(tuple(Evidence(scope.scope, option, 1, 0, scope.window) for option in options))
    return Evidence(scope.scope, inner, least, share, scope.window)


# statements ----------------------------------------------------------------------------------------------------------


def _substituted(name: str, values: Mapping[str, str]) -> str:
    return ".".join(values.get(part, part) for part in name.split("."))


def _instance(expression: Expression, values: Mapping[str, str]) -> Expression:
    if isinstance(expression, Name):
        return replace(expression, name=_substituted(expression.name, values))
    if isinstance(expression, (Inline, Ended)):
        return expression
    if isinstance(expression, (Negation, Scope)):
        return replace(expression, part=_instance(expression.part, values))
    return replace(expression, parts=tuple(_instance(part, values) for part in expression.parts))


def _nodes(expression: Expression) -> int:
    if isinstance(expression, (Name, Inline, Ended)):
        return 1
    parts = (expression.part,) if isinstance(expression, (Negation, Scope)) else expression.parts
    return 1 + sum(map(_nodes, parts))


def _expanded(clauses: Sequence[Clause], taken: Collection[str], limits: Limits) -> list[Clause]:
    found: list[Clause] = []
    labels: dict[str, Place] = {}
    total = 0
    for number, clause in enumerate(clauses, 1):
        size = _nodes(clause.body)
        variables = [name for name, _ in clause.variables]
        for name in variables:
            if name in taken or variables.count(name) > 1 or "." in name:
                raise RuleError(f"the variable {name!r} is not one plain name of its own", clause.place)
        for chosen in itertools.product(*(values for _, values in clause.variables)):
            values = dict(zip(variables, chosen, strict=True))
            label = clause.label or f"r{number}"
            named = _substituted(label, values)
            label = ".".join((label, *chosen)) if named == label else named
            if label in labels:
                raise RuleError(f"there are two rules called {label!r}", clause.place)
            labels[label] = clause.place
            body, head = _instance(clause.body, values), _substituted(clause.head, values)
            found.append(replace(clause, label=label, body=body, head=head, variables=()))
            if len(found) > limits.rules:
                raise RuleError(f"more than {limits.rules} rules", clause.place, "limit_exceeded")
            total += size
            _check_size(total, clause.place)
    return found


def build(
    statements: Sequence[Statement],
    context: Context,
    given: Mapping[str, bool] = MappingProxyType({}),
    condition: Condition | None = None,
) -> Ruleset:
    """The normal form of a rule set.

    Args:
        statements: what was written.
        context: what the server knows.
        given: conclusions of other rule sets that bodies may name → whether they are decided at the last prompt token.
        condition: holds wherever a rule does.

    Raises:
        RuleError: names, sizes, negation in a cycle or under a latch, bodies that need no evidence, actions.
    """
    clauses = [statement for statement in statements if isinstance(statement, Clause)]
    declarations = [statement for statement in statements if isinstance(statement, Declaration)]
    taken = {statement.name for statement in declarations}
    clauses = _expanded(clauses, taken, context.limits)
    heads: dict[str, bool] = {}
    for clause in clauses:
        check_name(clause.head, clause.head_place)
        if heads.setdefault(clause.head, clause.latch) != clause.latch:
            raise RuleError(f"{clause.head!r} is concluded with latch and without", clause.head_place)
        if clause.head in (context.library or {}) and clause.head not in taken:
            raise RuleError(f"{clause.head!r} is a concept of the library already", clause.head_place)
    names = _Names(context, {*heads, *given})
    for statement in declarations:
        names.declare(statement)
    bodies = [_resolve(clause.body, names) for clause in clauses]
    if condition is not None and bodies:
        given = {**given, **condition.conclusions}
        also = _resolve(condition.body, names.beside(condition.context, condition.conclusions))
        bodies = [And((body, also)) for body in bodies]
    given = {name: closes for name, closes in given.items() if name not in heads}
    known = frozenset(name for name, closes in given.items() if closes)
    closed, forms = _canonical_bodies(clauses, bodies, known)
    rules = []
    for clause, body in zip(clauses, forms, strict=True):
        if isinstance(body, bool):
            word = "always" if body else "never"
            raise RuleError(f"the body of this rule {word} holds, whatever the evidence", clause.place)
        rules.append(Rule(clause.label, body, clause.head, clause.latch, clause.place))
    deeds = [statement for statement in statements if isinstance(statement, Deed)]
    actions = tuple(action(deed, heads) for deed in deeds)
    needed = taken | {name for rule in rules for name in held_names(rule.body)}
    used = {name: names.used[name] for name in sorted(names.used) if name in needed}
    strata = stratify(rules)
    check_latches(rules, actions, closed | known)
    _check_sizes(rules)
    ordered = tuple(sorted(rules, key=lambda rule: (len(rule.label), rule.label)))
    named = {atom.name for rule in rules for atom in atoms(rule.body) if isinstance(atom, Concluded)}
    foreign = {name: given[name] for name in sorted(named & given.keys())}
    found = Ruleset(used, ordered, actions, closed, strata, foreign)
    if len(found.text) > MAX_CHARACTERS:
        message = f"the normal form has {len(found.text)} characters; the most are {MAX_CHARACTERS}"
        raise RuleError(message, NOWHERE, "limit_exceeded")
    return found


def _check_size(total: int, place: Place) -> None:
    if total > MAX_NODES:
        message = f"the bodies have more than {MAX_NODES} names and operators, in their normal form and with variables expanded"
        raise RuleError(message, place, "limit_exceeded")


def _check_sizes(rules: Sequence[Rule]) -> None:
    """The normal form keeps the limits too, so that it can be read again."""
    found: set[Atom] = set()
    total = 0
    for rule in rules:
        total += nodes(rule.body)
        _check_size(total, rule.place)
        found |= {atom for atom in atoms(rule.body) if isinstance(atom, (Evidence, Ordered))}
        if len(found) > MAX_EVIDENCE:
            message = f"more than {MAX_EVIDENCE} different scopes, counts and orders"
            raise RuleError(message, rule.place, "limit_exceeded")


def _canonical_bodies(
    clauses: Sequence[Clause], bodies: Sequence[Formula], known: frozenset[str]
) -> tuple[frozenset[str], list[Formula | bool]]:
    """Bodies in canonical form, and the conclusions decided when the prompt ends: each depends on the other."""
    closed: frozenset[str] = frozenset()
    needs = [{atom.name for atom in atoms(body) if isinstance(atom, Concluded)} for body in bodies]
    made: dict[tuple[Formula, frozenset[str]], Formula | bool] = {}
    while True:
        test: Callable[..., bool] = is_closed(closed | known)
        keys = [(body, closed & needed) for body, needed in zip(bodies, needs, strict=True)]
        made |= {key: canonical(key[0], test) for key in dict.fromkeys(keys) if key not in made}
        forms = [made[key] for key in keys]
        heads = [(clause.head, form) for clause, form in zip(clauses, forms, strict=True)]
        more = closed | closed_conclusions(heads, closed | known)
        if more == closed:
            return closed, forms
        closed = more
