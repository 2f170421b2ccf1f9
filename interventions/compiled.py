"""What compilation yields: the program that travels, and what receipts and readings need to know about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch

from interventions.errors import Code, InterventionError
from interventions.program import Gate, Payload, Program, Read
from interventions.rules.ruleset import Ruleset
from interventions.selectors import Selector
from interventions.wording import show


@dataclass(frozen=True)
class RuleAction:
    """One thing that is done where a conclusion holds.

    Attributes:
        number: which of ``Program.rules.actions``; actions of equal meaning (one conclusion, one duration, both refusing or
            both not) share a number.
        intervention: index in the request.
        conclusion: its name as written; "when" for the gate of an intervention.
        kind: as in the rule set, or "when".
        type: of a ``do``, the type of its intervention.
        message: of a ``refuse``, the answer.
        text: the action as written, in normal form.
        layers: where a ``do`` or ``when`` writes, ascending.
        noop: whether a ``do`` is an intervention that changes nothing.
        selector: of a ``do``, the tokens of its intervention.
        param: its place in the request.
    """

    number: int
    intervention: int
    conclusion: str
    kind: Literal["do", "refuse", "flag", "log", "when"]
    type: str = ""
    message: str = ""
    text: str = ""
    layers: tuple[int, ...] = ()
    noop: bool = False
    selector: Selector | None = None
    param: str = ""


@dataclass(frozen=True)
class RuleSetPart:
    """One ``rules`` entry and the numbers of what it names.

    Attributes:
        intervention: index in the request.
        ruleset: as it runs: the entry's ``when`` is part of every body.
        digest: of the rule set as named or written, without that ``when``.
        propositions, conclusions: name in ``ruleset`` → number in ``Program.rules``.
        actions: the number of each of ``ruleset.actions``.
        given: conclusions of other rule sets that the ``when`` names → number.
    """

    intervention: int
    ruleset: Ruleset
    digest: str
    propositions: Mapping[str, int]
    conclusions: Mapping[str, int]
    actions: tuple[int, ...]
    given: Mapping[str, int]


@dataclass(frozen=True)
class RuleNames:
    """What the numbers of ``Program.rules`` are called, and what they are for.

    Attributes:
        propositions: number → the first name as written, the text of an inline one.
        conclusions: number → the first name.
        actions: in request order, then as ordered in the rule set: not by number.
        sets: the ``rules`` entries that have rules.
    """

    propositions: tuple[str, ...]
    conclusions: tuple[str, ...]
    actions: tuple[RuleAction, ...]
    sets: tuple[RuleSetPart, ...]

    def part(self, intervention: int) -> RuleSetPart | None:
        """The rule set of an intervention, by its index in the request."""
        return next((part for part in self.sets if part.intervention == intervention), None)

    def at(self, intervention: int) -> tuple[RuleAction, ...]:
        """The actions of an intervention, by its index in the request."""
        return tuple(action for action in self.actions if action.intervention == intervention)

    def refusal(self, active: Sequence[bool]) -> RuleAction | None:
        """Of the refusing actions active at a token (bool by number), the one that comes first in the request."""
        return next((one for one in self.actions if one.kind == "refuse" and active[one.number]), None)


@dataclass(frozen=True)
class Entry:
    """One intervention as compiled, for its receipt.

    Attributes:
        id: label that the receipt echoes.
        type: its type name.
        layers: the layers it writes at, ascending.
        selector: its canonical selector.
        noop: whether nothing of it is left in the program (it was valid, and changes nothing).
        param: its place in the request.
        approximate: whether it edits a stand-in: an SAE whose membership rule a calibrated threshold replaces.
        scope: the mentions that it is confined to, ``None`` = anywhere.
        gate: the sequence gate behind which it is.
        when: the number of the action (of ``Program.rules``) that is active where its ``when`` holds; ``None`` = it has no
            ``when``, or is a rule set, whose ``when`` is part of its bodies.
    """

    id: str
    type: str
    layers: tuple[int, ...]
    selector: Selector
    noop: bool
    param: str = ""
    approximate: bool = False
    scope: Selector | None = None
    gate: Gate | None = None
    when: int | None = None

    @property
    def listens(self) -> bool:
        """Whether it acts by what was read at earlier tokens, as ``Program.listens`` has it."""
        return not self.noop and (self.type == "rules" or self.when is not None or self.gate is not None)

    def count(self, token_ids: Sequence[int], prompt_len: int) -> tuple[int, int]:
        """``(selected, selected in the prompt)`` among the tokens at positions 0, 1, 2, …: in selector and scope.

        Gates and triggers depend on activations: what they let through is for the engine to report.
        """
        if self.noop or not token_ids:
            return 0, 0
        ids = torch.as_tensor(token_ids, dtype=torch.int64)
        selected = self.selector.mask(torch.arange(len(ids)), ids, prompt_len)
        if self.scope is not None:
            selected &= self.scope.mask(torch.arange(len(ids)), ids, prompt_len)
        return int(selected.sum()), int(selected[:prompt_len].sum())


@dataclass(frozen=True)
class Compiled:
    """A request's interventions and inspections, ready to travel.

    Attributes:
        program: the edits, ``None`` when there are none or all are no-ops.
        entries: one per intervention, in request order.
        reads: one per inspection, in request order.
        inspect_ids: the SAE id of each read.
        needs_full: ids of the SAEs whose full encode the request uses.
        inspects_prompt: whether a read can select a prompt position (then the prefix cache must not be read).
        inspect_params: the place of each read in the request.
        inspect_approximate: whether each read looks at a stand-in, as ``Entry.approximate``.
        rules: names for ``program.rules``.
    """

    program: Program | None
    entries: tuple[Entry, ...]
    reads: tuple[Read, ...] = ()
    inspect_ids: tuple[str, ...] = ()
    needs_full: frozenset[str] = frozenset()
    inspects_prompt: bool = False
    inspect_params: tuple[str, ...] = ()
    inspect_approximate: tuple[bool, ...] = ()
    rules: RuleNames | None = None

    def resolved(self, prompt: Sequence[int]) -> Compiled:
        """The same for one prompt (token ids): mentions that are looked up in it become positions, before any digest."""
        if self.program is None or not any(selector.inside for selector in self.program.selectors):
            return self
        entries = tuple(
            entry if entry.scope is None else replace(entry, scope=entry.scope.resolved(prompt))
            for entry in self.entries
        )
        return replace(self, program=self.program.resolved(prompt), entries=entries)

    @cached_property
    def row_keys(self) -> tuple[str, ...]:
        """The distinct rows that the request needs, whatever its prompt."""
        return Payload(self.program, self.reads, None).row_keys

    @cached_property
    def encoded(self) -> bytes:
        """:meth:`payload`, as it travels."""
        return self.payload().to_bytes()

    def payload(self) -> Payload:
        """What the engine gets; of a :meth:`resolved` one."""
        return Payload(self.program, self.reads, None if self.program is None else self.program.digest())


def check_selectable(compiled: Compiled, prompt_token_ids: Sequence[int], max_tokens: int | None) -> None:
    """Refuse a selector that can never select a token of this prompt and its completion.

    The last sampled token is never fed: the last position is ``len(prompt) + max_tokens - 2``. ``max_tokens=None``
    means that generation may go on for ever. No-ops are left alone.

    Raises:
        InterventionError: ``invalid_intervention`` or ``invalid_inspection``, ``param`` naming the selector.
    """
    for entry in compiled.entries:
        if not entry.noop and entry.type != "rules":
            param = f"{entry.param}.tokens"
            _check_selector(entry.selector, prompt_token_ids, max_tokens, param, "invalid_intervention")
    for action in compiled.rules.actions if compiled.rules else ():
        if action.selector is not None and not action.noop:
            param = f"{action.param}.tokens" if action.param.endswith(".do") else action.param
            _check_selector(action.selector, prompt_token_ids, max_tokens, param, "invalid_intervention", action.text)
    for read, param in zip(compiled.reads, compiled.inspect_params, strict=True):
        _check_selector(read.selector, prompt_token_ids, max_tokens, f"{param}.tokens", "invalid_inspection")


def _check_selector(
    selector: Selector, prompt: Sequence[int], max_tokens: int | None, param: str, code: Code, text: str = ""
) -> None:
    n_fed = None if max_tokens is None else len(prompt) + max(0, max_tokens - 1)
    if _can_select(selector, prompt, n_fed):
        return
    message = f"{text and show(text) + ' '}selects no token: the prompt has positions 0..{len(prompt) - 1}"
    if n_fed is not None and n_fed > len(prompt):
        message += f", generated tokens that are fed back can reach {n_fed - 1}"
    elif n_fed is not None:
        message += ", and with this max_tokens no generated token is fed back"
    if _can_select(Selector(selector.ranges, selector.token_ids, True), prompt, n_fed):
        message += "; position 0 is left out unless include_bos is true"
    raise InterventionError(code, f"{param}: {message}", param)


def _can_select(selector: Selector, prompt: Sequence[int], n_fed: int | None) -> bool:
    if any(n_fed is None or start < n_fed for start, _ in selector.intervals(len(prompt))):
        return True
    if not selector.token_ids:
        return False
    if n_fed is None or n_fed > len(prompt):
        return True  # a generated token may be one of them
    return not set(selector.token_ids).isdisjoint(prompt if selector.include_bos else prompt[1:])


def can_select_prompt(selector: Selector) -> bool:
    """Whether the selector can select a prompt position of some prompt."""
    return bool(selector.token_ids) or any(
        not (r.start.from_prompt_end and r.start.offset >= 0) for r in selector.ranges
    )
