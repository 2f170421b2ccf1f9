"""What is known about features, over HTTP: lists, search, one feature, and labels in readings."""

from __future__ import annotations

import threading
from collections.abc import Callable

import httpx
import pytest

from .conftest import N_FEATURES, RELU, TOPK

pytestmark = pytest.mark.engine

FEATURES = f"/v1/saes/{RELU}/features"


def search(http: httpx.Client, query: str, sae: str = RELU, **params: int) -> list[dict[str, object]]:
    answer = http.get(f"/v1/saes/{sae}/features", params={"q": query, **params})
    assert answer.status_code == 200, answer.text
    assert answer.json()["object"] == "list"
    return list(answer.json()["data"])


def test_one_feature_shows_everything_that_is_known(http: httpx.Client) -> None:
    assert http.get(f"{FEATURES}/3").json() == {
        "index": 3,
        "label": "a probe direction",
        "label_source": "hand",
        "density": 0.5,
        "max_activation": 7.0,
        "mean_activation": 2.5,
        "quantiles": {"0.5": 2.0, "0.9": 5.0},
        "contexts": [
            {"tokens": [" of", " the", " probe"], "activations": [0.0, 1.5, 7.0], "peak": 2, "source": "brown"}
        ],
        "promoted": [{"token": " satellite", "weight": 0.5}],
        "suppressed": [{"token": " the", "weight": -0.25}],
        "neighbours": [
            {"index": 5, "label": 'C++\'s "operator*" AND others', "cosine": 0.75},
            {"index": 4, "label": None, "cosine": 0.5},
        ],
    }


def test_what_is_not_known_is_null_and_what_is_known_to_be_nothing_is_empty(http: httpx.Client) -> None:
    unlabelled = http.get(f"{FEATURES}/4").json()
    assert (unlabelled["label"], unlabelled["density"], unlabelled["contexts"]) == (None, 0.25, [])
    unknown = http.get(f"/v1/saes/{TOPK}/features/4").json()  # no file lies beside this dictionary
    assert unknown == dict.fromkeys(unknown) | {"index": 4}
    assert set(unknown) == set(unlabelled)


@pytest.mark.parametrize(
    "query", ["probe", "PROBES", "dir", "sonde", "spacecraft", "satellite", "the probe's direction"]
)
def test_search_finds_a_feature_by_its_label_its_words_and_what_it_promotes(http: httpx.Client, query: str) -> None:
    found = search(http, query)
    assert found[0]["index"] == 3
    assert set(found[0]) == {"index", "label", "density", "max_activation", "score"}
    scores = [entry["score"] for entry in found]
    assert all(isinstance(score, float) and 0 < score <= 1 for score in scores)
    assert scores == sorted(scores, reverse=True)


def test_search_that_finds_nothing_is_an_empty_list(http: httpx.Client) -> None:
    assert search(http, "zebra") == []
    assert search(http, "probe", sae=TOPK) == []


@pytest.mark.parametrize(
    "query",
    [
        "-",
        "a-b",
        '"',
        "'",
        "*",
        "AND",
        "OR probe",
        "NOT",
        "NEAR(",
        "label:probe",
        "probe\x00",
        "é",
        "戦",
        "🎻",
        "%00",
        "(",
        "\\",
        "x" * 1000,
    ],
)
def test_any_text_can_be_searched_for(http: httpx.Client, query: str) -> None:
    search(http, query)


def test_odd_labels_are_found_by_their_words(http: httpx.Client) -> None:
    for query in ("operator*", '"operator', "C++ AND operator", "and others"):
        assert search(http, query)[0]["index"] == 5, query


def test_lists_are_by_index_and_limits_hold(http: httpx.Client) -> None:
    listed = http.get(FEATURES, params={"limit": 6}).json()["data"]
    assert [entry["index"] for entry in listed] == list(range(6))
    assert [entry["label"] is None for entry in listed] == [True, True, True, False, True, False]
    assert len(http.get(FEATURES, params={"limit": 1000}).json()["data"]) == N_FEATURES
    assert len(search(http, "probe operator", limit=1)) == 1
    for params in ({"limit": 0}, {"limit": 1001}, {"limit": "x"}, {"q": "x" * 1001}):
        answer = http.get(FEATURES, params=params)
        assert answer.status_code == 400, params
        assert answer.json()["error"]["message"]


def test_readings_carry_the_labels(chat: Callable[..., httpx.Response]) -> None:
    tokens = chat(inspect={"sae": RELU, "features": [3, 4]}).json()["inspection"]["tokens"]
    for token in tokens:
        by_index = {feature["index"]: feature for feature in token["features"]}
        assert by_index[3]["label"] == "a probe direction"
        assert "label" not in by_index[4]


def test_many_searches_at_once_all_answer(http: httpx.Client) -> None:
    answers: list[object] = []
    threads = [threading.Thread(target=lambda: answers.append(search(http, "probe direction"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 8
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize("index", ["-1", str(N_FEATURES), "1.0", "%20", "٣", "9" * 400, "3%2F"])
def test_a_feature_that_does_not_exist_is_404(http: httpx.Client, index: str) -> None:
    answer = http.get(f"{FEATURES}/{index}")
    assert answer.status_code == 404
    assert answer.json()["error"]["message"]
