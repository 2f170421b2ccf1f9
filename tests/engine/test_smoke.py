"""The shortest look at a real engine: one edit."""

from __future__ import annotations

import pytest

from tests.engine.support import Ask, Engine, prompt_of

pytestmark = pytest.mark.engine


def test_an_edit_changes_the_answer_and_says_where(engine: Engine) -> None:
    ask = Ask(prompt_of(0, 40), [{"type": "steer", "sae": "standard/l15", "feature": 3, "strength": 40}])
    plain, edited = engine.run([Ask(ask.prompt), ask], cold=True)
    assert edited.differs(plain) > 0.1
    assert edited.journal is not None
    assert edited.journal.covers(0, 40 + 8 - 1)
    assert edited.journal.stats(0, 15, 10**6).fired == 40 + 8 - 2
