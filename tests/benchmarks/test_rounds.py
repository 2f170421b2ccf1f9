"""Who runs when, and what a round says: every ratio is of two runs that were next to each other."""

from __future__ import annotations

from itertools import pairwise

import pytest

from benchmarks.rounds import BASELINE, compare, noise, turns


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_every_entry_runs_once_a_round_between_two_baselines(n: int):
    entries = [f"e/{i}" for i in range(n)]
    for round_ in range(2 * n):
        order = turns(entries, round_)
        assert sorted(entry for entry in order if entry != BASELINE) == entries
        for i, entry in enumerate(order):
            assert entry == BASELINE or order[i - 1] == order[i + 1] == BASELINE
        assert (BASELINE, BASELINE) not in pairwise(order)


def test_over_the_rounds_every_entry_is_the_first():
    entries = [f"e/{i}" for i in range(6)]
    assert sorted(turns(entries, round_)[1] for round_ in range(6)) == entries


def test_a_machine_that_slows_down_does_not_change_a_ratio():
    """Entries cost 10 % more than the baseline; the machine loses 1 % of its speed with every run."""
    rounds, clock = [], 1.0
    for round_ in range(6):
        order = []
        for entry in turns(["e/a"], round_):
            order.append({"entry": entry, "seconds": clock * (1.1 if entry == "e/a" else 1.0)})
            clock *= 1.01
        rounds.append(order)
    found = compare(rounds, "e/a", "seconds")
    assert found.ratio == pytest.approx(1 / 1.1, rel=0.001)
    assert (found.low, found.high) == (pytest.approx(found.ratio), pytest.approx(found.ratio))


def test_between_two_baseline_runs_their_mean_counts():
    order = [{"entry": BASELINE, "seconds": 1.0}, {"entry": "e/a", "seconds": 2.0}, {"entry": BASELINE, "seconds": 3.0}]
    assert compare([order], "e/a", "seconds").ratio == 1.0
    assert noise([order], "seconds") == [1 / 3]


def test_a_process_that_is_slow_for_its_life_counts_as_one_start_however_many_rounds_it_had():
    def order(seconds: float) -> list[dict[str, object]]:
        return [{"entry": BASELINE, "seconds": 1.0}, {"entry": "e/a", "seconds": seconds}]

    rounds = [order(1.0), order(1.0), order(1.25), order(1.25), order(1.25), order(1.25), [order(1.0)[0]]]
    found = compare(rounds, "e/a", "seconds", [2, 4, 1])
    assert found.by_start == (1.0, 0.8)
    assert found.ratio == pytest.approx(0.9)
    assert (found.low, found.high) == (0.8, 1.0)


def test_an_entry_that_never_ran_is_an_error():
    with pytest.raises(ValueError, match="e/b"):
        compare([[{"entry": BASELINE, "seconds": 1.0}]], "e/b", "seconds")
