"""Payloads that requests carry: what comes back is not decoded again, as far as memory is bounded."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from editserver.engine.compat.core import KNOWN_BYTES, SHORT_BYTES, payload_of
from editserver.engine.wire import KEY
from interventions.program import Channel, LayerProgram, Op, Payload, Program, ReadKind, vector_key
from interventions.selectors import ALL


def asked(number: int, size: int = 8) -> SimpleNamespace:
    """Sampling parameters of a request that adds a vector of ``size`` numbers, ``number`` times."""
    row = np.ones(size, "<f4").tobytes()
    add = Op(1.0, float(number), -math.inf, math.inf, False, 0, 0)
    layer = LayerProgram(1, (Channel(ReadKind.NONE, vector_key(row), (add,)),))
    program = Program((layer,), (ALL,), {vector_key(row): row})
    return SimpleNamespace(extra_args={KEY: Payload(program, (), program.digest()).to_bytes()})


def strength(payload: Payload | None) -> float:
    assert payload is not None
    assert payload.program is not None
    return payload.program.layers[0].channels[0].ops[0].beta


@pytest.mark.parametrize(("size", "several"), [(8, 1000), (SHORT_BYTES // 2, 100)])
def test_many_configurations_that_take_turns_are_decoded_once(size: int, several: int) -> None:
    requests = [asked(number, size) for number in range(several)]
    first = [payload_of(one) for one in requests]
    assert [strength(one) for one in first] == list(range(several))
    assert all(payload_of(one) is before for one, before in zip(requests, first, strict=True))


def test_a_payload_with_large_vectors_is_not_kept() -> None:
    request = asked(1, KNOWN_BYTES // 4)
    assert payload_of(request) is not payload_of(request)
    assert payload_of(request) == payload_of(request)


def test_a_request_without_a_program_has_no_payload() -> None:
    assert payload_of(SimpleNamespace(extra_args=None)) is None
    with pytest.raises(ValueError, match="must be the bytes of a compiled payload, got str"):
        payload_of(SimpleNamespace(extra_args={KEY: "text"}))
