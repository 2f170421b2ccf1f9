"""Speculation on a real engine: whatever is drafted, requests are answered, edited, gated, ruled, read and refused as without.

The reference is the session's engine, which does not speculate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from editserver.library import MapLibrary
from interventions.compile import Compiled
from interventions.maps.gates import CusumGate
from interventions.maps.map import LatentMap, SequenceGate
from interventions.maps.transfer import interpolate
from interventions.program import Program
from interventions.selectors import Selector
from sae_weights.formats import Origin
from tests.engine.conftest import LAYERS
from tests.engine.gate_checks import SAES, gated
from tests.engine.lab import Lab, plain, set_features, steer
from tests.engine.rule_checks import A, B, C, D, E, ruled, trace_of
from tests.engine.shadow import fired_at
from tests.engine.speculating import DRAFTS, Job, Outcome, Script, Speculating
from tests.engine.support import Answer, Ask, prompt_of

pytestmark = pytest.mark.engine

USED = {A, B, C, D, E, *SAES, "standard/l15", "standard/l29"}
Json = dict[str, Any]


@pytest.fixture(scope="module")
def fast(
    model: Path, sae_folders: dict[str, Path], sae_classes: dict[str, Path | Origin], lab: Lab
) -> Iterator[Speculating]:
    """The engine that speculates; ``lab`` first, so that only one starts at a time."""
    engine = Speculating(model, {k: v for k, v in (sae_folders | sae_classes).items() if k in USED}, LAYERS)
    yield engine
    engine.stop()


def assert_same(lab: Lab, ask: Ask, mine: Answer, theirs: Answer, tolerance: float) -> None:
    """Tokens and log-probabilities; where edits fired, gates opened, rules held, readings came from; and no token more."""
    assert mine.token_ids == theirs.token_ids
    gap = lab.note("speculated", mine.differs(theirs))
    assert gap <= tolerance, f"log-probabilities differ by {gap:.2e}, vanilla's by {tolerance:.2e} at most"
    if mine.journal is None or theirs.journal is None:
        assert mine.journal is theirs.journal
        return
    fed = len(ask.prompt) + len(mine.token_ids) - 1
    assert mine.journal.covers(mine.journal.computed_from, fed)
    assert not mine.journal.covers(fed, fed + 1), "a token that was never the request's is reported"
    for i, entry in enumerate(mine.compiled.entries):
        for layer in entry.layers:
            assert fired_at(mine.journal, i, layer, fed + DRAFTS) == fired_at(theirs.journal, i, layer, fed)
    assert _facts_of(mine) == _facts_of(theirs), "a gate saw something else"
    for number in range(len(mine.compiled.reads)):
        seen, due = (a.journal.readings(number, 0, fed + DRAFTS) for a in (mine, theirs) if a.journal)
        assert [position for position, _ in seen] == [position for position, _ in due]
        for (_, here), (_, there) in zip(seen, due, strict=True):
            assert [index for index, _ in here] == [index for index, _ in there]
            assert np.allclose([v for _, v in here], [v for _, v in there], rtol=1e-3, atol=1e-3)
    if mine.journal.rules is None:
        return
    said, meant = trace_of(mine), trace_of(theirs)
    assert said.n == fed
    for part in ("held", "concluded", "active"):
        different = np.argwhere(getattr(said, part) != getattr(meant, part)[:fed])
        assert not len(different), f"{part} differs at (token, number) {different[:5].tolist()}"
    assert np.allclose(said.scores, meant.scores[:fed], rtol=1e-3, atol=1e-3, equal_nan=True)
    assert mine.journal.refusal == theirs.journal.refusal


def _facts_of(answer: Answer) -> list[tuple[int | None, float]]:
    program = answer.compiled.program
    layers = program.layers if program is not None else ()
    assert answer.journal is not None
    return [
        answer.journal.gate(layer.layer, i)
        for layer in layers
        for i, gate in enumerate(layer.gates)
        if gate.over_sequence
    ]


# -- n-gram drafts, as they come ----------------------------------------------------------------------------------------


def _echo(seed: int, period: int, length: int) -> list[int]:
    """A prompt that goes round: there is something to look up, and a model that goes on so."""
    segment = prompt_of(seed, period + 1)[1:]
    return [1, *(segment * (length // period + 1))[: length - 1]]


def _mixed(lab: Lab) -> list[Ask]:
    """Plain, edited, gated, ruled and inspected requests, each on a prompt of its own."""
    gates, rules = _echo(905, 9, 73), _echo(906, 12, 73)
    reads = [
        {"sae": "jumprelu/l15", "features": list(range(8)), "top_k": 3},
        {"sae": "topk/l0", "features": [1, 2], "tokens": "generated"},
    ]
    asks = [
        Ask(_echo(900, 6, 31)),
        Ask(_echo(901, 5, 27), [steer(15, 3)]),
        Ask(_echo(902, 7, 33), [set_features("jumprelu/l15", {2: 30.0}, tokens="generated")], inspect=reads),
        Ask(_echo(903, 6, 25), [steer(0, 5, 3.0, tokens=["last_prompt_token", "generated"])]),
        Ask(_echo(904, 8, 33), [steer(29, 5, 40.0, tokens={"tokens": _echo(904, 8, 33)[1:4]})]),
        Ask(_echo(907, 7, 37)),
        Ask(gates, gated(lab, gates), inspect=reads),
        Ask(rules, ruled(lab, rules)),
    ]
    return [replace(ask, max_tokens=14) for ask in asks]


def test_ngram_speculation_changes_no_answer_of_a_mixed_batch(lab: Lab, fast: Speculating) -> None:
    asks = _mixed(lab)
    outcomes = fast.run(lab.engine, asks)
    answers = [o.answer(lab.engine.compile(ask)) for o, ask in zip(outcomes, asks, strict=True)]
    bare = [(ask, answer) for ask, answer in zip(asks, answers, strict=True) if not ask.interventions]
    assert any(start is not None for start, _ in _facts_of(lab.alone(asks[6]))), "no gate ever opens"
    assert trace_of(lab.alone(asks[7])).active.any(), "no rule ever acts"
    tolerance = lab.noise(*zip(*bare, strict=True))
    for ask, answer in zip(asks, answers, strict=True):
        assert_same(lab, ask, answer, lab.alone(ask), tolerance)
    edited = [o for o, ask in zip(outcomes, asks, strict=True) if ask.interventions]
    print("\naccepted, rejected:", [(o.accepted, sum(map(len, o.rejected.values()))) for o in outcomes])
    assert sum(o.accepted for o in edited) >= 6, "hardly any draft was right"
    assert sum(bool(o.rejected) for o in edited) >= 3, "hardly any draft was wrong"


# -- drafts that would do something -------------------------------------------------------------------------------------

N_PROMPTS, LENGTH, OUTPUT = 8, 22, 11
GATED, RULED = 2, (3, 4)
"""Which of the prompts are for the gate, and for rules."""
CANDIDATES = [11_003, 20_011, 7_907, 30_103, 15_013, 2_999]


@dataclass
class Trap:
    """A token that no request ever says, and latents that fire on it.

    Attributes:
        wrong: the token.
        truths: prompt → what the model really says.
        feature, limit: a latent of ``A`` is above the limit at the token, and below it at all of the ruled prompts' own.
        evidence: latent of ``B`` that is on at the token.
        hits: tokens of the gated prompt's own at which it is on.
    """

    wrong: int
    truths: dict[tuple[int, ...], tuple[int, ...]]
    feature: int
    limit: float
    evidence: int
    hits: int

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        return list(self.truths)

    @property
    def scripts(self) -> list[Script]:
        """Always the wrong token, behind some right ones."""
        return [Script(p, truth, (self.wrong,) * DRAFTS) for p, truth in self.truths.items()]


def _seen(answer: Answer, read: int) -> np.ndarray:
    """Activations at the request's tokens but position 0, ``[tokens, latents]``."""
    assert answer.journal is not None
    return np.array([[value for _, value in pairs] for _, pairs in answer.journal.readings(read, 1, 10**3)])


