"""The serving benchmark for GPUs: what it sends is what its table says, and a run that edited less does not count."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import serve
from benchmarks.gpu.programs import payload
from benchmarks.gpu.serve import GROUPS, Group, Load, check, line_of
from benchmarks.gpu.stock import PLUGINS, Seen, announce
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
    with pytest.raises(AssertionError, match="prefix cache"):
        check(behind, load, seen(edited=5, cached=255), 3)


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
