"""Which tokens are selected, and that equal selections have equal structs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interventions.selectors import (
    ALL,
    GENERATED,
    LAST_PROMPT_TOKEN,
    PROMPT,
    Range,
    Selector,
    slice_selector,
    union,
)

PROMPT_LEN, TOTAL = 6, 10


def positions(selector: Selector, prompt_len: int = PROMPT_LEN, total: int = TOTAL, ids: list[int] | None = None):
    tokens = torch.tensor(ids if ids is not None else [0] * total)
    return torch.arange(total)[selector.mask(torch.arange(total), tokens, prompt_len)].tolist()


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (ALL, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (PROMPT, [1, 2, 3, 4, 5]),
        (GENERATED, [6, 7, 8, 9]),
        (LAST_PROMPT_TOKEN, [5]),
        (slice_selector(2, 4), [2, 3]),
        (slice_selector(-2, None), [4, 5, 6, 7, 8, 9]),
        (slice_selector(None, -2), [1, 2, 3]),
        (slice_selector(-3, -1), [3, 4]),
        (slice_selector(-100, 3), [1, 2]),
        (slice_selector(0, 1), []),
        (slice_selector(8, -1), []),
        (slice_selector(3, None), [3, 4, 5, 6, 7, 8, 9]),
    ],
)
def test_ranges_are_half_open_and_negatives_count_from_the_end_of_the_prompt(selector, expected):
    assert positions(union([selector], include_bos=False)) == expected


@pytest.mark.parametrize("selector", [ALL, PROMPT, slice_selector(0, 3), Selector((), (7,))])
def test_position_zero_is_selected_only_with_include_bos(selector):
    ids = [7] * TOTAL
    assert 0 not in positions(union([selector], include_bos=False), ids=ids)
    assert 0 in positions(union([selector], include_bos=True), ids=ids)


def test_a_bos_id_elsewhere_is_an_ordinary_token():
    assert positions(union([Selector((), (7,))], include_bos=False), ids=[7, 1, 7, 1, 1, 7, 1, 1, 1, 7]) == [2, 5, 9]


def test_a_one_token_prompt_is_its_own_last_token_but_still_position_zero():
    assert positions(union([LAST_PROMPT_TOKEN], include_bos=False), prompt_len=1) == []
    assert positions(union([LAST_PROMPT_TOKEN], include_bos=True), prompt_len=1) == [0]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ([PROMPT, GENERATED], [ALL]),
        ([GENERATED, PROMPT], [ALL]),
        ([ALL, LAST_PROMPT_TOKEN, Selector((), (3,))], [ALL]),
        ([PROMPT, LAST_PROMPT_TOKEN], [PROMPT]),
        ([LAST_PROMPT_TOKEN, GENERATED], [slice_selector(-1, None)]),
        ([slice_selector(2, 5), slice_selector(4, 8)], [slice_selector(2, 8)]),
        ([slice_selector(2, 5), slice_selector(5, 8)], [slice_selector(2, 8)]),
        ([slice_selector(-5, -3), slice_selector(-3, -1)], [slice_selector(-5, -1)]),
        ([slice_selector(1, 4)], [slice_selector(0, 4)]),
        ([slice_selector(1, None)], [ALL]),
        ([slice_selector(0, 1), slice_selector(3, 4)], [slice_selector(3, 4)]),
        ([slice_selector(4, 4), slice_selector(-1, -2), PROMPT], [PROMPT]),
        ([Selector((), (5, 3)), Selector((), (3,))], [Selector((), (3, 5))]),
        ([slice_selector(None, -3), slice_selector(-4, None)], [ALL]),
    ],
)
def test_equal_selections_have_equal_canonical_forms(left, right):
    assert union(left, include_bos=False) == union(right, include_bos=False)


def test_include_bos_leaves_no_trace_where_it_cannot_matter():
    assert union([GENERATED], include_bos=True) == union([GENERATED], include_bos=False)
    assert union([slice_selector(1, 5)], include_bos=True) == union([slice_selector(0, 5)], include_bos=False)
    assert union([ALL], include_bos=True) != union([ALL], include_bos=False)


def test_empty_for_every_prompt_is_the_selector_without_ranges_and_tokens():
    for empty in (slice_selector(5, 5), slice_selector(-2, -2), slice_selector(9, 2), slice_selector(-1, 0)):
        assert union([empty], include_bos=False) == Selector()


def test_only_selectors_that_look_at_the_prompt_end_need_its_length():
    assert not union([ALL], include_bos=False).needs_prompt_len
    assert not union([PROMPT, GENERATED], include_bos=False).needs_prompt_len
    assert not union([slice_selector(2, 9)], include_bos=False).needs_prompt_len
    for selector in (PROMPT, GENERATED, LAST_PROMPT_TOKEN, slice_selector(-3, None)):
        assert union([selector], include_bos=False).needs_prompt_len


_bounds = st.none() | st.integers(-12, 12)
_parts = st.one_of(
    st.sampled_from([ALL, PROMPT, GENERATED, LAST_PROMPT_TOKEN]),
    st.builds(slice_selector, _bounds, _bounds),
    st.builds(lambda ids: Selector((), tuple(ids)), st.lists(st.integers(0, 4), min_size=1, max_size=3)),
)


@given(
    parts=st.lists(_parts, min_size=1, max_size=5),
    include_bos=st.booleans(),
    prompt_len=st.integers(1, 9),
    ids=st.lists(st.integers(0, 4), min_size=12, max_size=12),
)
@settings(max_examples=400, deadline=None)
def test_the_canonical_union_selects_what_its_parts_select(parts, include_bos, prompt_len, ids):
    wanted = set()
    for part in parts:
        wanted |= set(positions(Selector(part.ranges, part.token_ids, True), prompt_len, 12, ids))
    if not include_bos:
        wanted.discard(0)
    canonical = union(parts, include_bos)
    assert positions(canonical, prompt_len, 12, ids) == sorted(wanted)
    assert union([canonical], canonical.include_bos) == canonical
    assert union(parts[::-1], include_bos) == canonical
    assert canonical.count(ids, prompt_len) == (len(wanted), len([p for p in wanted if p < prompt_len]))


def test_intervals_are_sorted_and_disjoint():
    selector = Selector(tuple(Range(r.start, r.stop) for s in (PROMPT, slice_selector(2, 9)) for r in s.ranges))
    assert selector.intervals(PROMPT_LEN) == [(1, 9)]
