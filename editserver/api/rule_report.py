"""What the rules of one choice concluded and did: told as it happens, and explained in the receipt.

The engine reports bits: where propositions held, conclusions were drawn, actions were active. Why, is worked out here from
the propositions alone (:mod:`interventions.rules.explain`), which concludes everything once more: where the two differ,
the request fails rather than tell a story that did not happen.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from editserver import metrics
from interventions.compiled import RuleAction, RuleNames, RuleSetPart
from interventions.errors import InterventionError
from interventions.rules.explain import Explanation, proof_json, runs
from interventions.wording import show

log = logging.getLogger("vllm.editserver.rules")
"""Below vLLM's logger, whose handlers print it."""

MOST = 64
"""Most firings that one receipt entry lists, events of one conclusion or action that a stream tells, and log lines."""
MOST_POSITIONS = 32

Bits = npt.NDArray[np.bool_]


class Trace(Protocol):
    """The engine's record of n positions, from 0 unless said otherwise (:class:`interventions.rules.machine.RuleTrace`)."""

    @property
    def n(self) -> int:
        """How many tokens it knows."""

    @property
    def held(self) -> Bits:
        """Where each proposition held: ``[n, propositions]``."""

    @property
    def concluded(self) -> Bits:
        """Where each conclusion was drawn: ``[n, conclusions]``."""

    @property
    def active(self) -> Bits:
        """Where each action was active: ``[n, actions]``."""

    @property
    def scores(self) -> npt.NDArray[np.float32]:
        """The score of each proposition where it held and was computed, else NaN: ``[n, propositions]``."""


def disagreement(what: str) -> InterventionError:
    """``intervention_failed``: the engine did something that its own evidence does not explain."""
    message = f"the engine's record of rules does not add up ({what}); the request was stopped"
    return InterventionError("intervention_failed", message)


