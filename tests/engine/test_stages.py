"""Pipeline parallelism: every stage edits at its own layers, and what is promised of one worker holds for all of them.

Real ones: vLLM's CPU backend on the tiny model, compared with ``transformers`` and the pure functions.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from editserver.api.plugin import HandshakeError, check_handshake
from editserver.engine.compat.core import STAGED
from tests.engine.engine_process import BLOCK, PREEMPTIONS, Answered, Asked, Start, run
from tests.engine.tiny_cases import STEER, Bench, Made, features, prompt_of

pytestmark = pytest.mark.engine


# -- one batch after the other ---------------------------------------------------------------------------------------

ALONE = ((1, "thresholds"), (2, "steer"))
"""A layer of the first stage and one of the second, and a case that is edited there alone."""


@pytest.fixture(scope="module")
def staged(bench: Bench, cases: dict[str, Made]) -> dict[str, Made]:
    """What is served of :meth:`Bench.cases`, and a request that is edited and inspected at both stages."""
    made = {name: cases[name] for name in ("plain", "steer", "thresholds", "topk", "inspect")}
    scales: list[dict[str, Any]] = [{"index": i, "op": "scale", "value": 4.0} for i in range(0, 60, 3)]
    edits = [STEER, features("jumprelu/l1", scales), features("jumprelu/l2", scales)]
    reads = [
        {"sae": "topk/l1", "top_k": 3},
        {"sae": "jumprelu/l2", "features": [5, 6], "after": True},
        {"sae": "jumprelu/l1", "features": [0, 1, 2]},
    ]
    return made | {"both": bench.make(prompt_of(7), edits, reads)}


@pytest.fixture(scope="module")
def pipelines(
    tiny: Path, bench: Bench, cases: dict[str, Made], staged: dict[str, Made], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Two stages on the V2 runner, layers 0 and 1, and 2 and 3, edited by the device's engine; and each armed alone, and
    with two ranks each, by the CPU's."""
    batch = [made.asked for made in staged.values()]
    steps: dict[str, Any] = {
        "running": "running",
        "handshake": "editserver_handshake",
        "answers": batch,
        "warm": batch,
        "rules": [cases["rules"].asked],
        "gate": [cases["gate"].asked],
    }
    two = {"pipeline_parallel_size": 2}
    starts = [Start(str(tiny), replace(bench.config, engine="device").as_dict(), list(steps.values()), two)]
    for layer, case in ALONE:
        config = replace(bench.config, armed=(layer,)).as_dict()
        alone = ["running", "editserver_handshake", [staged["plain"].asked, staged[case].asked]]
        starts.append(Start(str(tiny), config, alone, two))
    starts.append(Start(str(tiny), bench.config.as_dict(), list(steps.values())[:3], two | {"tensor_parallel_size": 2}))
    found = run(starts, tmp_path_factory.mktemp("stages"), v2=True)
    names = ("both", *(f"layer {layer} alone" for layer, _ in ALONE), "two ranks each")
    return {name: dict(zip(steps, results, strict=False)) for name, results in zip(names, found, strict=True)}


def test_two_stages_answer_as_the_reference_does(
    pipelines: dict[str, dict[str, Any]], bench: Bench, staged: dict[str, Made]
) -> None:
    found = pipelines["both"]
    assert found["running"] == [["vllm.v1.worker.cpu.model_runner", "DeviceWorker"]] * 2
    assert [answer["armed"] for answer in found["handshake"]] == [[1], [2]]
    check_handshake(bench.config, found["handshake"], stages=2)
    for (name, made), cold, warm in zip(staged.items(), found["answers"], found["warm"], strict=True):
        bench.assert_answered(made, cold, name)
        assert (cold.cached, warm.cached) == (0, BLOCK)
        assert cold.differs(warm) < 1e-4


def test_stages_of_two_ranks_each_answer_as_the_reference_does(
    pipelines: dict[str, dict[str, Any]], bench: Bench, staged: dict[str, Made]
) -> None:
    found = pipelines["two ranks each"]
    assert [answer["armed"] for answer in found["handshake"]] == [[1], [1], [2], [2]]
    check_handshake(bench.config, found["handshake"], stages=2)
    for (name, made), answered in zip(staged.items(), found["answers"], strict=True):
        bench.assert_answered(made, answered, name)


def test_what_would_have_to_know_of_another_stage_is_refused(pipelines: dict[str, dict[str, Any]]) -> None:
    for name in ("rules", "gate"):
        assert pipelines["both"][name] == f"ValueError: {STAGED}"


@pytest.mark.parametrize(("layer", "case"), ALONE)
def test_a_stage_without_an_armed_layer_hands_on_what_others_record(
    pipelines: dict[str, dict[str, Any]], bench: Bench, staged: dict[str, Made], layer: int, case: str
) -> None:
    found = pipelines[f"layer {layer} alone"]
    assert [name for _, name in found["running"]] == ["EngineWorker", "NoneType"][:: 1 if layer == 1 else -1]
    check_handshake(replace(bench.config, armed=(layer,)), found["handshake"], stages=2)
    with pytest.raises(HandshakeError, match=rf"the stages armed layers \[{layer}\], configured are \[1, 2\]"):
        check_handshake(bench.config, found["handshake"], stages=2)
    for name, answered in zip(("plain", case), found["answers"], strict=True):
        bench.assert_answered(staged[name], answered, name)


# -- at work ---------------------------------------------------------------------------------------------------------

LONG = 40
"""Tokens of long answers; with their prompts they need three blocks."""
NEIGHBOURS = ("plain", "both")
"""Cases that run beside a request that is refused."""


