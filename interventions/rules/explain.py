"""What a rule set concluded and why, from the tokens at which its propositions held.

The same conclusions and proofs as :mod:`interventions.rules.reference`, for whole texts at once: conclusions by the chunked
evaluator, proofs only where they are asked for. Where a proposition held is what an engine reports; a server explains with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from interventions.rules.chunked import Chunk, Series, State
from interventions.rules.formula import (
    Atom,
    Concluded,
    Formula,
    Holds,
    Ordered,
    PromptEnded,
    held_names,
    truth,
)
from interventions.rules.proof import SHOWN, Proof, Reason, proof_json, reasons
from interventions.rules.ruleset import Rule, Ruleset

__all__ = ["Explanation", "proof_json", "runs"]

Positions = npt.NDArray[np.intp]


def runs(where: Series) -> list[int]:
    """The first position of each run of true values in bool ``[n]``."""
    before = np.concatenate([[False], where])[:-1]
    return [int(at) for at in np.flatnonzero(where & ~before)]


class Explanation:
    """Conclusions, actions and proofs of one rule set over the first n tokens of a request.

    Attributes:
        conclusions: where each conclusion holds, bool ``[n]``.
        active: where each action is active, bool ``[n, len(ruleset.actions)]``.
    """

    def __init__(
        self,
        ruleset: Ruleset,
        held: Mapping[str, Series],
        prompt_len: int,
        n_tokens: int,
        scores: Mapping[str, npt.NDArray[np.float32]] | None = None,
        given: Mapping[str, Series] | None = None,
        premises: Mapping[str, tuple[Explanation, str]] | None = None,
    ) -> None:
        """Evaluate the rule set.

        Args:
            ruleset: the rules.
            held: where each proposition of the rule set holds, bool ``[n_tokens]``; position 0 is left out.
            prompt_len: how many tokens of the request are prompt.
            n_tokens: how many tokens of it are known.
            scores: score of each proposition, float32 ``[n_tokens]``, NaN where it is not known; without, none is.
            given: conclusions of other rule sets that this one names → where they hold, bool ``[n_tokens]``.
            premises: such a conclusion → the explanation of the other rule set and its name there, for its proof;
                looked up when a proof is made.
        """
        self.ruleset = ruleset
        self._given = given or {}
        self._premises = {} if premises is None else premises  # may be filled later
        self._scores = scores or {}
        self._chunk = Chunk(ruleset, State(), held, prompt_len, n_tokens, self._given)
        outcome, _ = self._chunk.run()
        self.conclusions = outcome.conclusions
        self.active = np.array(outcome.active, bool).reshape(len(ruleset.actions), n_tokens).T
        self._prompt_len = prompt_len
        self._proofs: dict[int, dict[str, Proof]] = {}
        self._busy: set[int] = set()
        self._found: dict[tuple[Formula, str], Positions] = {}
        self._first = {name: runs(self.conclusions[name])[:1] for name in sorted(ruleset.latching)}

    def edges(self) -> list[tuple[int, str]]:
        """``(position, conclusion)`` wherever a conclusion begins to hold, by position, then by name."""
        return sorted((at, name) for name, where in self.conclusions.items() for at in runs(where))

    def fired(self, most: int = 64) -> tuple[Proof, ...]:
        """The proofs of the first ``most`` of :meth:`edges`."""
        return tuple(self.proof(name, at) for at, name in self.edges()[:most])

    def proof(self, conclusion: str, position: int) -> Proof:
        """Why ``conclusion`` holds at ``position``; of a latching one why it first did.

        Raises:
            KeyError: it does not hold there.
        """
        for first in sorted({at for places in self._first.values() for at in places if at < position}):
            self._at(first)
        return self._at(position)[conclusion]

    # one token

    def _at(self, t: int) -> dict[str, Proof]:
        """The proof of every conclusion at t, given those of latching conclusions before."""
        if t not in self._proofs:
            kept = {name: self._proofs[at[0]][name] for name, at in self._first.items() if at and at[0] < t}
            self._busy.add(t)
            for stratum in self.ruleset.strata if t else ():
                self._close(t, kept, [rule for rule in self.ruleset.rules if rule.head in stratum])
            self._busy.remove(t)
            self._proofs[t] = kept
        return self._proofs[t]

    def _close(self, t: int, proofs: dict[str, Proof], rules: list[Rule]) -> None:
        def value(atom: Atom) -> tuple[bool, bool]:
            return self._value(atom, t, proofs)

        def reason(atom: Atom, wanted: bool) -> Reason:
            return self._reason(atom, wanted, t, proofs)

        grown = True
        while grown:
            grown = False
            for rule in rules:
                if self.conclusions[rule.head][t] and rule.head not in proofs and truth(rule.body, value)[0]:
                    because = tuple(reasons(rule.body, True, value, reason))
                    proofs[rule.head] = Proof(rule.head, rule.label, t, because)
                    grown = True

    def _value(self, atom: Atom, t: int, proofs: Mapping[str, Proof]) -> tuple[bool, bool]:
        ended = t >= self._prompt_len - 1
        if isinstance(atom, PromptEnded):
            return ended, not ended
        if isinstance(atom, Holds):
            holds = bool(self._chunk.held[atom.name][t])
            return holds, not holds
        if isinstance(atom, Concluded):
            holds = bool(self._given[atom.name][t]) if atom.name in self.ruleset.given else atom.name in proofs
            decided = ended or not self.ruleset.waits(atom.name)
            return holds and decided, not holds and decided
        yes, no = self._chunk.evidence[atom]
        return bool(yes[t]), bool(no[t])

    # reasons

    def _reason(self, atom: Atom, wanted: bool, t: int, proofs: Mapping[str, Proof]) -> Reason:
        if not wanted:
            return Reason(f"not {atom.text}")
        if isinstance(atom, Concluded):
            return Reason(atom.text, premise=self._premise(atom.name, t, proofs), concluded=True)
        if isinstance(atom, PromptEnded):
            return Reason(atom.text)
        if isinstance(atom, Holds):
            return self._reading(atom, np.array([t]), [atom.name])
        if isinstance(atom, Ordered):
            return self._reading(atom, self._order(atom, t), (name for part in atom.parts for name in held_names(part)))
        places = self._places(atom.inner, atom.scope, t + 1)
        if atom.scope == "last":
            places = places[np.searchsorted(places, t - atom.window, "right") :]
        return self._reading(atom, places, held_names(atom.inner))

    def _premise(self, name: str, t: int, proofs: Mapping[str, Proof]) -> Proof | None:
        if name not in self.ruleset.given:
            return proofs[name]
        if name not in self._premises:
            return None
        other, conclusion = self._premises[name]
        return None if t in other._busy else other.proof(conclusion, t)  # two rule sets may rest on each other

    def _reading(self, atom: Atom, places: Positions, names: Iterable[str]) -> Reason:
        shown = places[:SHOWN]
        unknown = np.full(len(shown), np.nan)
        found = {name: self._scores[name][shown] if name in self._scores else unknown for name in sorted(set(names))}
        scores = tuple((name, tuple(values.tolist())) for name, values in found.items())
        return Reason(atom.text, tuple(shown.tolist()), scores, count=len(places))

    def _places(self, inner: Formula, scope: str, stop: int) -> Positions:
        """The tokens of ``scope`` before ``stop`` at which ``inner`` holds, ascending."""
        key = inner, "prompt" if scope == "prompt" else "seen"
        if key not in self._found:
            self._found[key] = np.flatnonzero(self._chunk.where(*key))
        found = self._found[key]
        return found[: np.searchsorted(found, stop)]

    def _order(self, atom: Ordered, t: int) -> Positions:
        """The latest positions of the parts, in order."""
        stop, found = t + 1, list[int]()
        for part in reversed(atom.parts):
            stop = int(self._places(part, atom.scope, stop)[-1])
            found.insert(0, stop)
        return np.array(found)
