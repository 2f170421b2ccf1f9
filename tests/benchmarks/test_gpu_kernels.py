"""The kernels' benchmark for GPUs: what it prints about a run, and that an edit which is off by a tenth is not passed over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OFF_BY_A_TENTH = """
import os, sys
import triton.language
os.environ["TRITON_INTERPRET"] = "1"
from benchmarks.gpu import edit_cost, editing, kernels

def adds(*given):
    made = table(*given)
    made.ops[1][:, :4] = 1.0, 1.0, -float("inf"), float("inf")  # a + 1, however long the stream is
    return made

table, expected, weights = editing.table, editing.Editing.expected, edit_cost.make_weights
editing.table = adds
editing.Editing.expected = lambda self, *given: 0.9 * expected(self, *given)
edit_cost.make_weights = lambda *given: [(*others, 100 * down) for *others, down in weights(*given)]  # as long as in a deep model
sys.exit(kernels.main(["--interpret", "--tiny", "--out", sys.argv[1]]))
"""


@pytest.mark.slow
def test_an_edit_that_is_off_by_a_tenth_is_wrong_however_long_the_stream_is(tmp_path: Path) -> None:
    out = tmp_path / "not" / "there" / "kernels.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", OFF_BY_A_TENTH, str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    report = json.loads(out.read_text())
    assert len(report["checks"]) == 6
    assert {what for check in report["checks"].values() for what, holds in check.items() if holds is False} == {
        "it is as small as bfloat16 allows"
    }
    assert not report["served without"]  # rules are launched, too
    assert {(line["phase"], line["latents"]) for line in report["served"]} == {("served", n) for n in (0, 1, 2)}


# Kernels are imported when a test runs: tests/engine/triton/conftest.py has then said whether they are interpreted.


def test_a_ratio_is_of_paired_rounds_and_has_its_spread() -> None:
    from benchmarks.gpu.edit_cost import Compared, with_spread

    vanilla, edited = [1.0] * 38 + [9.0, 1.0], [1.0] * 19 + [1.25] * 19 + [9.0, 10.0]
    found = Compared.of(vanilla, edited)
    assert (found.ratio, found.low, found.high) == (0.9, 0.8, 1.0)
    assert (found.vanilla, found.edited) == (1.0, 1.25)
    assert with_spread({"ratio": 0.99, "low": 0.98, "high": 1.0}) == "ratio 0.9900 (0.9800 to 1.0000)"


def test_columns_stand_below_their_names() -> None:
    from benchmarks.gpu.edit_cost import Result, in_columns

    names = in_columns(Result.__annotations__)
    row = in_columns(("8B", "decode", 256, 8, 256, 4.0, 4.1, 0.97561, 0.97, 0.98, 33.333))
    assert len(row) == len(names)
    assert row.split() == ["8B", "decode", "256", "8", "256", "4.000", "4.100", "0.9756", "0.9700", "0.9800", "33.333"]
