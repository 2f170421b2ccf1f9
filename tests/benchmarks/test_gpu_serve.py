"""The serving benchmark for GPUs: what it sends is what its table says, and a run that edited less does not count."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest

from benchmarks.gpu import serve
from benchmarks.gpu.programs import payload
from benchmarks.gpu.serve import GROUPS, Group, Load, check, line_of
from benchmarks.gpu.stock import PLUGINS, Ask, Broken, Engine, Seen, announce
from editserver.engine.config import SAESource
from interventions.program import Payload

LAYERS = (1, 2, 3)
SAES = {layer: SAESource(f"random/l{layer}", {"path": "/x"}, f"{layer}" * 64, layer) for layer in LAYERS}
GROUP = Group("2 requests", 2, 9, 6, (Load("edited", 4),))
DUE = 2 * (9 + 6 - 2)


def seen(seconds: float = 2.0, *, cached: int = 0, edited: int = 0, read: int = 0) -> Seen:
    return Seen(seconds, [0.2, 0.4], [0.01, 0.01], cached, edited, read)


@pytest.mark.parametrize("width", [8192, 131072])
def test_every_request_of_a_load_has_latents_of_its_own(width: int) -> None:
    for group in GROUPS:
        for load in group.loads:
            if load.kind != "edited" or group.shared:
                continue
            made = [Payload.from_bytes(payload("edited", r, load.latents, SAES, width)) for r in range(group.requests)]
            rows = {key for one in made for key in one.row_keys}
            assert len(rows) == group.requests * load.latents * len(LAYERS)
            assert all(one.program is not None and len(one.program.layers) == len(LAYERS) for one in made)


def test_rules_and_inspections_are_what_the_table_says() -> None:
    rules = Payload.from_bytes(payload("rules", 3, 32, SAES, 8192)).program
    assert rules is not None
    assert rules.rules is not None
    assert (len(rules.rules.propositions), len(rules.rules.conclusions)) == (8, 12)
    reads = Payload.from_bytes(payload("inspected", 3, 8, SAES, 8192)).reads
    assert [(read.layer, len(read.features)) for read in reads] == [(layer, 8) for layer in LAYERS]


def test_a_run_that_edited_or_read_less_than_all_does_not_count() -> None:
    (load,) = GROUP.loads
    check(GROUP, load, seen(edited=3 * DUE), 3)
    check(GROUP, None, seen(), 3)
    check(GROUP, Load("rules", 32), seen(read=DUE), 3)
    check(GROUP, Load("inspected", 8), seen(read=3 * DUE), 3)
    for wrong in (seen(edited=3 * DUE - 1), seen(), seen(edited=3 * DUE, read=1)):
        with pytest.raises(AssertionError, match="due"):
            check(GROUP, load, wrong, 3)
    behind = Group("2 behind", 2, 300, 6, (load,), shared=256)
    left = 2 * (300 + 6 - 1) - 2 * 256
    check(behind, load, seen(edited=3 * left, cached=2 * 256), 3)
    for few, cached, what in (
        (3 * left, 255, "came from"),
        (3 * left, 2 * 288, "came from"),
        (3 * left - 1, 2 * 256, "due"),
    ):
        with pytest.raises(AssertionError, match=what):
            check(behind, load, seen(edited=few, cached=cached), 3)


def test_behind_a_cached_prefix_every_round_has_tokens_of_its_own() -> None:
    (group,) = [group for group in GROUPS if group.shared]
    made = serve.asks(group, None, 128_256, lambda *_: b"")
    rounds = [[serve.behind(ask, group.shared, n, 128_256).prompt for ask in made] for n in range(8)]
    prompts = [tuple(prompt) for one in rounds for prompt in one]
    assert len({prompt[: group.shared] for prompt in prompts}) == 1
    assert len({prompt[group.shared : group.shared + 16] for prompt in prompts}) == len(prompts)
    assert {len(prompt) for prompt in prompts} == {group.prompt}
    assert all(3 <= token < 128_256 for prompt in prompts for token in prompt[1:])
    apart = serve.asks(GROUP, None, 512, lambda *_: b"")
    assert [serve.behind(ask, 0, 5, 512) for ask in apart] == apart


@pytest.mark.parametrize("load", [None, Load("idle"), *GROUP.loads])
def test_a_run_that_found_its_prompts_in_the_cache_does_not_count(load: Load | None) -> None:
    edited = 3 * DUE if load is not None and load.kind == "edited" else 0
    check(GROUP, load, seen(edited=edited), 3)
    with pytest.raises(AssertionError, match="should have been empty"):
        check(GROUP, load, seen(edited=edited, cached=16), 3)


class Played:
    """An engine that answers as told: with what a run gave, or a failure; the last answer stays."""

    def __init__(self, *answers: Seen | Exception) -> None:
        self.answers = list(answers)

    def run(self, asks: Sequence[Ask], *, warm: bool) -> Seen:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        pass


@pytest.fixture
def bench(tmp_path: Path) -> serve.Bench:
    """With two loads, idle and edited, and no engines yet."""
    bench = object.__new__(serve.Bench)
    bench.began, bench.limit, bench.out = time.perf_counter(), 60.0, tmp_path / "serve.json"
    bench.saes, bench.vocab = dict(SAES), 512
    group = Group("2 requests", 2, 9, 6, (Load("idle"), Load("edited", 4)))
    bench.groups = {group: {load: [Ask([1] * 9, 6)] * 2 for load in (None, *group.loads)}}
    bench.report = {"results": [], "wrong": [], "skipped": []}
    return bench


def loads(bench: serve.Bench) -> list[str]:
    return [line["load"] for line in bench.report["results"]]


def test_a_load_that_is_refused_or_wrong_is_reported_and_the_others_are_measured(bench: serve.Bench) -> None:
    bench.vanilla, bench.armed = cast(Engine, Played(seen())), cast(Engine, Played(seen(), Broken("…\nit is refused")))
    bench.run(3)
    assert loads(bench) == ["none: vanilla's next run"]
    assert [(what[1], what[2]) for what in bench.report["wrong"]] == [
        ("4 latents × 3 layers", "…\nit is refused"),
        ("armed, idle", "…\nit is refused"),
    ]

    bench.report |= {"results": [], "wrong": []}
    bench.armed = cast(Engine, Played(seen()))  # never edited anything
    bench.run(3)
    assert loads(bench) == ["none: vanilla's next run", "armed, idle"]
    ((_, name, why),) = bench.report["wrong"]
    assert (name, why) == ("4 latents × 3 layers", f"0 edited, 0 read: {(3 * DUE, 0)} due")
    assert json.loads(bench.out.read_text())["wrong"]


def test_where_vanilla_fails_nothing_is_compared_and_it_is_said(bench: serve.Bench) -> None:
    bench.vanilla, bench.armed = cast(Engine, Played(seen(), Broken("gone"))), cast(Engine, Played(seen()))
    bench.run(3)
    assert bench.report["results"] == []
    assert ["2 requests", "vanilla", "gone"] in bench.report["wrong"]


def test_what_is_not_begun_is_said(bench: serve.Bench) -> None:
    bench.limit = 0.0
    bench.run(3)
    assert bench.report["skipped"] == [["2 requests", ["armed, idle", "4 latents × 3 layers"]]]


def test_a_ratio_below_one_says_that_editing_costs_something() -> None:
    line = line_of(GROUP, GROUP.loads[0], [seen(1.0), seen(2.0), seen(3.0)], [seen(2.0), seen(2.0), seen(4.0)])
    assert (line["ratio"], line["ratio min"], line["ratio max"]) == (0.75, 0.5, 1.0)
    assert line["ratio TTFT"] == pytest.approx(1)
    assert line["vanilla TTFT ms"] == pytest.approx(300)
    assert len(serve.in_columns(line)) == len(serve.heading())


def test_where_editserver_is_not_installed_the_plugin_is_seen_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.setattr(sys, "path", [*sys.path])
    with monkeypatch.context() as not_installed:
        not_installed.setattr(importlib.metadata, "entry_points", lambda group: [])
        announce(tmp_path)
    assert os.environ["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path)
    assert os.environ["PYTHONPATH"].endswith("elsewhere")
    (found,) = importlib.metadata.distributions(path=[str(tmp_path)])
    (point,) = found.entry_points
    assert (point.group, point.name) == (PLUGINS, "editserver")
    assert callable(point.load())
    announce(tmp_path)  # it is seen now: nothing is written again
