"""Promise 2: equal edits share cached blocks, different ones never do, and a cached answer is the cold answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from editserver.engine.salt import edit_salt
from tests.engine import checks
from tests.engine.checks import SHARED
from tests.engine.lab import Lab, plain, steer
from tests.engine.shadow import assert_edited_where_asked
from tests.engine.support import Ask, prompt_of

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("seed", [0, 1])
def test_any_mix_of_edits_over_shared_prompts_answers_as_with_a_cold_cache(lab: Lab, seed: int) -> None:
    checks.cache_matrix(lab, seed=seed)


def test_a_later_turn_never_reuses_kv_of_the_other_phase(lab: Lab) -> None:
    checks.two_turns(lab)


def test_a_later_turn_shares_when_the_edit_does_not_depend_on_where_the_prompt_ends(lab: Lab) -> None:
    for edits in ([], [steer(15, 3)]):
        _, cached = checks.next_turn(lab, edits)
        assert cached == SHARED, f"{edits}: {cached} tokens were shared"


def test_a_vector_that_changed_under_its_name_shares_nothing_with_its_past(lab: Lab, tmp_path: Path) -> None:
    checks.content_not_name(lab, tmp_path)


def test_a_plain_request_that_sends_an_edited_salt_gets_no_hit(lab: Lab) -> None:
    edited = Ask(prompt_of(230, SHARED + 4), [steer(15, 3)], max_tokens=2)
    lab.alone(plain(edited))
    answer = lab.alone(edited)
    assert answer.compiled.program is not None
    digest = answer.compiled.program.digest()
    for salt in (edit_salt(None, digest, None), edit_salt("", digest, None), digest):
        thief = replace(plain(edited), salt=salt)
        stolen = lab.engine.run([thief])[0]
        assert stolen.cached == 0
        assert stolen.differs(lab.alone(plain(edited))) <= lab.floor
        lab.engine.run([edited])  # alone() forgot what was cached
    assert lab.engine.run([edited])[0].cached == SHARED


def test_a_user_salt_separates_edited_requests_from_each_other(lab: Lab) -> None:
    mine = Ask(prompt_of(231, SHARED + 4), [steer(15, 3)], max_tokens=2, salt="tenant-1")
    lab.engine.reset_cache()
    asks = [mine, replace(mine, salt="tenant-2"), replace(mine, salt=None), plain(mine), mine]
    assert [lab.engine.run([ask])[0].cached for ask in asks] == [0, 0, 0, 0, SHARED]


def test_equal_edits_share_however_they_are_expressed_and_unequal_ones_do_not(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = steer(15, 3, 20.0), steer(0, 5, 8.0, ["prompt", "generated"])
    ask = Ask(prompt_of(232, SHARED + 4), [one, two], max_tokens=2)
    lab.engine.reset_cache()

    def hits(*interventions: object) -> int:
        return lab.engine.run([replace(ask, interventions=interventions)])[0].cached

    assert hits(one, two) == 0
    assert hits(two, one) == SHARED, "order"
    assert hits(one | {"id": "joy"}, two | {"id": "calm", "tokens": "all"}) == SHARED, "labels, selectors"
    assert hits(one | {"strength": 12.0}, one | {"strength": 8.0, "id": "rest"}, two) == 0, "two ops are not one op"
    assert hits(one | {"strength": 20.001}, two) == 0, "strength"
    assert hits(one | {"tokens": {"from": 2}}, two) == 0, "another selector"
    assert hits(one | {"feature": 4}, two) == 0, "another row"
    monkeypatch.setattr(lab.engine.catalogue, "max_dose", 0.9)
    assert hits(one, two) == 0, "the bound on the dose"
    assert hits(one, two) == SHARED


def test_inspecting_the_prompt_does_not_read_the_cache_and_is_complete(lab: Lab) -> None:
    bare = Ask(prompt_of(233, SHARED + 4), [steer(0, 5, 8.0)], max_tokens=3)
    look = replace(bare, inspect={"sae": "jumprelu/l15", "top_k": 4, "features": [1]})
    n_fed = len(bare.prompt) + 2
    cold = lab.alone(look)
    lab.engine.reset_cache()
    lab.engine.run([bare])
    warm = lab.engine.run([look])[0]
    assert warm.cached == 0
    assert cold.journal is not None
    assert warm.journal is not None
    expected, found = (journal.readings(0, 0, n_fed) for journal in (cold.journal, warm.journal))
    assert [position for position, _ in found] == list(range(1, n_fed))
    assert found == expected, "the same request alone reads the same values"
    assert any(value for _, features in found for _, value in features)
    assert warm.same_bits(lab.alone(bare)), "looking changed what was looked at"
    assert lab.engine.run([bare])[0].cached == SHARED, (
        "what an inspection computed is shared: it is not part of the salt"
    )


def test_inspecting_generated_tokens_only_keeps_the_cache(lab: Lab) -> None:
    bare = Ask(prompt_of(234, SHARED + 4), max_tokens=4)
    look = replace(bare, inspect={"sae": "standard/l15", "top_k": 3, "tokens": "generated"})
    n = len(bare.prompt)
    cold = lab.alone(look)
    lab.engine.reset_cache()
    lab.engine.run([bare])
    warm = lab.engine.run([look])[0]
    assert warm.cached == SHARED
    assert warm.token_ids == cold.token_ids
    assert cold.journal is not None
    assert warm.journal is not None
    expected, found = (journal.readings(0, 0, n + 3) for journal in (cold.journal, warm.journal))
    assert [position for position, _ in found] == [n, n + 1, n + 2]
    for (_, mine), (_, theirs) in zip(found, expected, strict=True):
        assert [feature for feature, _ in mine] == [feature for feature, _ in theirs]
        assert [value for _, value in mine] == pytest.approx([value for _, value in theirs], abs=1e-3)


def test_the_receipt_counts_what_was_computed_and_says_from_where(lab: Lab) -> None:
    ask = Ask(prompt_of(235, SHARED + 4), [steer(15, 3)], max_tokens=3)
    lab.engine.reset_cache()
    first, second = (lab.engine.run([ask])[0] for _ in range(2))
    for answer, computed_from in ((first, 0), (second, SHARED)):
        assert_edited_where_asked(ask, answer)
        assert answer.journal is not None
        assert answer.journal.computed_from == computed_from