@pytest.fixture(scope="module")
def trap(lab: Lab) -> Trap:
    """Found by looking: at everything that is really said, and at the candidates behind some of it."""
    reads = [{"sae": name, "features": list(range(40))} for name in (A, B)]
    asks = [Ask(prompt_of(950 + i, LENGTH), inspect=reads, max_tokens=OUTPUT) for i in range(N_PROMPTS)]
    real = lab.engine.run(asks, cold=True)
    truths = {tuple(ask.prompt): tuple(a.token_ids) for ask, a in zip(asks, real, strict=True)}
    known = {token for prompt, truth in truths.items() for token in (*prompt, *truth)}
    begun = [[*list(truths)[i], *real[i].token_ids[:said]] for i in (GATED, *RULED) for said in (0, 3)]
    probes = [Ask([*p, w], inspect=reads, max_tokens=1) for w in CANDIDATES for p in begun]
    probed = lab.engine.run(probes, cold=True)
    own = np.concatenate([_seen(real[i], 0) for i in RULED])
    counts = (_seen(real[GATED], 1) > 0).sum(axis=0)
    found: list[tuple[float, Trap]] = []
    for i, wrong in enumerate(CANDIDATES):
        mine = probed[i * len(begun) : (i + 1) * len(begun)]
        there = np.stack([_seen(answer, 0)[-1] for answer in mine[2:]])
        gap = there.min(axis=0) - own.max(axis=0)
        feature = int(gap.argmax())
        on = np.flatnonzero(np.stack([_seen(answer, 1)[-1] > 0 for answer in mine[:2]]).all(axis=0))
        if wrong not in known and len(on):
            limit = float(np.float32(own[:, feature].max() + gap[feature] / 2))
            evidence = int(on[counts[on].argmin()])
            found.append((float(gap[feature]), Trap(wrong, truths, feature, limit, evidence, int(counts[evidence]))))
    gap, best = max(found, key=lambda pair: pair[0])
    assert gap > 0.05, f"no latent tells a candidate from what is said by more than {gap:.3f}"
    return best