def _dosed(made: Made, refused: bool) -> Asked:
    """The case's request, long, with a dose that all its edits exceed and a server that refuses that; or that clamps it."""
    assert made.compiled.program is not None
    program = msgspec.structs.replace(made.compiled.program, max_dose=1e-6, refuse_over_dose=refused)
    return replace(made.asked, payload=replace(made.compiled, program=program).payload().to_bytes(), max_tokens=LONG)


@pytest.fixture(scope="module")
def stages_at_work(
    tiny: Path, bench: Bench, staged: dict[str, Made], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Two compiled stages with several batches on their way and a KV cache of 14 blocks, for requests that need 18: long
    answers of three at a time, of all at once, and while the clients of some leave and others are refused."""
    long = {name: replace(made.asked, max_tokens=LONG) for name, made in staged.items()}
    leaving = [replace(one, leaves_after=3 + 5 * i) if i % 2 else one for i, one in enumerate(long.values())]
    doses = [_dosed(staged[case], refused) for _, case in ALONE for refused in (True, False)]
    steps: dict[str, Any] = {
        "running": "running",
        "answers": [made.asked for made in staged.values()],
        "first": list(long.values())[:3],
        "others": list(long.values())[3:],
        "at ease": PREEMPTIONS,
        "crowded": [replace(one, salt="crowded") for one in long.values()],
        "under pressure": PREEMPTIONS,
        "leaving": [replace(one, salt="leaving") for one in leaving],
        "doses": [*doses, *(long[name] for name in NEIGHBOURS)],
        "behind it all": [made.asked for made in staged.values()],
    }
    engine = {"pipeline_parallel_size": 2, "num_gpu_blocks_override": 14, "enforce_eager": False}
    start = Start(str(tiny), bench.config.as_dict(), list(steps.values()), engine)
    (found,) = run([start], tmp_path_factory.mktemp("work"), v2=True)
    by_step = dict(zip(steps, found, strict=True))
    return by_step | {"alone": dict(zip(long, by_step["first"] + by_step["others"], strict=True))}


def _assert_same(made: Made, one: Answered, other: Answered, name: str) -> None:
    """Tokens, log-probabilities, receipts and readings of every token that ``one`` has."""
    n, fed = len(one.tokens), len(made.asked.prompt) + len(one.tokens) - 1
    assert one.tokens == other.tokens[:n], name
    for a, b in zip(one.top, other.top, strict=False):
        assert max(abs(a[token] - b[token]) for token in a.keys() & b.keys()) < 1e-3, name
    if one.journal is None or other.journal is None:
        assert one.journal is other.journal
        return
    first = max(one.journal.computed_from, other.journal.computed_from)
    assert one.journal.covers(first, fed), name
    for at in made.compiled.program.layers if made.compiled.program else ():
        mine, theirs = (a.journal.fired(at.layer, first, fed) for a in (one, other) if a.journal)
        assert np.array_equal(mine, theirs), (name, at.layer)
        assert mine.any(), (name, at.layer)
    for number in range(len(made.compiled.reads)):
        seen, due = (a.journal.readings(number, first, fed) for a in (one, other) if a.journal)
        for (position, here), (due_at, there) in zip(seen, due, strict=True):
            assert (position, [i for i, _ in here]) == (due_at, [i for i, _ in there]), (name, number)
            assert np.allclose([v for _, v in here], [v for _, v in there], atol=1e-3), (name, number)


def test_compiled_stages_answer_as_the_reference_does(
    stages_at_work: dict[str, Any], bench: Bench, staged: dict[str, Made]
) -> None:
    assert stages_at_work["running"] == [["vllm.v1.worker.cpu.model_runner", "EngineWorker"]] * 2
    for (name, made), answered in zip(staged.items(), stages_at_work["answers"], strict=True):
        bench.assert_answered(made, answered, name)


def test_requests_that_stages_preempt_come_back_with_their_edits(
    stages_at_work: dict[str, Any], staged: dict[str, Made]
) -> None:
    assert stages_at_work["at ease"] == 0
    assert stages_at_work["under pressure"] > 0, "nothing was preempted: the test proves nothing"
    for (name, made), crowded in zip(staged.items(), stages_at_work["crowded"], strict=True):
        assert len(crowded.tokens) == LONG
        _assert_same(made, crowded, stages_at_work["alone"][name], name)


def test_clients_that_leave_a_pipeline_leave_the_others_as_they_are(
    stages_at_work: dict[str, Any], staged: dict[str, Made]
) -> None:
    gone = 0
    for i, (name, made) in enumerate(staged.items()):
        answered = stages_at_work["leaving"][i]
        gone += len(answered.tokens) < LONG
        _assert_same(made, answered, stages_at_work["alone"][name], name)
        _assert_same(made, stages_at_work["behind it all"][i], stages_at_work["alone"][name], name)
    assert gone == len(staged) // 2


def test_a_dose_that_one_stage_refuses_ends_that_request_alone(
    stages_at_work: dict[str, Any], staged: dict[str, Made]
) -> None:
    answered = stages_at_work["doses"]
    for (layer, case), (refused, clamped) in zip(ALONE, (answered[:2], answered[2:4]), strict=True):
        made = staged[case]
        assert refused.error is not None
        assert refused.error[0] == "dose_exceeded"
        assert f"at layer {layer}, position 1 " in refused.error[1]
        assert len(refused.tokens) <= 1
        assert clamped.error is None
        assert len(clamped.tokens) == LONG
        n_fed = len(made.asked.prompt) + LONG - 1
        stats = clamped.journal.stats(0, layer, n_fed)
        assert stats.clamped == stats.fired > 0
        assert stats.dose_max < 2e-6
    for name, one in zip(NEIGHBOURS, answered[4:], strict=True):
        _assert_same(staged[name], one, stages_at_work["alone"][name], name)
