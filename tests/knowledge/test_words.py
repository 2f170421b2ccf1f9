"""Words out of tokens, and classes of words."""

from __future__ import annotations

from pathlib import Path

import pytest

from sae_weights.knowledge.topics import Topics
from sae_weights.knowledge.words import TokenTexts, Words


class Pieces:
    """A tokenizer whose tokens are these texts; as SentencePiece's, it loses leading spaces when it decodes."""

    all_special_ids = (0,)

    def __init__(self, *pieces: str) -> None:
        self.pieces = ["<s>", *pieces]

    def decode(self, ids: list[int]) -> str:
        return self.pieces[ids[0]].replace("▁", " ").strip(" ")

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.pieces[i] for i in ids]


def words(*pieces: str) -> list[str]:
    tokenizer = Pieces(*pieces)
    read = Words(TokenTexts(tokenizer))
    return [read.texts[w] for w in read.read([tokenizer.pieces.index(p) for p in pieces])]


def test_pieces_of_a_word_belong_to_the_whole_word() -> None:
    assert words("▁viol", "in", "ist", ",", "▁Paris") == ["violinist", "violinist", "violinist", ",", "Paris"]


def test_an_apostrophe_and_a_letter_continue_a_word_and_punctuation_does_not() -> None:
    assert words("▁don", "'t", "'", ".", "5", "th") == ["don't", "don't", "'", ".", "5th", "5th"]


def test_a_special_token_is_a_word_of_its_own() -> None:
    assert words("<s>", "user", "<s>") == ["<s>", "user", "<s>"]


def test_scripts_without_spaces_make_no_endless_words() -> None:
    assert max(len(w) for w in words(*["戦"] * 200)) <= 40


def test_the_leading_space_that_sentencepiece_loses_is_put_back() -> None:
    texts = TokenTexts(Pieces("▁Paris", "ian"))
    assert (texts[1], texts[2]) == (" Paris", "ian")


DATA = """  1 a licence
00000010 03 n 01 entity 0 000 | all there is
00000020 03 n 01 object 0 001 @ 00000010 n 0000 | a thing
00000030 06 n 01 whole 0 001 @ 00000020 n 0000 | an assembly
00000040 06 n 02 musical_instrument 0 instrument 0 001 @ 00000030 n 0000 | plays
00000050 06 n 01 violin 0 001 @ 00000040 n 0000 | bowed
00000060 06 n 01 piano 0 001 @ 00000040 n 0000 | struck
00000070 06 n 01 flute 0 001 @ 00000040 n 0000 | blown
00000080 15 n 01 Paris 0 001 @i 00000020 n 0000 | a city
"""
INDEX = """  1 a licence
flute n 1 1 @ 1 0 00000070
musical_instrument n 1 1 @ 1 1 00000040
paris n 1 1 @i 1 1 00000080
piano n 2 1 @ 2 1 00000060 00000020
violin n 1 1 @ 1 1 00000050
"""


@pytest.fixture
def topics(tmp_path: Path) -> Topics:
    (tmp_path / "data.noun").write_text(DATA)
    (tmp_path / "index.noun").write_text(INDEX)
    for name in ("data.verb", "index.verb"):
        (tmp_path / name).write_text("")
    return Topics.of_wordnet(tmp_path)


def test_a_word_belongs_to_the_classes_above_its_first_sense(topics: Topics) -> None:
    assert topics.classes("violin") == {"musical instrument", "violin"}
    assert topics.classes("Pianos") == {"musical instrument", "piano"}
    assert topics.classes("zebra") == frozenset()


def test_a_name_is_no_common_noun(topics: Topics) -> None:
    assert topics.classes("paris") == frozenset()


def test_a_class_fits_where_it_covers_much_and_is_rare_elsewhere(topics: Topics) -> None:
    topics.calibrate([("violin", 1), ("piano", 1), ("flute", 1), ("the", 997)])
    (best, *_) = topics.fit([("violin", 0.4), ("piano", 0.2), ("flute", 0.1), ("the", 0.3)])
    assert (best.name, best.coverage) == ("musical instrument", pytest.approx(0.7))
    assert best.lift == pytest.approx(0.7 / 0.003)
    assert topics.fit([("violin", 0.4), ("piano", 0.2), ("the", 0.4)]) == []  # two words are no class
    topics.calibrate([("violin", 300), ("piano", 300), ("flute", 300), ("the", 100)])
    assert topics.fit([("violin", 0.4), ("piano", 0.2), ("flute", 0.1), ("the", 0.3)]) == []  # common everywhere
