"""The page about architectures and formats says what the registries say."""

from __future__ import annotations

import pytest

from sae_weights.architectures import ARCHITECTURES
from sae_weights.coverage import EXACT_BY_FULL_ENCODE, EXACT_BY_ROW, READ_ONLY, REFUSED, status
from sae_weights.formats import FORMATS
from tools.sae_tables import PAGE, rendered


def test_the_tables_of_the_page_are_made_from_the_registries():
    page = PAGE.read_text(encoding="utf-8")
    assert rendered(page) == page, "run python -m tools.sae_tables"


def test_every_format_holds_known_architectures_and_every_architecture_has_a_format():
    for one in FORMATS:
        assert one.architectures, one.name
        assert set(one.architectures) <= ARCHITECTURES.keys(), one.name
    held = {name for one in FORMATS for name in one.architectures}
    assert held == ARCHITECTURES.keys()


@pytest.mark.parametrize(
    ("architecture", "format", "expected"),
    [
        ("jumprelu", "editserver", EXACT_BY_ROW),
        ("jumprelu", "saelens", EXACT_BY_ROW),
        ("topk", "saelens", EXACT_BY_FULL_ENCODE),
        ("temporal", "saelens", REFUSED),
        ("jumprelu", "gemma_scope", EXACT_BY_ROW),
        ("relu", "circuit_tracer", READ_ONLY),
        ("itda", "gemma_scope", None),
    ],
)
def test_the_table_tells_row_full_encode_read_and_refused_apart(architecture, format, expected):
    found = next(one for one in FORMATS if one.name == format)
    assert status(ARCHITECTURES[architecture], found) == expected
