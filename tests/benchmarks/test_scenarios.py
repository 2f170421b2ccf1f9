"""What requests carry: the issue's goals, edits that no two requests share, the same edits over HTTP as in an engine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks import runner
from benchmarks.payloads import interventions, latents, payload
from benchmarks.runner import Plan, _scenario
from benchmarks.scenarios import EDITSERVER, LENS, SCENARIOS, VANILLA, Ask, Group, Load, Scenario
from benchmarks.systems import _check, prompts
from editserver.engine.config import SAESource
from interventions.program import Payload, feature_key
from interventions.spec import parse_interventions

SOURCES = {f"4k/l{layer}": SAESource(f"4k/l{layer}", {"path": "-"}, f"{layer:064x}", layer) for layer in (10, 15, 20)}
LOADS = [(scenario, load) for scenario in SCENARIOS.values() for load in scenario.loads if load.dictionary == "4k"]


def test_the_goals_are_those_that_were_set():
    goals = {(s.id, load.id): load.goal for s in SCENARIOS.values() for load in s.loads if load.goal is not None}
    assert {key: round(goal, 3) for key, goal in goals.items()} == {
        **{(scenario, "idle"): 0.99 for scenario in ("step", "decode")},
        **{(scenario, "1"): 0.99 for scenario in ("step", "decode")},
        **{(scenario, "8"): 0.97 for scenario in ("step", "decode")},
        **{(scenario, "32"): 0.95 for scenario in ("step", "decode")},
        **{(scenario, "inspect"): 0.97 for scenario in ("step", "decode")},
        ("256", "8"): 0.95,
        ("prompt", "8"): 0.97,
        ("ttft", "idle"): 0.971,
        ("ttft", "8"): 0.971,
        ("ttft-16", "idle"): 0.971,
        ("ttft-16", "8"): 0.971,
        ("admission", "64-rows"): 1.0,
    }


@pytest.mark.parametrize(("scenario", "load"), LOADS, ids=lambda one: one.id)
def test_no_two_requests_of_a_load_ask_for_the_same(scenario: Scenario, load: Load):
    n = min(scenario.n_requests, 64)
    made = [payload(load, request, SOURCES) for request in range(n)]
    if load.ask is Ask.NOTHING:
        assert made == [None] * n
        return
    assert len({data for data in made if data is not None}) == n
    rows = [set(Payload.from_bytes(data).row_keys) for data in made if data is not None]
    if load.ask in (Ask.LATENTS, Ask.VECTORS):
        assert all(len(one) == max(load.n, 1) * len(load.layers) for one in rows)
        assert len(set().union(*rows)) == sum(map(len, rows)), "requests share rows"


def test_256_requests_edit_2048_latents():
    (load,) = SCENARIOS["256"].loads
    assert len({index for request in range(256) for index in latents(load, request)}) == 2048


def test_http_requests_ask_for_the_edits_that_engines_are_given():
    (load,) = SCENARIOS["256"].loads
    fields = interventions(load, 3)
    specs = parse_interventions(fields["interventions"])
    assert [one.sae for one in specs] == ["4k/l10", "4k/l15", "4k/l20"]
    program = Payload.from_bytes(payload(load, 3, SOURCES)).program
    keys = {channel.row for layer in program.layers for channel in layer.channels}
    assert keys == {feature_key(SOURCES[one.sae].digest, edit.index) for one in specs for edit in one.features}
    assert {edit.value for one in specs for edit in one.features} == {np.float32(load.amount).item()}


def test_prompts_of_another_run_share_no_beginning():
    scenario = SCENARIOS["ttft"]
    first, second = prompts(scenario, 1), prompts(scenario, 2)
    assert first == prompts(scenario, 1)
    assert not {tuple(p[:16]) for p in first} & {tuple(p[:16]) for p in second}
    assert {len(p) for p in first} == {scenario.prompt_len}


def test_a_run_whose_receipts_say_less_than_was_asked_is_no_result():
    scenario = SCENARIOS["decode"]
    eight = next(load for load in scenario.loads if load.id == "8")
    due = 16 * (32 + scenario.max_tokens - 2)
    _check(scenario, eight, due, 0)
    for edited, read in ((due - 1, 0), (0, 0), (due, 1)):
        with pytest.raises(RuntimeError, match="decode/8"):
            _check(scenario, eight, edited, read)


class _Family:
    held = True

    def hold(self) -> None:
        self.held = True

    def release(self) -> None:
        self.held = False


class _Speaker:
    """A system that answers at once."""

    def __init__(self, edits: bool, said: list[int]) -> None:
        self.edits, self.said, self.salts = edits, said, []
        self.family = _Family()

    def wait_ready(self) -> dict[str, str]:
        return {}

    def run(self, scenario: Scenario, load: Load, salt: int) -> dict[str, object]:
        assert not self.family.held
        self.salts.append(salt)
        changed = self.edits and load.ask is not Ask.NOTHING
        return {"seconds": 1.0, "first_tokens": [[token + changed for token in self.said]] * scenario.n_requests}

    def close(self) -> None: ...


class _Absent(_Speaker):
    def wait_ready(self) -> dict[str, str]:
        raise RuntimeError("no such wheel")


def _lens_scenario() -> Scenario:
    idle = Load("idle", "idle", Ask.NOTHING, systems=(EDITSERVER, LENS))
    vector = Load("vector", "vector", Ask.VECTORS, 1, systems=(EDITSERVER, LENS))
    return Scenario("s", "s", "s", Group.ENGINE, 2, 8, 4, (idle, vector))


@pytest.mark.parametrize("edits", [True, False])
def test_a_peer_that_does_not_edit_is_not_compared(edits: bool):
    scenario = _lens_scenario()
    plan = Plan([scenario], [VANILLA, EDITSERVER, LENS], rounds=2)
    systems = {
        VANILLA: _Speaker(False, [1, 2]),
        EDITSERVER: _Speaker(True, [1, 2]),
        LENS: _Speaker(edits, [1, 2]),
    }
    found = runner._Found()
    if not edits:
        with pytest.raises(RuntimeError, match="vllm-lens/vector"):
            _scenario(scenario, plan, systems, lambda what, advance=0: None, found)
        return
    _scenario(scenario, plan, systems, lambda what, advance=0: None, found)
    made = runner._described(scenario, found)
    lines = {load["entry"]: load for load in made["loads"]}
    assert lines["vllm-lens/vector"]["agreement"] == 1.0
    assert len(made["rounds"]) == 2, "the round that warms up does not count"
    assert all("first_tokens" not in turn for order in made["rounds"] for turn in order)
    salts = [salt for system in systems.values() for salt in system.salts]
    assert len(set(salts)) == len(salts), "a prompt that came twice would be answered from the prefix cache"
    assert plan.n_turns == len(salts)


def test_systems_that_do_not_start_cost_their_group_only(monkeypatch: pytest.MonkeyPatch):
    engine = _lens_scenario()
    ngram = replace(engine, id="n", group=Group.NGRAM)

    def start(group: Group, names: list[str], *_: object) -> dict[str, _Speaker]:
        if group is Group.ENGINE:
            raise RuntimeError("no memory")
        assert names == [VANILLA, EDITSERVER]
        return {name: _Speaker(True, [1, 2]) for name in names}

    monkeypatch.setattr(runner, "_start", start)
    plan = Plan([engine, ngram], [VANILLA, EDITSERVER], rounds=1)
    assert [one["id"] for one in runner.run(plan, None, lambda what, advance=0: None)] == ["n"]
    assert plan.failures == ["engine: RuntimeError: no memory"]


def test_systems_are_started_anew_in_another_order_and_peers_once(monkeypatch: pytest.MonkeyPatch):
    started: list[list[str]] = []
    speakers: list[_Speaker] = []

    def start(group: Group, names: list[str], *_: object) -> dict[str, _Speaker]:
        started.append(list(names))
        made = {name: _Speaker(name != VANILLA, [1, 2]) for name in names}
        speakers.extend(made.values())
        return made

    monkeypatch.setattr(runner, "_start", start)
    plan = Plan([_lens_scenario()], [VANILLA, EDITSERVER, LENS], rounds=2, starts=3)
    told = list(runner.run(plan, None, lambda what, advance=0: None))
    assert started == [[VANILLA, EDITSERVER, LENS], [EDITSERVER, VANILLA], [VANILLA, EDITSERVER]]
    assert [one["starts"] for one in told] == [[2], [2, 2], [2, 2, 2]], "told again with every start"
    assert len(told[-1]["rounds"]) == 6
    assert {load["entry"] for load in told[-1]["loads"]} >= {"vllm-lens/vector", "editserver/vector"}
    salts = [salt for speaker in speakers for salt in speaker.salts]
    assert len(set(salts)) == len(salts) == plan.n_turns
    assert not plan.failures


def test_a_peer_that_does_not_start_is_noted_and_left_out(monkeypatch: pytest.MonkeyPatch):
    def made(name: str, *_: object) -> _Speaker:
        return _Absent(False, []) if name == LENS else _Speaker(True, [1, 2])

    monkeypatch.setattr(runner, "EngineSystem", made)
    plan = Plan([_lens_scenario()], [VANILLA, EDITSERVER, LENS], rounds=1)
    (measured,) = runner.run(plan, None, lambda what, advance=0: None)
    assert {load["system"] for load in measured["loads"]} == {EDITSERVER}
    assert plan.failures == ["engine: vllm-lens: no such wheel"]