def _job(lab: Lab, ask: Ask, change: Any = None, **params: Any) -> tuple[Job, Compiled]:
    """The request as the engine gets it, its program changed."""
    compiled = lab.engine.compile(ask)
    if change is not None:
        assert compiled.program is not None
        compiled = replace(compiled, program=change(compiled.program))
    sampling = msgspec.structs.replace(lab.engine.params(ask, compiled), **params)
    return (lab.engine.prompt(ask), sampling), compiled


def _refusing_doses(program: Program) -> Program:
    return msgspec.structs.replace(program, max_dose=0.5, refuse_over_dose=True)


def _mentions(trap: Trap, program: Program) -> Program:
    """Wherever the wrong token is next to a real one."""
    real = sorted({token for p, truth in trap.truths.items() for token in (*p, *truth)})
    ends = tuple((a, trap.wrong) for a in real) + tuple((trap.wrong, a) for a in real)
    return msgspec.structs.replace(program, selectors=(Selector(ends=ends),))


def _trapped(lab: Lab, trap: Trap, folder: Path) -> list[tuple[Ask, Any]]:
    """Requests that would all do something if the wrong token were theirs, as (request, change of its program)."""
    here = {"tokens": [trap.wrong]}
    served = lab.engine.catalogue.sae(B)
    lab.engine.catalogue.maps = MapLibrary(folder)
    transfers = tuple(interpolate(i, 12.0) for i in range(40, 44))
    gate = SequenceGate(CusumGate(trap.hits + 0.5, 0.0, latch=True), (trap.evidence,))
    listening = LatentMap("demo", served.sae.digest, served.layer, transfers, gate=gate)
    lab.engine.catalogue.maps.put(listening.digest[:20], listening)
    hot = f"proposition hot = feature({A}, {trap.feature}) > {trap.limit!r}\n"
    acting = 'do {"type": "steer", "sae": "standard/l15", "feature": 3, "strength": 40.0}'
    rules = hot + "rule: at least 1 of seen(hot) -> latch once\nrule: at least 1 of last(3, hot) -> lately\n"
    rules += f"on once: {acting} from now on\non lately: flag"
    refusing = hot + 'rule: hot -> bad\non bad: refuse "No."'
    edits: list[tuple[Json, Any, Any]] = [
        (dict(steer(15, 3, tokens=here)), None, None),
        (dict(steer(15, 3)), partial(_mentions, trap), None),
        ({"type": "remap", "map": listening.digest[:20]}, None, None),
        ({"type": "rules", "text": rules}, None, None),
        ({"type": "rules", "text": refusing}, None, None),
        (dict(steer(15, 3, 500.0, tokens=here)), _refusing_doses, None),
        (
            dict(steer(0, 5, 2.0, tokens=here)),
            None,
            {"sae": "jumprelu/l15", "features": [1], "top_k": 2, "tokens": here},
        ),
    ]
    prompts = trap.prompts
    asks = [
        (Ask(p, [edit], inspect=reads, max_tokens=OUTPUT), change)
        for p, (edit, change, reads) in zip(prompts, edits, strict=False)
    ]
    return [*asks, (Ask(prompts[len(edits)], max_tokens=OUTPUT), None)]


