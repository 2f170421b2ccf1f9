"""What a rule set concludes, by definition: token by token, looking back over the whole text each time. Slow on purpose.

At position t, with P the length of the prompt:

* position 0 is never evidence: nothing holds there, nothing is concluded there, and no scope contains it;
* a proposition holds where its score reaches its threshold;
* ``seen`` looks at positions 1 … t, ``last(w, …)`` at max(1, t − w + 1) … t, ``prompt`` at 1 … P − 1, from t = P − 1 on;
* a share counts against the tokens in scope: t for ``seen``, P − 1 for ``prompt``; of no tokens there is no share;
* conclusions are the least set that the rules allow, stratum by stratum; a latching one stays;
* an action is active where its conclusion holds, and for its duration after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from interventions.rules.formula import (
    PPM,
    Atom,
    Concluded,
    Evidence,
    Formula,
    Holds,
    Ordered,
    PromptEnded,
    held_names,
    truth,
)
from interventions.rules.proof import Proof, Reason, reasons
from interventions.rules.proposition import Readings
from interventions.rules.ruleset import Action, Rule, Ruleset


@dataclass(frozen=True)
class Step:
    """One token: what holds, what is concluded, which actions (by index) act, and the proof of every conclusion."""

    position: int
    propositions: frozenset[str] = frozenset()
    conclusions: frozenset[str] = frozenset()
    active: frozenset[int] = frozenset()
    proofs: tuple[Proof, ...] = ()


def evaluate(
    ruleset: Ruleset,
    readings: Readings,
    prompt_len: int,
    n_tokens: int,
    given: Mapping[str, Sequence[bool]] | None = None,
) -> list[Step]:
    """Every token of one request.

    Args:
        ruleset: the rules.
        readings: ``(SAE id, feature)`` → float32 ``[n_tokens]``, for all of ``ruleset.reads()``.
        prompt_len: how many of the tokens are prompt.
        n_tokens: how many tokens there are.
        given: conclusions of other rule sets → where they hold, for a ``when`` that names them.
    """
    return _Run(ruleset, readings, prompt_len, given or {}).steps(n_tokens)


class _Run:
    def __init__(
        self, ruleset: Ruleset, readings: Readings, prompt_len: int, given: Mapping[str, Sequence[bool]]
    ) -> None:
        self.ruleset = ruleset
        self.given = {name: where for name, where in given.items() if name in ruleset.given}
        self.prompt_len = prompt_len
        self.scores = {name: found.scores(readings) for name, found in ruleset.propositions.items()}
        self.where = {name: found.holds(readings) for name, found in ruleset.propositions.items()}
        self.latched: dict[str, Proof] = {}
        self.fired = [-1] * len(ruleset.actions)

    def steps(self, n_tokens: int) -> list[Step]:
        return [self._step(t) if t else Step(0) for t in range(n_tokens)]

    def _step(self, t: int) -> Step:
        proofs = dict(self.latched)
        for stratum in self.ruleset.strata:
            self._close(t, proofs, [rule for rule in self.ruleset.rules if rule.head in stratum])
        latching = self.ruleset.latching
        self.latched = {name: proof for name, proof in proofs.items() if name in latching}
        active = frozenset(i for i, action in enumerate(self.ruleset.actions) if self._acts(i, action, t, proofs))
        held = frozenset(name for name in self.where if self.where[name][t])
        return Step(t, held, frozenset(proofs), active, tuple(proofs[name] for name in sorted(proofs)))

    def _close(self, t: int, proofs: dict[str, Proof], rules: Sequence[Rule]) -> None:
        grown = True
        while grown:
            grown = False
            for rule in rules:
                if rule.head not in proofs and self._truth(rule.body, t, proofs)[0]:
                    proofs[rule.head] = Proof(rule.head, rule.label, t, self._because(rule.body, t, proofs))
                    grown = True

    def _acts(self, i: int, action: Action, t: int, proofs: Mapping[str, Proof]) -> bool:
        if action.conclusion in proofs:
            self.fired[i] = t
        if self.fired[i] < 0:
            return False
        return action.tokens is None or t - self.fired[i] < action.tokens

    # truth

    def _truth(self, formula: Formula, t: int, proofs: Mapping[str, Proof]) -> tuple[bool, bool]:
        return truth(formula, lambda atom: self._atom(atom, t, proofs))

    def _atom(self, atom: Atom, t: int, proofs: Mapping[str, Proof]) -> tuple[bool, bool]:
        ended = t >= self.prompt_len - 1
        if isinstance(atom, PromptEnded):
            holds, decided = ended, True
        elif isinstance(atom, Holds):
            holds, decided = bool(self.where[atom.name][t]), True
        elif isinstance(atom, Concluded):
            held = bool(self.given[atom.name][t]) if atom.name in self.given else atom.name in proofs
            holds, decided = held, ended or not self.ruleset.waits(atom.name)
        elif isinstance(atom, Evidence):
            scope = self._scope(atom, t)
            count = len(self._found(atom.inner, scope))
            enough = count * PPM >= atom.share * len(scope) > 0 if atom.share else count >= atom.least
            holds, decided = enough, ended or atom.scope != "prompt"
        else:
            holds, decided = bool(self._order(atom, t)), ended or atom.scope != "prompt"
        return holds and decided, not holds and decided

    def _scope(self, atom: Evidence | Ordered, t: int) -> range:
        if atom.scope == "prompt":
            return range(1, min(self.prompt_len, t + 1))
        first = max(1, t - atom.window + 1) if isinstance(atom, Evidence) and atom.scope == "last" else 1
        return range(first, t + 1)

    def _found(self, inner: Formula, scope: range) -> list[int]:
        return [p for p in scope if self._truth(inner, p, {})[0]]

    def _order(self, atom: Ordered, t: int) -> list[int]:
        """The latest positions of the parts, in order; empty when there are none."""
        scope = self._scope(atom, t)
        stop, found = scope.stop, list[int]()
        for part in reversed(atom.parts):
            places = self._found(part, range(scope.start, stop))
            if not places:
                return []
            stop = places[-1]
            found.insert(0, stop)
        return found

    # proofs

    def _because(self, body: Formula, t: int, proofs: Mapping[str, Proof]) -> tuple[Reason, ...]:
        found = reasons(
            body,
            True,
            lambda atom: self._atom(atom, t, proofs),
            lambda atom, wanted: self._reason(atom, wanted, t, proofs),
        )
        return tuple(found)

    def _reason(self, atom: Atom, wanted: bool, t: int, proofs: Mapping[str, Proof]) -> Reason:
        if not wanted:
            return Reason(f"not {atom.text}")
        if isinstance(atom, Concluded):
            return Reason(atom.text, premise=proofs.get(atom.name), concluded=True)
        if isinstance(atom, PromptEnded):
            return Reason(atom.text)
        if isinstance(atom, Holds):
            places, names = [t], [atom.name]
        elif isinstance(atom, Evidence):
            places = self._found(atom.inner, self._scope(atom, t))
            names = sorted(set(held_names(atom.inner)))
        else:
            places = self._order(atom, t)
            names = sorted({name for part in atom.parts for name in held_names(part)})
        scores = tuple((name, tuple(float(self.scores[name][p]) for p in places)) for name in names)
        return Reason(atom.text, tuple(places), scores, count=len(places))
