"""Tensor parallelism: what is promised of one worker holds for all of them, or the server does not start.

Real ones: vLLM's CPU backend on the tiny model, compared with ``transformers`` and the pure functions.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.engine.engine_process import BLOCK, Answered, Start, run
from tests.engine.tiny_cases import Bench, Made

pytestmark = pytest.mark.engine


RUNNERS = {
    "V1": ("vllm.v1.worker.cpu_model_runner", "EngineWorker"),
    "V2, on a device": ("vllm.v1.worker.cpu.model_runner", "DeviceWorker"),
}
"""The model runner's module, and the class of the engine: the device's kernels run under Triton's interpreter."""
AGAIN = ("thresholds", "inspect")
"""What is asked once more on a device where ranks differ: interpreted kernels take their time. On a CPU: every case."""


@pytest.fixture(scope="module", params=RUNNERS)
def two_ranks(
    request: pytest.FixtureRequest,
    tiny: Path,
    bench: Bench,
    cases: dict[str, Made],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """Two workers of one engine, put through all that may befall them; by name, what each step gave."""
    module, engine = RUNNERS[request.param]
    batch = [made.asked for made in cases.values()]
    names = list(cases) if request.param == "V1" else list(AGAIN)
    again = [cases[name].asked for name in names]
    plain, steer = cases["plain"].asked, cases["steer"].asked
    crossed = [replace(plain, payload=steer.payload), replace(steer, payload=None)]
    steps: dict[str, Any] = {
        "running": "running",
        "recording": "record",
        "by themselves": "agrees",
        "answers": batch,
        "records": "records_digest",
    }
    if request.param == "V1":  # whose prefix it is, is the core's business, and interpreted kernels take their time
        steps |= {"warm": batch, "crossed": crossed, "crossed again": crossed, "warm records": "records_digest"}
    steps |= {
        "rounded": "round_off",
        "rounded is equal": "prove",
        "rounded follow": "agrees",
        "rounded answers": [replace(one, salt="rounded") for one in again],
        "rounded records": "records_digest",
        "no longer": "alone",
        "alone answers": [replace(one, salt="alone") for one in again],
        "alone records": "records_digest",
        "shares": "share",
        "shares proven": "prove",
        "breaking": "break_down",
        "broken": [plain, steer],
    }
    config = replace(bench.config, engine="device" if engine == "DeviceWorker" else "auto")
    start = Start(str(tiny), config.as_dict(), list(steps.values()), {"tensor_parallel_size": 2})
    (found,) = run([start], tmp_path_factory.mktemp("two"), v2=request.param != "V1")
    return {"runner": [module, engine], "again": names} | dict(zip(steps, found, strict=True))


def test_two_ranks_answer_as_the_reference_does(
    two_ranks: dict[str, Any], bench: Bench, cases: dict[str, Made]
) -> None:
    assert two_ranks["running"] == [two_ranks["runner"]] * 2
    for (name, made), answered in zip(cases.items(), two_ranks["answers"], strict=True):
        bench.assert_answered(made, answered, name)


def test_two_ranks_hold_the_same_stream_and_record_the_same_bytes(two_ranks: dict[str, Any]) -> None:
    assert two_ranks["by themselves"] == [False, False], (
        "what shared memory sums for two ranks is equal: no need to agree"
    )
    for name in two_ranks.keys() & {"records", "warm records"}:
        first, second = two_ranks[name]
        assert first == second


@pytest.mark.parametrize("two_ranks", ["V1"], indirect=True)
def test_two_ranks_share_prefixes_of_equal_edits_alone(two_ranks: dict[str, Any]) -> None:
    warm: list[Answered] = two_ranks["warm"]
    cold: list[Answered] = two_ranks["answers"]
    assert [one.cached for one in cold] == [0] * len(cold)
    assert [one.cached for one in warm] == [BLOCK] * len(warm)
    for before, after in zip(cold, warm, strict=True):
        assert before.differs(after) < 1e-4
    assert [one.cached for one in two_ranks["crossed"]] == [0, 0]
    assert [one.cached for one in two_ranks["crossed again"]] == [BLOCK, BLOCK]
    assert two_ranks["crossed"][0].differs(cold[0]) > 0.1


def test_ranks_whose_sums_are_rounded_differently_follow_the_first_one(
    two_ranks: dict[str, Any], cases: dict[str, Made]
) -> None:
    assert two_ranks["rounded is equal"] == [False, False]
    assert two_ranks["rounded follow"] == [True, True]
    first, second = two_ranks["rounded records"]
    assert first == second
    assert len(set(two_ranks["alone records"])) == 2, "it is what keeps them together"
    before = dict(zip(cases, two_ranks["answers"], strict=True))
    for name, after in zip(two_ranks["again"], two_ranks["rounded answers"], strict=True):
        assert before[name].differs(after) < 0.05, name


def test_layers_that_return_each_ranks_share_are_refused_by_name(two_ranks: dict[str, Any]) -> None:
    said = two_ranks["shares proven"]
    assert isinstance(said, str)
    assert "with --tensor-parallel-size 2, what layer " in said
    assert "it is not the residual stream, but each rank's share of it" in said
    assert "layers concerned: [1, 2]" in said


def test_a_rank_that_fails_fails_the_engine_though_another_one_answers(two_ranks: dict[str, Any]) -> None:
    assert isinstance(two_ranks["broken"], str), "what was raised"


def test_two_ranks_that_speculate_answer_as_the_reference_does(
    tiny: Path, bench: Bench, cases: dict[str, Made], tmp_path: Path
) -> None:
    made = {name: replace(one, asked=replace(one.asked, max_tokens=24)) for name, one in cases.items()}
    ngrams = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    steps = ["running", "record", "note_drafts", [one.asked for one in made.values()], "records_digest", "drafted"]
    engine = {"tensor_parallel_size": 2, "speculative_config": ngrams}
    ((running, _, _, answers, records, drafts),) = run(
        [Start(str(tiny), bench.config.as_dict(), steps, engine)], tmp_path
    )
    assert running == [list(RUNNERS["V1"])] * 2
    for (name, one), answered in zip(made.items(), answers, strict=True):
        bench.assert_answered(one, answered, name)
    assert records[0] == records[1]
    assert drafts[0] == drafts[1]
    steps_with_drafts, tokens = drafts[0]
    assert steps_with_drafts >= 5, "hardly anything was drafted"
    assert tokens >= 20, "hardly anything was drafted"