def _nothing_of_it(lab: Lab, trap: Trap, ask: Ask, outcome: Outcome, compiled: Compiled, tolerance: float) -> None:
    """The request answered as if it had neither edits nor drafts."""
    assert outcome.error is None, f"refused for a draft: {outcome.error}"
    assert outcome.finish_reason == "length"
    answer = outcome.answer(compiled)
    theirs = lab.alone(plain(ask))
    assert answer.token_ids == theirs.token_ids
    assert answer.differs(theirs) <= tolerance
    if answer.journal is None:
        return
    fed = len(ask.prompt) + OUTPUT - 1
    assert answer.journal.covers(0, fed)
    assert not answer.journal.covers(fed, fed + 1)
    for i, entry in enumerate(compiled.entries):
        for layer in entry.layers:
            assert not fired_at(answer.journal, i, layer, fed + DRAFTS)
    assert all(fact == (None, float(trap.hits)) for fact in _facts_of(answer))
    for number in range(len(compiled.reads)):
        assert not answer.journal.readings(number, 0, fed + DRAFTS)
    if answer.journal.rules is not None:
        trace = trace_of(answer)
        assert trace.n == fed
        assert not trace.held.any()
        assert not trace.concluded.any()
        assert not trace.active.any()
        assert answer.journal.refusal is None


def _run_trapped(lab: Lab, fast: Speculating, trap: Trap, folder: Path) -> dict[int, Exception]:
    """Number of the request → what is wrong with its answer."""
    asks = _trapped(lab, trap, folder)
    jobs = [_job(lab, ask, change) for ask, change in asks]
    outcomes = fast.send([job for job, _ in jobs], trap.scripts)
    last = asks[-1][0]
    tolerance = lab.noise([last], [outcomes[-1].answer(jobs[-1][1])])
    found: dict[int, Exception] = {}
    for i, ((ask, _), (_, compiled), outcome) in enumerate(zip(asks, jobs, outcomes, strict=True)):
        try:
            _nothing_of_it(lab, trap, ask, outcome, compiled, tolerance)
            assert outcome.accepted > 0
            assert sum(trap.wrong in drafts for drafts in outcome.rejected.values()) >= 4, (
                "the wrong draft was not made"
            )
        except AssertionError as wrong:
            found[i] = wrong
    return found


def test_nothing_survives_of_rejected_drafts_that_would_edit_open_conclude_refuse_or_be_read(
    lab: Lab, fast: Speculating, trap: Trap, tmp_path: Path
) -> None:
    found = _run_trapped(lab, fast, trap, tmp_path)
    assert not found, found


# -- ends that come with accepted drafts --------------------------------------------------------------------------------


def _ends_alike(lab: Lab, fast: Speculating, job: Job, compiled: Compiled, script: Script) -> Outcome:
    """Both engines end the request at the same token in the same way; what the session's engine said."""
    lab.engine.reset_cache()
    output = lab.engine.llm.generate([job[0]], [job[1]], use_tqdm=False)[0]
    theirs = output.outputs[0]
    mine = fast.send([job], [script])[0]
    assert mine.accepted >= 2, "nothing was speculated"
    assert mine.token_ids == list(theirs.token_ids)
    assert (mine.finish_reason, mine.stop_reason, mine.text) == (
        theirs.finish_reason,
        theirs.stop_reason,
        theirs.text,
    )
    assert len(mine.top) == len(theirs.logprobs)
    error = theirs.editserver.error
    assert mine.error == (None if error is None else (error.code, error.message))
    assert mine.journal is not None
    assert mine.journal.refusal == theirs.editserver.refusal
    return mine


def _legible(lab: Lab, truth: Sequence[int]) -> list[str]:
    """The tokens as stop strings; [] where some are no text of their own."""
    words = [lab.engine.llm.get_tokenizer().decode(token) for token in truth]
    return words if all(word.strip() and "\ufffd" not in word for word in words) else []


