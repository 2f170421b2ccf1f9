"""The rule sets and ``when`` expressions of one request, read; what a ``when`` names is found in whichever of them has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from interventions.errors import InterventionError
from interventions.resolve import Resolver, placed
from interventions.rule_cache import RulesetCache
from interventions.rules.build import Context
from interventions.rules.checks import check_latches
from interventions.rules.errors import Place, RuleError
from interventions.rules.formula import Concluded, atoms
from interventions.rules.json_form import expression
from interventions.rules.reading import Guard, parse_ruleset, parse_when
from interventions.rules.ruleset import Action, Ruleset
from interventions.rules.syntax import Expression, Name, Negation, Scope
from interventions.spec import Intervention, Rules


@dataclass(frozen=True)
class Source:
    """A rule set or ``when`` of the request.

    Attributes:
        ruleset: a rule set with its ``when`` in every body; a ``when`` as a rule set that concludes "when".
        digest: of the rule set without its ``when``; empty for a ``when``.
        param: path of the field that holds it.
        given: conclusions of other rule sets that it names → index of that intervention.
    """

    ruleset: Ruleset
    digest: str
    param: str
    given: Mapping[str, int]


@dataclass(frozen=True)
class Sources:
    """All of a request: index of the intervention → rule set, and → ``when`` of what is no rule set."""

    sets: Mapping[int, Source] = field(default_factory=dict)
    whens: Mapping[int, Source] = field(default_factory=dict)


def read_sources(interventions: Sequence[Intervention], resolver: Resolver) -> Sources:
    """Read what rules a request brings or names.

    A ``when`` may name what any rule set of the request declares or concludes, as long as it means one thing; on a rule
    set, that set's own names come first, and it becomes a condition of each of its rules.

    Raises:
        InterventionError: what is wrong, and where in the request.
    """
    if not any(isinstance(spec, Rules) or spec.when is not None for spec in interventions):
        return Sources()
    return _Reader(interventions, resolver).read()


_cache = RulesetCache()


class _Reader:
    def __init__(self, interventions: Sequence[Intervention], resolver: Resolver) -> None:
        self.catalogue = resolver.catalogue
        self.context = self.catalogue.rule_context()
        self.specs = interventions
        self.ruled = {i: spec for i, spec in enumerate(interventions) if isinstance(spec, Rules)}
        self.raw = {i: self._raw(spec) for i, spec in self.ruled.items()}
        self.plain = {i: _cache.read(self.raw[i], self.context, spec.source) for i, spec in self.ruled.items()}
        self.found: dict[int, Source] = {}

    def read(self) -> Sources:
        gated = [i for i, spec in enumerate(self.specs) if spec.when is not None]
        needs = {i: self._needs(i) for i in gated}
        for i in self._in_order(needs):
            self.found[i] = self._set(i, needs.get(i, {}))
        whens = {i: self._when(i, needs[i]) for i in gated if i not in self.ruled}
        return Sources({i: self.found[i] for i in self.ruled}, whens)

    def _raw(self, spec: Rules) -> Any:
        if not isinstance(spec.raw, str) or spec.text is not None:
            return spec.raw
        try:
            return self.catalogue.ruleset(spec.raw)
        except InterventionError as error:
            raise placed(error, spec.source) from None

    def _set(self, i: int, needs: Mapping[str, int]) -> Source:
        spec, plain = self.ruled[i], self.plain[i]
        if spec.when is None:
            return Source(plain, plain.digest, spec.source, {})
        context, param = self._around(), f"{spec.param}.when"
        given = {name: name in self.found[at].ruleset.closed for name, at in needs.items()}
        if not plain.rules:  # nothing waits for it: it is checked, and forgotten
            parse_when(spec.when, context, param, given)
            return Source(plain, plain.digest, spec.source, {})
        ruleset = parse_ruleset(self.raw[i], self.context, spec.source, Guard(spec.when, param, context, given))
        source = Source(ruleset, plain.digest, spec.source, {name: needs[name] for name in ruleset.given})
        self._check_settled(source, Place(path=param))
        return source

    def _when(self, i: int, needs: Mapping[str, int]) -> Source:
        given = {name: name in self.found[at].ruleset.closed for name, at in needs.items()}
        param = f"{self.specs[i].param}.when"
        ruleset = parse_when(self.specs[i].when, self._around(), param, given)
        return Source(ruleset, "", param, {name: needs[name] for name in ruleset.given})

    # names

    def _around(self) -> Context:
        """What the server knows, and what the request's rule sets declare."""
        declared = {name: one for plain in self.plain.values() for name, one in plain.declared.items()}
        return replace(self.context, library={**(self.context.library or {}), **declared})

    def _needs(self, i: int) -> dict[str, int]:
        """The conclusions of other rule sets that a ``when`` names → index of the intervention."""
        param = f"{self.specs[i].param}.when"
        found: dict[str, int] = {}
        for name in _names(expression(self.specs[i].when, Place(path=param))):
            if i in self.plain and name.name in {*self.plain[i].propositions, *_conclusions(self.plain[i])}:
                continue
            meanings: dict[object, int] = {}
            for at, plain in self.plain.items():
                if name.name in plain.declared:
                    meanings.setdefault(plain.declared[name.name].text, at)
                if name.name in _conclusions(plain):
                    meanings[at] = at
                    found[name.name] = at
            if len(meanings) > 1:
                where = " and ".join(self.specs[at].param for at in sorted(meanings.values()))
                message = f"{name.name!r} is defined by {where}, differently: rename one of them"
                raise RuleError(message, name.place).under(param)
        return found

    def _in_order(self, needs: Mapping[int, Mapping[str, int]]) -> list[int]:
        """The rule sets, each after those whose conclusions its ``when`` names."""
        ordered: list[int] = []
        while len(ordered) < len(self.ruled):
            ready = [i for i in self.ruled if i not in ordered and set(needs.get(i, {}).values()).issubset(ordered)]
            if not ready:
                waiting = [spec for i, spec in self.ruled.items() if i not in ordered]
                words = " and ".join(spec.param for spec in waiting)
                message = f"the rule sets {words} wait for each other's conclusions"
                raise RuleError(message, Place(path=f"{waiting[0].param}.when"))
            ordered += ready
        return ordered

    # negation

    def _check_settled(self, source: Source, place: Place) -> None:
        """Refuse what never ends if it rests on a conclusion of another rule set that may be taken back."""
        for name, at in source.given.items():
            if self._settled(at, name):
                continue
            for sticky in _sticky(source.ruleset):
                if name in _rests_on(source.ruleset, sticky):
                    message = (
                        f"{sticky!r} never ends, but rests on {name!r} of {self.specs[at].param}, which may change; "
                        "negate prompt(…), which is final when the prompt ends"
                    )
                    raise RuleError(message, place)

    def _settled(self, at: int, name: str) -> bool:
        """Whether a conclusion is never taken back because a negation turned out otherwise."""
        source = self.found[at]
        needed = _rests_on(source.ruleset, name)
        if any(not self._settled(other, given) for given, other in source.given.items() if given in needed):
            return False
        closed = source.ruleset.closed | {given for given, closes in source.ruleset.given.items() if closes}
        try:
            check_latches(source.ruleset.rules, [Action(name, "refuse", tokens=None)], closed)
        except RuleError:
            return False
        return True


def _names(part: Expression) -> Iterator[Name]:
    if isinstance(part, Name):
        yield part
    elif isinstance(part, (Negation, Scope)):
        yield from _names(part.part)
    else:
        for inner in getattr(part, "parts", ()):
            yield from _names(inner)


def _conclusions(ruleset: Ruleset) -> set[str]:
    return {rule.head for rule in ruleset.rules}


def _sticky(ruleset: Ruleset) -> list[str]:
    """Conclusions that latch, are refused on, or act from now on."""
    return sorted(ruleset.latching | {action.conclusion for action in ruleset.actions if action.sticks})


def _rests_on(ruleset: Ruleset, conclusion: str) -> set[str]:
    """The conclusions that one needs, itself and those of others included."""
    found, waiting = {conclusion}, [conclusion]
    while waiting:
        head = waiting.pop()
        for rule in ruleset.rules:
            more = (
                {atom.name for atom in atoms(rule.body) if isinstance(atom, Concluded)} if rule.head == head else set()
            )
            waiting += more - found
            found |= more
    return found
