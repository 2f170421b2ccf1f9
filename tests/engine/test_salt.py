"""Salts: equal only for equal edits under equal user salts, and never equal across domains."""

from __future__ import annotations

import itertools
import re

from hypothesis import given
from hypothesis import strategies as st

from editserver.engine.salt import edit_salt, plain_salt

digests = st.text("0123456789abcdef", min_size=64, max_size=64)
user_salts = st.none() | st.text(max_size=40)
prompt_lens = st.none() | st.integers(1, 10**6)
edits = st.tuples(user_salts, digests, prompt_lens)


@given(edits, edits)
def test_edited_salts_are_equal_only_for_equal_edits(one: tuple, other: tuple) -> None:
    assert (edit_salt(*one) == edit_salt(*other)) == (one == other)


@given(st.text(max_size=200), edits)
def test_no_string_that_a_client_sends_gives_an_edited_salt(text: str, edit: tuple) -> None:
    assert plain_salt(text) != edit_salt(*edit)
    assert plain_salt(edit_salt(*edit)) != edit_salt(*edit)


@given(st.text(max_size=40), st.text(max_size=40))
def test_plain_salts_are_equal_only_for_equal_strings(one: str, other: str) -> None:
    assert (plain_salt(one) == plain_salt(other)) == (one == other)


def test_plain_traffic_without_a_salt_stays_unsalted() -> None:
    assert plain_salt(None) is None


def test_parts_cannot_run_into_each_other() -> None:
    salts = [edit_salt("a", "bc", None), edit_salt("ab", "c", None), edit_salt("a", "b", 1), edit_salt("a", "b1", None)]
    salts += [edit_salt(None, "b", 12), edit_salt("", "b", 12), edit_salt("s", "b", 12), edit_salt(None, "b1", 2)]
    assert all(one != other for one, other in itertools.combinations(salts, 2))


@given(user_salts, digests, prompt_lens)
def test_salts_are_what_vllm_takes(user_salt: str | None, digest: str, prompt_len: int | None) -> None:
    assert re.fullmatch(r"[0-9a-f]{64}", edit_salt(user_salt, digest, prompt_len))


@given(st.text(st.characters(codec=None, categories=["Cs"]), min_size=1, max_size=5))
def test_lone_surrogates_are_hashed_not_refused(text: str) -> None:
    assert plain_salt(text) != plain_salt(text + text)