def test_a_refusal_at_an_accepted_draft_withholds_all_from_there_on(lab: Lab, fast: Speculating, trap: Trap) -> None:
    n_latents = 24
    reads = {"sae": A, "features": list(range(n_latents))}
    asks = [Ask(p, inspect=reads, max_tokens=OUTPUT) for p, truth in trap.truths.items() if _legible(lab, truth[:9])]
    seen = {tuple(a.prompt): _seen(answer, 0) for a, answer in zip(asks, lab.engine.run(asks, cold=True), strict=True)}
    gap, prompt, row, feature = max(
        (float(acts[row, f] - acts[:row, f].max()), prompt, row, f)
        for prompt, acts in seen.items()
        for f in range(n_latents)
        for row in range(LENGTH + 1, LENGTH + 7)
    )
    assert gap > 0.02, "no latent is larger in an answer than before"
    truth, position, at = trap.truths[prompt], row + 1, row + 1 - LENGTH
    limit = float(np.float32(seen[prompt][:row, feature].max() + gap / 2))
    text = f'rule: feature({A}, {feature}) > {limit!r} -> bad\non bad: refuse "No."'
    ask = Ask(prompt, [{"type": "rules", "text": text}], max_tokens=OUTPUT)
    right = Script(prompt, truth)
    for script in (right, Script(prompt, truth, (trap.wrong,) * DRAFTS)):
        mine = _ends_alike(lab, fast, *_job(lab, ask), script)
        assert mine.finish_reason == "abort"
        assert mine.token_ids == list(truth[:at])
        assert mine.journal is not None
        assert mine.journal.refusal == (0, position)
    words = _legible(lab, truth[:9])
    ends: list[Json] = [{"stop": [words[i]]} for i in (at - 2, at - 1, at)]
    ends += [{"stop_token_ids": [truth[at - 1]]}, {"max_tokens": at}, {"max_tokens": at + 1}]
    for end in ends:
        _ends_alike(lab, fast, *_job(lab, ask, **end), right)


@pytest.mark.parametrize("at", [3, 5])
def test_a_dose_that_an_accepted_draft_exceeds_ends_the_request_there(
    lab: Lab, fast: Speculating, trap: Trap, at: int
) -> None:
    prompt, truth = next((p, t) for p, t in trap.truths.items() if _legible(lab, t[:6]))
    ask = Ask(prompt, [steer(15, 3, 500.0, tokens={"from": LENGTH + at})], max_tokens=OUTPUT)
    script = Script(prompt, truth)
    mine = _ends_alike(lab, fast, *_job(lab, ask, _refusing_doses), script)
    assert mine.error is not None
    assert mine.error[0] == "dose_exceeded"
    assert f"position {LENGTH + at} " in mine.error[1]
    assert mine.token_ids == list(truth[: at + 1])
    words = _legible(lab, truth[:6])
    for last in (at - 1, at):  # complete before the dose is exceeded, though both come with one step
        mine = _ends_alike(lab, fast, *_job(lab, ask, _refusing_doses, stop=[words[last]]), script)
        assert mine.finish_reason == "stop"


# -- the tests can fail -------------------------------------------------------------------------------------------------


def _keep_states(patch: pytest.MonkeyPatch) -> None:
    """State runs on from rejected tokens."""
    from editserver.engine.gates import Tracks
    from editserver.engine.rule_table import RuleRun

    def at(self: Any, position: int) -> Any:
        return replace(self.now, state=replace(self.now.state, position=position))

    def go_to(self: Any, position: int) -> int:
        if not position:
            self.cells[:] = 0
        return 0

    patch.setattr(Tracks, "at", at)
    patch.setattr(RuleRun, "go_to", go_to)


def _keep_records(patch: pytest.MonkeyPatch) -> None:
    """Records tell of rejected tokens."""
    from editserver.engine.wire import StepRecord

    patch.setattr(StepRecord, "cut", lambda self, n: self)


@pytest.mark.parametrize(("change", "caught"), [(_keep_states, {2, 3}), (_keep_records, {0, 1, 2, 3, 4, 5, 6})])
def test_an_engine_that_keeps_rejected_drafts_is_caught(
    lab: Lab, fast: Speculating, trap: Trap, tmp_path: Path, change: Any, caught: set[int]
) -> None:
    with fast.mutated(change):
        found = _run_trapped(lab, fast, trap, tmp_path)
    print({i: str(wrong).splitlines()[0][:80] for i, wrong in found.items()})
    assert set(found) >= caught
