"""What the self-test's requests must see, by the definition in plain torch, and where that may be told apart from rounding."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from editserver.engine.journal import NOT_SELECTED
from editserver.engine.trace import RuleLog
from editserver.engine.triton.self_test_made import Made, Request
from editserver.engine.triton.self_test_trial import Records, SelfTestError, Trial
from editserver.engine.wire import StepRecord
from interventions.oracle import GateFacts, LayerResult, edit_layer, listen, score_rules, select
from interventions.program import Read, ReadKind, parse_feature_key
from interventions.rules.machine import Machine, RuleTrace, decided

SEED = 1
PERTURBED = 3
"""How often h is changed in its last bits to find the tokens where these decide something."""
LEAST_SURE = 0.6
"""Share of the edited tokens that must be left to compare."""


@dataclass(frozen=True)
class Meant:
    """The definition's word on one request.

    Attributes:
        opened: bool ``[gates, n]``.
        facts: of its gates over sequences.
        members: bool ``[channels, n]``, where edited latents are members of a whole dictionary's.
    """

    edits: LayerResult
    opened: torch.Tensor
    facts: tuple[GateFacts, ...]
    members: torch.Tensor
    rules: RuleTrace | None

    @property
    def decisions(self) -> torch.Tensor:
        """Everything that is a matter of yes or no, integers ``[n, …]``."""
        edits = self.edits
        found = [edits.fired, edits.clamped.long(), edits.over.long(), *self.opened.long(), *self.members.long()]
        if self.rules is not None:
            of_rules = (self.rules.held, self.rules.concluded, self.rules.active)
            found += [column.long() for part in of_rules for column in torch.from_numpy(part).unbind(dim=1)]
        return torch.stack(found, dim=1)


def meant(made: Made, request: Request, h: torch.Tensor) -> Meant:
    """For h ``[n, d]``, fp32."""
    program = request.payload.program
    assert program is not None
    (layer,), row_of = program.layers, made.rows.__getitem__
    members = functools.cache(lambda digest: made.activations(digest, h))
    trace = None
    if program.rules is not None:
        score = score_rules(h, layer.layer, program.rules, row_of, members)
        trace = Machine(program.rules, request.prompt_len).run(decided(program.rules, score), score)
    opened, facts = listen(h, layer, row_of, members, request.prompt_len, None if trace is None else trace.active)
    selected = select(program.selectors, request.positions, request.ids, request.prompt_len)
    policy = program.max_dose, program.refuse_over_dose
    looking = tuple(found for gate, found in zip(layer.gates, facts, strict=True) if gate.over_sequence)
    edited = [parse_feature_key(channel.row) for channel in layer.channels if channel.read is ReadKind.MEMBER]
    active = [members(digest)[:, feature] != 0 for digest, feature in edited]
    return Meant(
        edit_layer(h, layer, selected, row_of, members, *policy, opened=opened),
        opened,
        looking,
        torch.stack(active) if active else torch.zeros(0, len(h), dtype=torch.bool),
        trace,
    )


def steady(of: Callable[[torch.Tensor], torch.Tensor], h: torch.Tensor) -> torch.Tensor:
    """bool ``[n]``: where ``of(h) [n, …]``, decisions, is the same when h changes in its last bits."""
    told, same = of(h), torch.ones(len(h), dtype=torch.bool)
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(PERTURBED):
        moved = of(h * (1 + 1e-5 * torch.randn(h.shape, generator=generator)))
        same &= (moved == told).flatten(1).all(dim=1)
    return same


def check(trial: Trial, after: torch.Tensor, records: Records) -> None:
    """Raises :class:`SelfTestError` where a run of the whole trial is not what the definition says."""
    edited = compared = 0
    for i, (request, here) in enumerate(zip(trial.requests, trial.bounds, strict=True)):
        name = f"{request.stage}: made-up request {i}"
        want, sure = _one(name, trial.made, request, trial.stream[here], after[here], records[f"{i}"])
        edited += int((want.fired != 0).sum())
        compared += int((want.fired != 0)[sure].sum())
    if not edited or compared < LEAST_SURE * edited:
        raise SelfTestError(
            f"{trial.stages}: {compared} of {edited} edited tokens could be compared: that proves nothing"
        )


def _one(
    name: str, made: Made, request: Request, before: torch.Tensor, after: torch.Tensor, record: StepRecord
) -> tuple[LayerResult, torch.Tensor]:
    """What is meant of the edits, and where that is sure."""
    h = before.float()
    want, sure = meant(made, request, h), steady(lambda x: meant(made, request, x).decisions, h)
    _edits(name, want.edits, sure, before, after, record)
    if sure.all():
        _gates(name, want.facts, record)
    if want.rules is not None:
        _rules(name, request, want.rules, sure, record)
    for number, (read, told) in enumerate(zip(request.payload.reads, record.reads, strict=True)):
        seen = _Seen(f"{name}, inspection {number}", made, request, read, (after if read.after else before).float())
        seen.check(told)
    return want.edits, sure


def _edits(
    name: str, want: LayerResult, sure: torch.Tensor, before: torch.Tensor, after: torch.Tensor, record: StepRecord
) -> None:
    fired = torch.from_numpy(np.frombuffer(record.fired, np.int64).copy())
    flags = torch.from_numpy(np.frombuffer(record.clamped, np.uint8).copy())
    dose = torch.from_numpy(np.frombuffer(record.dose, np.float32).copy())
    due, change = want.apply(before).float(), want.delta.norm(dim=-1)
    error = (after.float() - due).norm(dim=-1)
    # Of the change, of h in fp32, and one element or another that is rounded up there and down here.
    allowed = 1e-3 * change + 1e-5 * before.float().norm(dim=-1)
    allowed += 2 * torch.finfo(before.dtype).eps * due.abs().amax(dim=-1)
    wrong = (fired != want.fired) | ((flags == 1) != want.clamped) | ((flags == 2) != want.over)
    wrong |= ~((dose - want.dose).abs() <= 1e-6 + 1e-3 * want.dose)
    wrong |= ~(error <= allowed)
    if (wrong & sure).any():
        token = int((wrong & sure).nonzero()[0])
        raise SelfTestError(
            f"{name}, token {token}: fired {int(fired[token]):b} and not {int(want.fired[token]):b}, dose "
            f"{float(dose[token]):.6f} and not {float(want.dose[token]):.6f}, error {float(error[token]):.2e} beside a change "
            f"of {float(change[token]):.2e}"
        )


def _gates(name: str, want: tuple[GateFacts, ...], record: StepRecord) -> None:
    """What receipts say of gates over sequences, at the last token."""
    for number, (facts, told) in enumerate(zip(want, record.gates, strict=True)):
        open_from, statistic = told[-1]
        due = -1 if facts.open_from is None else facts.open_from
        if open_from != due or not math.isclose(statistic, facts.statistic, rel_tol=1e-9):
            raise SelfTestError(
                f"{name}: gate {number} is open from {open_from} on and came to {statistic}; expected {due}, {facts.statistic}"
            )


def _rules(name: str, request: Request, want: RuleTrace, sure: torch.Tensor, record: StepRecord) -> None:
    program = request.payload.program
    assert program is not None
    assert program.rules is not None
    if record.rules is None:
        raise SelfTestError(f"{name}: nothing is said of its rules")
    log = RuleLog(program.rules)
    log.add(record.rules, record.start, record.n)
    found, where = log.trace(), sure.numpy()
    for part in ("held", "concluded", "active"):
        wrong = (getattr(found, part) != getattr(want, part)) & where[:, None]
        if wrong.any():
            token, number = np.argwhere(wrong)[0].tolist()
            raise SelfTestError(f"{name}, token {token}: number {number} of what {part} is {wrong[token, number]}")
    if not np.allclose(found.scores[where], want.scores[where], 1e-3, 1e-3, equal_nan=True):
        raise SelfTestError(f"{name}: scores {found.scores[where]} and not {want.scores[where]}")


@dataclass(frozen=True)
class _Seen:
    """One inspection of the stream ``h [n, d]``, fp32."""

    name: str
    made: Made
    request: Request
    read: Read
    h: torch.Tensor

    def check(self, told: tuple[bytes, bytes, bytes]) -> None:
        """``told``: listed activations, indices and values of the largest, by token."""
        n, read, request = len(self.h), self.read, self.request
        listed, value = (torch.from_numpy(np.frombuffer(told[i], np.float32).reshape(n, -1).copy()) for i in (0, 2))
        index = torch.from_numpy(np.frombuffer(told[1], np.int32).reshape(n, -1).astype(np.int64))
        selected = select((read.selector,), request.positions, request.ids, request.prompt_len)[0]
        shown = ~listed.isnan().any(dim=1) if read.features else (index != NOT_SELECTED).all(dim=1)
        if not torch.equal(shown, selected):
            raise SelfTestError(f"{self.name} looked at other tokens than it was asked to")
        if read.features:
            self._listed(listed, selected)
        if read.top_k:
            self._largest(index.clamp(min=0), value, selected)

    def _sure(self, selected: torch.Tensor, of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """bool ``[n]``: those of the tokens at which the decisions ``of(h)`` may be compared."""
        sure = selected & steady(of, self.h)
        if selected.any() and not sure.any():
            raise SelfTestError(f"{self.name} saw nothing that could be compared: that proves nothing")
        return sure

    def _listed(self, found: torch.Tensor, selected: torch.Tensor) -> None:
        def of(x: torch.Tensor) -> torch.Tensor:
            return self.made.latents(self.read.sae, self.read.features, x)

        want, sure = of(self.h), self._sure(selected, lambda x: of(x) != 0)
        if not torch.allclose(found[sure], want[sure], 1e-3, 1e-3):
            raise SelfTestError(f"{self.name} saw {found[sure]} and not {want[sure]}")

    def _largest(self, index: torch.Tensor, value: torch.Tensor, selected: torch.Tensor) -> None:
        """Which of two that are almost equal is seen is left open: each value is that of the latent it is said to be of, and
        none that is larger is left out."""
        z = self.made.activations(self.read.sae, self.h)
        most, where = z.abs().topk(self.read.top_k, dim=1)
        named = torch.cat((index, where), dim=1)
        sure = self._sure(selected, lambda x: self.made.activations(self.read.sae, x).gather(1, named) != 0)
        for found, want in ((value, z.gather(1, index)), (value.abs(), most)):
            if not torch.allclose(found[sure], want[sure], 1e-3, 1e-3):
                raise SelfTestError(f"{self.name} saw {found[sure]} as the largest, and not {want[sure]}")
