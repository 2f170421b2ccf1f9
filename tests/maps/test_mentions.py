"""Mentions are found in every tokenisation asked for, and the end of one is known without looking ahead."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interventions.maps.mentions import MentionError, mention_ends, mention_positions, spans, surfaces

VOCABULARY = [
    "New",
    " New",
    " York",
    "York",
    " City",
    "new",
    " new",
    " york",
    "Paris",
    " Paris",
    "ian",
    " Le",
    "Bron",
    "Le",
]


def encode(text: str) -> list[int]:
    """Longest known piece first, else one id per character."""
    ids: list[int] = []
    while text:
        piece = max((p for p in VOCABULARY if text.startswith(p)), key=len, default=text[0])
        ids.append(VOCABULARY.index(piece) if piece in VOCABULARY else 1000 + ord(piece))
        text = text[len(piece) :]
    return ids


def found_ends(text: str, *names: str, **options) -> list[int]:
    ids = encode(text)
    return [i for i, end in enumerate(mention_ends(ids, surfaces(names, encode, **options).sequences)) if end]


def test_a_name_is_found_at_the_start_and_within_a_sentence() -> None:
    ids = encode("New York and New York")
    assert found_ends("New York and New York", "New York") == [1, len(ids) - 1]
    assert found_ends("New York and New York", "New York", spaces=False) == [1]


def test_case_variants_are_matched_only_as_asked() -> None:
    text = "in new york"
    assert found_ends(text, "New York") == []
    assert found_ends(text, "New York", cases=["lower"]) == [len(encode(text)) - 1]
    assert found_ends("NEW YORK", "new york", cases=["upper", "as_given"]) == [7]
    assert found_ends("New York", "NEW york", cases=["title"]) == [1]


def test_tokenisations_say_which_strings_they_are() -> None:
    found = surfaces([" Paris ", "Paris"], encode, cases=["as_given", "title"])
    assert found.sequences == ((8,), (9,))
    assert found.texts == {(8,): ("Paris",), (9,): (" Paris",)}
    assert surfaces(["New York", "Paris"], encode).longest == 2


def test_nested_and_overlapping_mentions_all_count() -> None:
    ids = encode("New York City New York")
    both = surfaces(["New York", "New York City"], encode).sequences
    assert spans(ids, both) == [(0, 2), (0, 3), (3, 5)]
    assert mention_positions(ids, both, "last") == (1, 2, 4)
    assert mention_positions(ids, both, "all") == (1, 2, 3, 4)
    assert spans([7, 7, 7], [(7, 7)]) == [(0, 2), (1, 3)]
    assert mention_positions([1, 7, 7, 7], [(7, 7)], "all") == (1, 2, 3)


def test_position_0_is_left_out_but_its_mention_is_not() -> None:
    ids = encode("New York")
    sequences = surfaces(["New York"], encode).sequences
    assert mention_positions(ids, sequences, "all") == (1,)
    assert mention_positions(ids, sequences, "all", include_bos=True) == (0, 1)
    assert mention_positions(encode("Paris"), surfaces(["Paris"], encode).sequences, "last") == ()


def test_looking_back_only_a_longer_word_that_starts_with_the_name_counts() -> None:
    assert found_ends("a Parisian", "Paris") == [1]


IDS = st.lists(st.integers(0, 2), max_size=25)
SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=5)


@settings(max_examples=300, deadline=None)
@given(ids=IDS, sequences=SEQUENCES)
def test_every_contiguous_occurrence_is_found_once(ids: list[int], sequences: list[list[int]]) -> None:
    expected = {
        (start, stop)
        for start in range(len(ids))
        for stop in range(start + 1, len(ids) + 1)
        if ids[start:stop] in sequences
    }
    found = spans(ids, sequences)
    assert sorted(found) == sorted(expected)
    ends = {stop - 1 for _, stop in expected}
    assert {i for i, end in enumerate(mention_ends(ids, sequences)) if end} == ends
    assert set(mention_positions(ids, sequences, "last", include_bos=True)) == ends
    inside = {p for start, stop in expected for p in range(start, stop)}
    assert set(mention_positions(ids, sequences, "all", include_bos=True)) == inside


@settings(max_examples=200, deadline=None)
@given(ids=IDS, sequences=SEQUENCES, cut=st.integers(0, 25))
def test_a_chunk_with_the_tokens_before_it_is_answered_as_in_one_piece(
    ids: list[int], sequences: list[list[int]], cut: int
) -> None:
    whole = mention_ends(ids, sequences).tolist()
    assert mention_ends(ids[:cut], sequences).tolist() == whole[:cut]  # nothing later is looked at
    longest = max(map(len, sequences))
    before = ids[max(0, cut - (longest - 1)) : cut] if longest > 1 else []
    assert mention_ends(ids[cut:], sequences, before).tolist() == whole[cut:]


def test_names_that_cannot_be_matched_are_refused() -> None:
    for names, options, message in (
        ([], {}, "no name"),
        (["  "], {}, "is not a name"),
        (["Paris"], {"cases": []}, "no case"),
        (["Paris"], {"cases": ["UPPER"]}, "as_given, lower, upper"),
    ):
        with pytest.raises(MentionError, match=message):
            surfaces(names, encode, **options)
    with pytest.raises(MentionError, match="has no tokens"):
        surfaces(["x"], lambda _: [])
