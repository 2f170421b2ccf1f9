"""Memory that is slow is told from memory that is not, and none of it is given back."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from benchmarks import slow_memory
from benchmarks.slow_memory import hold, slow, time_pages


def test_pages_are_held_that_are_slower_than_most_in_most_passes() -> None:
    seconds = np.full((6, 100), 1.0) + np.arange(6)[:, None] * 1e-3
    seconds[:, 7] = 2.0  # always slow
    seconds[0, 8] = 9.0  # once interrupted
    seconds[:, 9] = 1.1  # hardly slower
    assert np.flatnonzero(slow(seconds)).tolist() == [7]


def test_uniform_memory_is_given_back_whole() -> None:
    assert not slow(np.ones((6, 50))).any()


def test_every_page_is_read_in_every_pass() -> None:
    took = time_pages(np.ones((5, 4096), np.uint64), passes=3)
    assert took.shape == (3, 5)
    assert (took > 0).all()


def test_slow_pages_stay_and_all_others_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = np.ones((6, 30))
    seconds[:, [0, 13, 29]] = 2.0
    monkeypatch.setattr(slow_memory, "time_pages", lambda pages: seconds)
    pages, kept = hold(30)
    assert np.flatnonzero(kept).tolist() == [0, 13, 29]
    assert np.flatnonzero(pages.max(axis=1)).tolist() == [0, 13, 29]
    assert (pages[kept].sum(axis=1) == slow_memory.PAGE // mmap.PAGESIZE).all()