class RuleReport:
    """The story of one choice.

    Args:
        names: what the numbers of the program are called.
        ids: id of every intervention of the request, by index.
        request_id: for the log.
    """

    def __init__(self, names: RuleNames, ids: Sequence[str], request_id: str) -> None:
        self.names = names
        self.ids = ids
        self.request_id = request_id
        self._told = 0
        self._count: dict[tuple[int, str, int], int] = {}

    # as it happens ---------------------------------------------------------------------------------------------------

    @property
    def looks_back_to(self) -> int:
        """The first position whose row :meth:`advance` needs next."""
        return max(self._told - 1, 0)

    def advance(
        self, rows: Trace, stop: int, prompt_len: int, whole: Callable[[], Trace], *, refused: bool, tell: bool
    ) -> list[dict[str, Any]]:
        """What began at positions from where the last call stopped up to ``stop``: metrics and log lines, and events.

        Events are ``{"id", "rule", "conclusion", "position"}`` and ``{"id", "action", "conclusion", "position"}``, by
        position.

        Args:
            rows: the positions from :attr:`looks_back_to` on.
            stop: how many positions count.
            prompt_len: how many of them are prompt.
            whole: gives all positions, to say why.
            refused: whether a rule has ended the choice.
            tell: whether anybody wants events; without, none are made.

        Raises:
            InterventionError: ``intervention_failed``: a refusal that was not carried out, or what does not add up.
        """
        first, start = self.looks_back_to, self._told
        _check_length(rows, first, stop)
        self._told = max(start, stop)
        if start >= stop:
            return []

        def begins(where: Bits) -> list[int]:
            return [at for at in (first + run for run in runs(where[: stop - first])) if at >= start]

        events: list[tuple[int, int, dict[str, Any]]] = []
        explained: dict[int, Explanation] | None = None
        for part in self.names.sets if tell else ():
            for name, number in part.conclusions.items():
                for at in self._fresh((part.intervention, name, -1), begins(rows.concluded[:, number])):
                    explained = explained or self.explain(whole(), stop, prompt_len)
                    rule = explained[part.intervention].proof(name, at).rule
                    fact = {"id": self.ids[part.intervention], "rule": rule, "conclusion": name, "position": at}
                    events.append((at, 0, fact))
        for order, action in enumerate(self.names.actions):
            if action.kind == "when":
                continue
            acts = begins(rows.active[:, action.number])
            if acts and action.kind == "refuse" and not refused:
                raise disagreement(f"a refusal at position {acts[0]} was not carried out")
            metrics.RULES_FIRED.labels(action.kind).inc(len(acts))
            for at in self._fresh((action.intervention, action.conclusion, order), acts):
                event = {"id": self.ids[action.intervention], "action": action.type or action.kind}
                events.append((at, 1, event | {"conclusion": action.conclusion, "position": at}))
                if action.kind == "log":
                    message = "request %s: rules %s concluded %s at position %d"
                    log.info(message, self.request_id, show(event["id"]), action.conclusion[:128], at)
        return [event for _, _, event in sorted(events, key=lambda found: found[:2])] if tell else []

    def _fresh(self, key: tuple[int, str, int], begins: list[int]) -> list[int]:
        """The beginnings that are still to be told: the first :data:`MOST` of each conclusion and action."""
        before = self._count.get(key, 0)
        self._count[key] = before + len(begins)
        return begins[: max(0, MOST - before)]

    def at(self, trace: Trace, row: int) -> dict[str, dict[str, Any]]:
        """What holds at one token, for its inspection: id of the rule set → propositions with their scores, conclusions.

        Args:
            trace: of any positions.
            row: which of them.
        """
        found: dict[str, dict[str, Any]] = {}
        held, concluded = trace.held[row], trace.concluded[row]
        for part in self.names.sets:
            propositions = {
                name: _known(trace.scores[row, number]) for name, number in part.propositions.items() if held[number]
            }
            conclusions = sorted(name for name, number in part.conclusions.items() if concluded[number])
            if propositions or conclusions:
                found[self.ids[part.intervention]] = {"propositions": propositions, "conclusions": conclusions}
        return found

    # afterwards ------------------------------------------------------------------------------------------------------

    def explain(self, trace: Trace, stop: int, prompt_len: int) -> dict[int, Explanation]:
        """Index of each rule set → what follows from the propositions at positions below ``stop``.

        Raises:
            InterventionError: ``intervention_failed``: something else than what the engine says it concluded or did.
        """
        _check_length(trace, 0, stop)
        found: dict[int, Explanation] = {}
        premises: dict[int, dict[str, tuple[Explanation, str]]] = {}
        for part in self.names.sets:
            premises[part.intervention] = {}
            found[part.intervention] = Explanation(
                part.ruleset,
                {name: trace.held[:stop, number] for name, number in part.propositions.items()},
                prompt_len,
                stop,
                scores={name: trace.scores[:stop, number] for name, number in part.propositions.items()},
                given={name: trace.concluded[:stop, number] for name, number in part.given.items()},
                premises=premises[part.intervention],
            )
        for part in self.names.sets:
            for name, number in part.given.items():
                for other in self.names.sets:
                    own = next((own for own, its in other.conclusions.items() if its == number), None)
                    if own is not None and other is not part:
                        premises[part.intervention][name] = found[other.intervention], own
            self._compare(part, found[part.intervention], trace, stop)
        return found

    def entry(self, part: RuleSetPart, explanation: Explanation, trace: Trace, stop: int) -> dict[str, Any]:
        """Its part of the receipt: ``digest``, ``fired``, ``fired_count``, ``propositions`` and ``actions``."""
        edges = explanation.edges()
        actions = (_acted(action, trace.active[:stop]) for action in self.names.at(part.intervention))
        return {
            "digest": part.digest,
            "fired": [_firing(explanation, name, at) for at, name in edges[:MOST]],
            "fired_count": len(edges),
            "propositions": [
                _reading(name, trace.held[:stop, number], trace.scores[:stop, number])
                for name, number in part.propositions.items()
                if trace.held[:stop, number].any()
            ],
            "actions": [acted for acted in actions if acted is not None],
        }

    def _compare(self, part: RuleSetPart, explanation: Explanation, trace: Trace, stop: int) -> None:
        for name, number in part.conclusions.items():
            _same(f"conclusion {show(name)}", explanation.conclusions[name], trace.concluded[:stop, number])
        for i, number in enumerate(part.actions):
            on = show(part.ruleset.actions[i].conclusion)
            _same(f"an action on {on}", explanation.active[:, i], trace.active[:stop, number])


def opened(trace: Trace, number: int, stop: int) -> dict[str, Any]:
    """What a ``when`` let through, for the receipt: the first position at which it held, and at how many tokens it did."""
    where = trace.active[:stop, number]
    return {"open_from": int(where.argmax()) if where.any() else None, "tokens": int(where.sum())}


def _check_length(trace: Trace, first: int, stop: int) -> None:
    if first + trace.n < stop:
        raise disagreement(f"it ends at position {first + trace.n}, {stop} tokens were computed")


def _same(what: str, expected: Bits, found: Bits) -> None:
    differs = np.flatnonzero(np.asarray(expected, bool) != found)
    if len(differs):
        raise disagreement(f"{what} at position {int(differs[0])}")


def _firing(explanation: Explanation, conclusion: str, position: int) -> dict[str, Any]:
    proof = proof_json(explanation.proof(conclusion, position))
    head = {"rule": proof["rule"], "conclusion": conclusion, "position": position}
    return head | {"proof": {"rule": proof["rule"], "because": proof["because"]}}


def _reading(name: str, held: Bits, scores: npt.NDArray[np.float32]) -> dict[str, Any]:
    positions = np.flatnonzero(held)[:MOST_POSITIONS]
    values = [_known(score) for score in scores[positions]]
    return {"name": name, "count": int(held.sum()), "positions": positions.tolist(), "scores": values}


def _known(score: np.float32) -> float | None:
    return float(score) if math.isfinite(score) else None


def _acted(action: RuleAction, active: Bits) -> dict[str, Any] | None:
    where = active[:, action.number]
    if not where.any():
        return None
    what = action.type or action.kind
    acted = {"on": action.conclusion, "do": what, "position": int(where.argmax()), "tokens": int(where.sum())}
    return acted | ({"noop": True} if action.noop else {})
