from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from editserver_client.sse import SSEDecoder

STREAM = (
    b": keep-alive\n\n"
    b'data: {"a": 1}\n\n'
    b"event: chunk\nid: 7\nretry: 10\ndata:no space\n\n"
    b": another comment\r\n"
    b"data: first\r\ndata: second\r\n\r\n"
    b"data: mac\rdata: line ends\r\r" + "data: Tōkyō 東京 \u2028 \x85 🗼\n\n".encode() + b"data\n\n"
    b"data:  two spaces\n\n"
    b"data: [DONE]\n\n"
)
EVENTS = [
    '{"a": 1}',
    "no space",
    "first\nsecond",
    "mac\nline ends",
    "Tōkyō 東京 \u2028 \x85 🗼",
    "",
    " two spaces",
    "[DONE]",
]


def decode(chunks: list[bytes]) -> list[str]:
    decoder = SSEDecoder()
    events = list(itertools.chain.from_iterable(decoder.feed(chunk) for chunk in chunks))
    return events + decoder.flush()


def test_events_comments_multi_line_data_and_all_line_ends() -> None:
    assert decode([STREAM]) == EVENTS


def test_one_byte_at_a_time_gives_the_same_events() -> None:
    assert decode([STREAM[i : i + 1] for i in range(len(STREAM))]) == EVENTS


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_any_chunking_gives_the_same_events(cuts: list[int]) -> None:
    bounds = [0, *sorted(cuts), len(STREAM)]
    assert decode([STREAM[a:b] for a, b in itertools.pairwise(bounds)]) == EVENTS


def test_an_event_is_given_out_as_soon_as_its_blank_line_has_come() -> None:
    decoder = SSEDecoder()
    assert decoder.feed(b"data: 1\n") == []
    assert decoder.feed(b"\n") == ["1"]
    assert decoder.feed(b"data: 2\r\n\r") == ["2"]
    assert decoder.feed(b"\ndata: 3\n\n") == ["3"]


@pytest.mark.parametrize("tail", [b"data: [DONE]", b"data: [DONE]\n", b"data: [DONE]\r"])
def test_a_missing_last_blank_line_loses_nothing(tail: bytes) -> None:
    assert decode([b"data: 1\n\n" + tail]) == ["1", "[DONE]"]


def test_a_byte_order_mark_is_no_part_of_the_first_field() -> None:
    assert decode([b"\xef\xbb\xbfdata: 1\n\n"]) == ["1"]
