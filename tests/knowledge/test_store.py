"""A file of feature knowledge: what goes in comes out, words find features, and no file can do harm."""

from __future__ import annotations

import json
import sqlite3
import threading
import zlib
from pathlib import Path

import pytest

from sae_weights.knowledge import Context, Feature, KnowledgeError, KnowledgeStore, store
from sae_weights.knowledge.layout import MAX_BLOB, STATEMENTS

DIGEST = "ab" * 32
VIOLIN = Feature(
    7,
    "musical instrument: violin, piano",
    "automatic",
    0.0125,
    31.25,
    6.5,
    {"0.5": 5.25, "0.99": 27.5},
    (
        Context((" the", " violin", " played"), (0.0, 8.12, 0.5), 1, "brown"),
        Context(("\n", "🎻"), (0.0, 3.0), 1, "chat"),
    ),
    ((" orchestra", 0.31), (" song", 0.22)),
    ((" tax", -0.3),),
    ((3, 0.62),),
    ("violin", "piano", "cello"),
    ("musical instrument",),
)
FEATURES = [
    VIOLIN,
    Feature(1, '"war"', "automatic", promoted=((" violin", 0.5),)),
    Feature(2, "war, army, soldier", "automatic", words=("war", "army", "soldier")),
    Feature(3, "concert, band", "automatic", words=("concert", "violin")),
    Feature(4, "warm, cold", "automatic", words=("warm", "cold")),
    Feature(5, "naïve café: résumé", "hand"),
    Feature(9, None, None, 0.0),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "features.sqlite"
    meta = {"tokens": 1000, "demo": {"prompt": "Hi", "feature": 7}}
    with KnowledgeStore.create(path, sae_digest=DIGEST, n_features=10, meta=meta) as writer:
        writer.add(FEATURES)
    return path


def found(path: Path, query: str, limit: int = 10) -> list[int]:
    with KnowledgeStore.open(path) as opened:
        return [hit.index for hit in opened.search(query, limit)]


def test_what_is_written_is_read(path: Path) -> None:
    with KnowledgeStore.open(path, sae_digest=DIGEST) as opened:
        assert opened.feature(7) == VIOLIN
        assert opened.feature(9) == Feature(9, density=0.0)
        assert opened.feature(0) == Feature(0)
        assert (opened.n_features, opened.sae_digest) == (10, DIGEST)
        assert opened.meta["demo"] == {"prompt": "Hi", "feature": 7}
        assert opened.labels() == {f.index: f.label for f in FEATURES if f.label is not None}
        assert [f.index for f in opened.listing(6, 10)] == [6, 7, 8, 9]
        assert opened.listing(7, 1)[0].max_activation == 31.25
        with pytest.raises(IndexError, match=r"0\.\.9"):
            opened.feature(10)


def test_numbers_keep_three_digits(tmp_path: Path) -> None:
    feature = Feature(0, quantiles={"0.5": 0.0123456}, contexts=(Context(("a", "b"), (123.456, 0.0), 0, ""),))
    with KnowledgeStore.create(tmp_path / "f", sae_digest=DIGEST, n_features=1, meta={}) as writer:
        writer.add([feature])
    with KnowledgeStore.open(tmp_path / "f") as opened:
        assert opened.feature(0).quantiles == {"0.5": 0.0123}
        assert opened.feature(0).contexts[0].activations == (123.0, 0.0)


def test_a_label_outranks_words_and_words_outrank_promoted_tokens(path: Path) -> None:
    assert found(path, "violin") == [7, 3, 1]


def test_a_whole_word_outranks_a_beginning(path: Path) -> None:
    assert found(path, "war")[-1] == 4
    assert found(path, "solda") == []
    assert found(path, "sold") == [2]


def test_words_are_found_in_other_forms_and_without_accents(path: Path) -> None:
    assert found(path, "soldiers") == [2]
    assert found(path, "Violins") == [7, 3, 1]
    assert found(path, "naive cafe") == [5]


def test_more_of_the_words_is_better_and_the_score_says_how_many(path: Path) -> None:
    with KnowledgeStore.open(path) as opened:
        hits = opened.search("concert band zebra", 10)
        assert [h.index for h in hits] == [3]
        assert hits[0].score == pytest.approx(2 / 3)
        scores = [h.score for h in opened.search("violin concert", 10)]
    assert scores == sorted(scores, reverse=True)
    assert 0 < scores[-1] < scores[0] <= 1


@pytest.mark.parametrize(
    "query",
    [
        "", " ", '"', "'", "*", "violin*", '"violin', "violin AND", "AND", "OR NOT", "NEAR(violin, 2)", "label:war",
        "-violin", "^war", "war - army", "don't", "a" * 5000, "\x00", "violin\x00", "é", "戦争", "🎻", "\ud800",
        "war " * 500, "(", "{label}: war", "%", "_", "\\", ";DROP TABLE feature",
    ],
)  # fmt: skip
def test_any_text_is_a_valid_query(path: Path, query: str) -> None:
    with KnowledgeStore.open(path) as opened:
        assert all(0 < hit.score <= 1 for hit in opened.search(query, 10))


def test_a_query_that_matches_nothing_is_an_empty_list(path: Path) -> None:
    assert found(path, "zebra") == []


def test_new_labels_are_found_and_old_ones_no_longer(path: Path) -> None:
    before = KnowledgeStore.open(path)
    with before.change() as writer:
        assert writer.set_labels([(2, "boxing\nmatch", "hand"), (0, "a new one", "delphi")]) == 2
    assert found(path, "boxing") == [2]
    with KnowledgeStore.open(path) as after:
        assert (after.feature(2).label, after.feature(2).label_source) == ("boxing match", "hand")
        assert after.feature(2).words == ("war", "army", "soldier")
        assert after.feature(0).label == "a new one"
    assert before.feature(2).label == "war, army, soldier"  # the file that was open is untouched
    before.close()


def test_a_failure_leaves_the_file_as_it_was(path: Path) -> None:
    content = path.read_bytes()
    labels = [(1, "good", "hand"), (10, "beyond", "hand")]
    refused = pytest.raises(KnowledgeError, match=r"feature 10; this SAE has 0\.\.9")
    with KnowledgeStore.open(path) as opened, refused, opened.change() as writer:
        writer.set_labels(labels)
    assert path.read_bytes() == content
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_it_is_tied_to_the_dictionary(path: Path) -> None:
    with pytest.raises(KnowledgeError, match=r"abababababab…, not cdcdcdcdcdcd….*--force"):
        KnowledgeStore.open(path, sae_digest="cd" * 32)


def test_threads_share_one_store(path: Path) -> None:
    wrong: list[object] = []
    with KnowledgeStore.open(path) as opened:

        def ask() -> None:
            for _ in range(50):
                if opened.feature(7) != VIOLIN or [h.index for h in opened.search("violin", 5)] != [7, 3, 1]:
                    wrong.append(1)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


# Files that are not what they should be


def spoil(path: Path, *statements: str, values: tuple[object, ...] = ()) -> None:
    db = sqlite3.connect(path)
    for statement in statements:
        db.execute(statement, values)
    db.commit()
    db.close()


def facts(**fields: object) -> bytes:
    return zlib.compress(json.dumps(fields).encode())


@pytest.mark.parametrize("content", [b"", b"{}", b"SQLite format 3\x00" + b"\xff" * 5000, b"\x00" * 4096])
def test_another_kind_of_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "features.sqlite"
    path.write_bytes(content)
    with pytest.raises(KnowledgeError, match=r"features\.sqlite"):
        KnowledgeStore.open(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(KnowledgeError, match=r"none\.sqlite: no such file"):
        KnowledgeStore.open(tmp_path / "none.sqlite")


@pytest.mark.parametrize(
    "statement",
    [
        "PRAGMA application_id=1",
        "PRAGMA user_version=99",
        "DELETE FROM meta",
        "UPDATE meta SET value='{'",
        "UPDATE meta SET value='" + "[" * 100_000 + "'",
        "UPDATE meta SET value='-1' WHERE name='n_features'",
        "UPDATE meta SET value='1e99' WHERE name='n_features'",
        "UPDATE meta SET value=x'00ff'",
        "DROP TABLE meta",
        "CREATE TRIGGER t AFTER INSERT ON meta BEGIN DELETE FROM feature; END",
        "CREATE VIEW more AS SELECT 1",
        "CREATE TABLE more(a)",
    ],
)
def test_a_file_with_something_else_in_it_is_refused(path: Path, statement: str) -> None:
    spoil(path, statement)
    with pytest.raises(KnowledgeError):
        KnowledgeStore.open(path)


def test_a_view_in_the_place_of_a_table_is_refused(path: Path) -> None:
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i AS name, i AS value FROM n"
    spoil(path, "DROP TABLE meta", f"CREATE VIEW meta AS {endless}")
    with pytest.raises(KnowledgeError, match="a view 'meta'"):
        KnowledgeStore.open(path)


def test_a_table_made_otherwise_is_refused(path: Path) -> None:
    spoil(path, "DROP TABLE search", STATEMENTS["search"].replace("porter ", ""))
    with pytest.raises(KnowledgeError, match="a table 'search'"):
        KnowledgeStore.open(path)


HOSTILE = {
    "no blob": 17,
    "text": "facts",
    "no zlib": b"\x00\x01\x02",
    "cut off": facts(words=["a"] * 50)[:-6],
    "bomb": zlib.compress(b" " * (MAX_BLOB + 1), 9),
    "no object": zlib.compress(b"[1]"),
    "deep": zlib.compress(b"[" * 200_000),
    "no UTF-8": zlib.compress(b'{"words": ["\xff"]}'),
    "a neighbour that does not exist": facts(neighbours=[[10, 0.5]]),
    "a neighbour that is true": facts(neighbours=[[True, 0.5]]),
    "weight that is text": facts(promoted=[["a", "b"]]),
    "infinite": zlib.compress(b'{"promoted": [["a", 1e999]]}'),
    "not a number": zlib.compress(b'{"quantiles": {"0.5": NaN}}'),
    "too large a number": zlib.compress(b'{"quantiles": {"0.5": 1' + b"0" * 400 + b"}}"),
    "peak beyond": facts(contexts=[{"tokens": ["a"], "activations": {}, "peak": 1}]),
    "activation beyond": facts(contexts=[{"tokens": ["a"], "activations": {"1": 1}, "peak": 0}]),
    "activation at a word": facts(contexts=[{"tokens": ["a"], "activations": {"²": 1}, "peak": 0}]),
    "empty context": facts(contexts=[{"tokens": [], "activations": {}, "peak": 0}]),
    "tokens that are numbers": facts(contexts=[{"tokens": [1], "activations": {}, "peak": 0}]),
    "very many": facts(words=["a"] * 10_000),
    "very long": facts(words=["a" * 100_000]),
    "a pair of three": facts(promoted=[["a", 1, 2]]),
}


@pytest.mark.parametrize("blob", HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_facts_are_an_error_that_names_file_and_feature(path: Path, blob: object) -> None:
    spoil(path, 'UPDATE feature SET facts=? WHERE "index"=7', values=(blob,))
    with KnowledgeStore.open(path) as opened:
        with pytest.raises(KnowledgeError, match=r"features\.sqlite: feature 7"):
            opened.feature(7)
        assert opened.feature(2).words == ("war", "army", "soldier")


@pytest.mark.parametrize(
    ("statement", "value"),
    [
        ("UPDATE feature SET label=?", b"\xff"),
        ("UPDATE feature SET label=?", "x" * 10_000),
        ("UPDATE feature SET density=?", "dense"),
        ("UPDATE feature SET density=?", float("inf")),
        ("UPDATE feature SET label=CAST(? AS TEXT)", b"\xff\xfe"),
        ('UPDATE feature SET "index"="index" + ?', 1000),
    ],
)
def test_hostile_rows_are_an_error_wherever_they_are_read(path: Path, statement: str, value: object) -> None:
    spoil(path, statement, values=(value,))
    with KnowledgeStore.open(path) as opened, pytest.raises(KnowledgeError):
        assert (opened.labels(), opened.listing(0, 10)) is None


def test_many_features_share_a_dictionary_and_read_the_same(tmp_path: Path) -> None:
    many = [
        Feature(i, f"label {i}", promoted=((f" token{i}", 0.5), (" other", 0.25)), contexts=VIOLIN.contexts)
        for i in range(600)
    ]
    sizes = {}
    for name, count in (("few", 400), ("many", 600)):
        with KnowledgeStore.create(tmp_path / name, sae_digest=DIGEST, n_features=600, meta={}) as writer:
            writer.add(many[:count])
        sizes[name] = sum(len(b) for (b,) in sqlite3.connect(tmp_path / name).execute("SELECT facts FROM feature"))
    assert sizes["many"] / 600 < 0.7 * sizes["few"] / 400
    with KnowledgeStore.open(tmp_path / "many") as opened:
        assert [opened.feature(i) for i in range(600)] == many
        with opened.change() as writer:
            writer.set_labels([(5, "another", "hand")])
    with KnowledgeStore.open(tmp_path / "many") as changed:
        assert changed.feature(5).contexts == VIOLIN.contexts
        assert changed.feature(5).label == "another"


@pytest.mark.parametrize("dictionary", [b"", b"x" * 40_000, "text"])
def test_a_dictionary_that_is_none_is_refused(path: Path, dictionary: object) -> None:
    spoil(path, "INSERT INTO dictionary VALUES (?)", values=(dictionary,))
    with pytest.raises(KnowledgeError, match="the dictionary is not one row"):
        KnowledgeStore.open(path)


def test_a_blob_that_asks_for_another_dictionary_is_an_error(path: Path) -> None:
    stream = zlib.compressobj(9, zdict=b"something else")
    blob = stream.compress(b"{}") + stream.flush()
    spoil(path, 'UPDATE feature SET facts=? WHERE "index"=7', values=(blob,))
    with KnowledgeStore.open(path) as opened, pytest.raises(KnowledgeError, match="feature 7"):
        opened.feature(7)


def test_a_search_index_that_names_other_features_is_an_error(path: Path) -> None:
    spoil(path, "INSERT INTO search(rowid, label) VALUES (4000, 'giraffe')")
    with KnowledgeStore.open(path) as opened, pytest.raises(KnowledgeError, match="3999"):
        opened.search("giraffe", 5)


def test_damaged_pages_are_an_error_never_a_crash(path: Path) -> None:
    whole = path.read_bytes()
    errors = 0
    for place in range(100, len(whole), 701):
        path.write_bytes(whole[:place] + bytes(b ^ 0xFF for b in whole[place : place + 97]) + whole[place + 97 :])
        try:
            with KnowledgeStore.open(path) as opened:
                for index in range(10):
                    opened.feature(index)
                opened.labels()
                opened.search("violin war", 10)
        except KnowledgeError:
            errors += 1
    assert errors > 0


def test_a_query_made_to_be_slow_is_given_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SECONDS", -1.0)
    big = path.with_name("big")
    with KnowledgeStore.create(big, sae_digest=DIGEST, n_features=50_000, meta={}) as writer:
        writer.set_labels((i, f"word{i} common", "hand") for i in range(50_000))
    with KnowledgeStore.open(big) as opened, pytest.raises(KnowledgeError, match="interrupted"):
        opened.labels()
