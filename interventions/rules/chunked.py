"""What a rule set concludes, a chunk of tokens at a time: scans over the chunk, and a small state carried between chunks.

The shape of what runs inside a forward pass. Every operation is an associative scan (counts add, latches ``or``, orders
compose) or a function of one token, so any chunking gives what :mod:`interventions.rules.reference` gives token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from interventions.rules.formula import (
    PPM,
    Atom,
    Concluded,
    Evidence,
    Formula,
    Holds,
    Ordered,
    PromptEnded,
    atoms,
    truth,
)
from interventions.rules.proposition import Readings
from interventions.rules.ruleset import Action, Rule, Ruleset

Series = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class State:
    """All that earlier tokens leave behind; it depends on the tokens before ``position`` only.

    Attributes:
        position: of the next token.
        counts: evidence (its text) → tokens so far that count for it.
        windows: evidence over the last w tokens → which of the last w − 1 counted, oldest first, as 0s and 1s.
        stages: order (its text) → how many of its parts have been met.
        latched: latching conclusions that hold.
        fired: for each action the last position at which its conclusion held, −1 for never.
    """

    position: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)
    windows: Mapping[str, str] = field(default_factory=dict)
    stages: Mapping[str, int] = field(default_factory=dict)
    latched: tuple[str, ...] = ()
    fired: tuple[int, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain JSON, from which :meth:`from_json` restores the state."""
        return {
            "position": self.position,
            "counts": dict(self.counts),
            "windows": dict(self.windows),
            "stages": dict(self.stages),
            "latched": list(self.latched),
            "fired": list(self.fired),
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """The state that :meth:`as_json` wrote."""
        tuples = {name: tuple(raw[name]) for name in ("latched", "fired")}
        return cls(raw["position"], raw["counts"], raw["windows"], raw["stages"], **tuples)


@dataclass(frozen=True)
class Outcome:
    """What holds at each token of a chunk of n: bool ``[n]`` by proposition, by conclusion and by index of action."""

    propositions: Mapping[str, Series]
    conclusions: Mapping[str, Series]
    active: tuple[Series, ...]


def advance(
    ruleset: Ruleset,
    state: State,
    readings: Readings,
    prompt_len: int,
    n_tokens: int,
    given: Mapping[str, Series] | None = None,
) -> tuple[Outcome, State]:
    """The next ``n_tokens`` tokens of a request.

    Args:
        ruleset: the rules.
        state: what the tokens before left; ``State()`` at the start.
        readings: ``(SAE id, feature)`` → float32 ``[n_tokens]``, of this chunk.
        prompt_len: how many tokens of the request are prompt.
        n_tokens: size of the chunk, 0 allowed.
        given: conclusions of other rule sets → where they hold in this chunk.
    """
    held = {name: found.holds(readings) for name, found in ruleset.propositions.items()}
    return advance_held(ruleset, state, held, prompt_len, n_tokens, given)


def advance_held(
    ruleset: Ruleset,
    state: State,
    held: Mapping[str, Series],
    prompt_len: int,
    n_tokens: int,
    given: Mapping[str, Series] | None = None,
) -> tuple[Outcome, State]:
    """:func:`advance` from where each proposition holds in this chunk, instead of the readings that decide it."""
    return Chunk(ruleset, state, held, prompt_len, n_tokens, given or {}).run()


class Chunk:
    """The evaluation of one chunk."""

    def __init__(
        self,
        ruleset: Ruleset,
        state: State,
        held: Mapping[str, Series],
        prompt_len: int,
        n_tokens: int,
        given: Mapping[str, Series],
    ) -> None:
        self.ruleset, self.state = ruleset, state
        self.given = {name: where for name, where in given.items() if name in ruleset.given}
        self.position = state.position + np.arange(n_tokens)
        self.counts_at_all = self.position > 0
        self.in_prompt = self.position < prompt_len
        self.ended = self.position >= prompt_len - 1
        self.prompt_tokens = prompt_len - 1
        self.held = {name: held[name] & self.counts_at_all for name in ruleset.propositions}
        self.counts: dict[str, int] = {}
        self.windows: dict[str, str] = {}
        self.stages: dict[str, int] = {}
        self.evidence: dict[Atom, tuple[Series, Series]] = {}

    def run(self) -> tuple[Outcome, State]:
        for rule in self.ruleset.rules:
            for atom in atoms(rule.body):
                if isinstance(atom, (Evidence, Ordered)) and atom not in self.evidence:
                    holds = self._evidence(atom) if isinstance(atom, Evidence) else self._order(atom)
                    self.evidence[atom] = self._decided(holds, atom.scope == "prompt")
        concluded = self._conclusions()
        active, fired = [], []
        for i, action in enumerate(self.ruleset.actions):
            acts, last = self._acts(action, concluded[action.conclusion], i)
            active.append(acts)
            fired.append(last)
        latching = self.ruleset.latching
        kept = [
            name
            for name, where in concluded.items()
            if name in latching and (where[-1] if len(where) else name in self.state.latched)
        ]
        position = self.state.position + len(self.position)
        state = State(position, self.counts, self.windows, self.stages, tuple(sorted(kept)), tuple(fired))
        return Outcome(self.held, concluded, tuple(active)), state

    # evidence

    def _decided(self, holds: Series, closed: bool) -> tuple[Series, Series]:
        return (holds & self.ended, ~holds & self.ended) if closed else (holds, ~holds)

    def where(self, inner: Formula, scope: str) -> Series:
        """The tokens of ``scope`` at which a formula over propositions holds: bool ``[n]``, never position 0."""

        def value(atom: Atom) -> tuple[Series, Series]:
            assert isinstance(atom, Holds)
            return self.held[atom.name], ~self.held[atom.name]

        found = truth(inner, value)[0] & self.counts_at_all
        return found & self.in_prompt if scope == "prompt" else found

    def _evidence(self, atom: Evidence) -> Series:
        where, key = self.where(atom.inner, atom.scope), atom.text
        if atom.scope == "last":
            before = np.array([bit == "1" for bit in self.state.windows.get(key, "")], bool)
            line = np.concatenate([np.zeros(atom.window - 1 - len(before), bool), before, where])
            total = np.concatenate([[0], np.cumsum(line)])
            self.windows[key] = "".join("01"[bit] for bit in line[len(line) - (atom.window - 1) :].tolist())
            return np.asarray(total[atom.window :] - total[: -atom.window] >= atom.least)
        start = self.state.counts.get(key, 0)
        count = start + np.cumsum(where)
        self.counts[key] = int(count[-1]) if len(count) else start
        if not atom.share:
            return np.asarray(count >= atom.least)
        tokens = np.full_like(self.position, self.prompt_tokens) if atom.scope == "prompt" else self.position
        return np.asarray((count * PPM >= atom.share * tokens) & (tokens > 0))

    def _order(self, atom: Ordered) -> Series:
        stage, at = self.state.stages.get(atom.text, 0), -1
        while stage < len(atom.parts):
            where = np.flatnonzero(self.where(atom.parts[stage], atom.scope)[at + 1 :])
            if not len(where):
                break
            at += 1 + int(where[0])
            stage += 1
        self.stages[atom.text] = stage
        if stage < len(atom.parts):
            return np.zeros(len(self.position), bool)
        return np.arange(len(self.position)) >= at

    # conclusions

    def _conclusions(self) -> dict[str, Series]:
        n = len(self.position)
        names = [name for stratum in self.ruleset.strata for name in stratum]
        found = {name: np.full(n, name in self.state.latched) for name in names}

        def value(atom: Atom) -> tuple[Series, Series]:
            if isinstance(atom, Concluded):
                holds = self.given[atom.name] if atom.name in self.given else found[atom.name]
                return self._decided(holds, self.ruleset.waits(atom.name))
            if isinstance(atom, Holds):
                return self.held[atom.name], ~self.held[atom.name]
            return (self.ended, ~self.ended) if isinstance(atom, PromptEnded) else self.evidence[atom]

        for stratum in self.ruleset.strata:
            self._close(found, [rule for rule in self.ruleset.rules if rule.head in stratum], value)
        return found

    def _close(
        self, found: dict[str, Series], rules: list[Rule], value: Callable[[Atom], tuple[Series, Series]]
    ) -> None:
        grown = True
        while grown:
            grown = False
            for rule in rules:
                now = found[rule.head] | (truth(rule.body, value)[0] & self.counts_at_all)
                if rule.latch:
                    now = np.logical_or.accumulate(now)
                if not np.array_equal(now, found[rule.head]):
                    found[rule.head], grown = now, True

    def _acts(self, action: Action, where: Series, i: int) -> tuple[Series, int]:
        before = self.state.fired[i] if self.state.fired else -1
        last = np.maximum.accumulate(np.where(where, self.position, before))
        acts = last >= 0
        if action.tokens is not None:
            acts = acts & (self.position - last < action.tokens)
        return acts, int(last[-1]) if len(last) else before
