"""Rounding to float32: numpy's, for every number that a request may hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from interventions.float32 import float32


@given(st.floats(allow_nan=False) | st.integers(-(2**1000), 2**1000))
@example(-0.0)
@example(1 + 2**-24)  # half-way between two float32
@example(1 + 3 * 2**-24)
@example(2**24 + 1)
@example(1e-45)
@example(3.4028235677973362e38)  # the last that rounds to the largest float32, and the first that does not
@example(3.4028235677973366e38)
def test_it_rounds_as_numpy_does(value):
    with np.errstate(over="ignore"):
        expected = float(np.float32(float(value)))
    assert float32(value) == expected
    assert math.copysign(1.0, float32(value)) == math.copysign(1.0, expected)


def test_what_is_no_number_stays_none_and_what_float64_cannot_hold_is_an_error():
    assert math.isnan(float32(math.nan))
    with pytest.raises(OverflowError):
        float32(10**400)
