"""Contrast on a real server: it finds what was planted, its numbers are those of /activations, bad bodies are a 4xx."""

from __future__ import annotations

import json
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from editserver.api.evidence import OUTLIER, Seen
from editserver.api.passes import MAX_CONTRAST_TEXTS
from editserver.api.routes_contrast import _pool
from editserver.cli.main import app
from editserver_client import Client
from interventions.fitting.separation import auroc

from .conftest import MODEL, N_FEATURES, RELU, TOPK, Server

engine = pytest.mark.engine

MUSIC = [
    "The violinist tuned her instrument and began the slow movement of the concerto.",
    "He wrote a song for guitar and voice, and the band recorded it in one evening.",
    "The choir sang the hymn while the organ played softly behind them.",
    "A jazz trio with piano, double bass and drums performed at the club last night.",
    "Her new album has ten tracks, and the melody of the first one stays in your head.",
    "The orchestra rehearsed the symphony twice before the conductor was satisfied.",
    "She practised scales on the piano every morning before her music lesson.",
    "The singer forgot the lyrics of the second verse and hummed the tune instead.",
]
FINANCE = [
    "The central bank raised its interest rate by a quarter of a percentage point.",
    "Investors sold shares after the company reported lower quarterly profits.",
    "The fund bought government bonds because their yield had risen above four percent.",
    "He asked the bank for a mortgage and had to show three years of tax returns.",
    "The budget deficit grew as tax revenue fell short of the forecast.",
    "Analysts expect the merger to reduce costs and to increase the dividend.",
    "She moved her savings into an account that pays a higher rate of interest.",
    "The stock market closed lower as traders worried about inflation and debt.",
]
NEW_MUSIC = [
    "The drummer counted in and the guitars came in on the second beat.",
    "They danced while the fiddler played an old tune in a minor key.",
    "The pianist played a nocturne by Chopin as an encore.",
    "A chorus of children sang the last song of the concert.",
    "The composer finished the opera after two years of work.",
    "He bought a trumpet and joined the brass band of his town.",
]
NEW_FINANCE = [
    "The company issued new shares to pay back its loans.",
    "Prices rose faster than wages, so households cut their spending.",
    "The auditor found an error in the balance sheet of the insurer.",
    "A weak currency makes imports more expensive for consumers.",
    "The treasury sold bills with a maturity of six months.",
    "Banks lend less when the cost of borrowing goes up.",
]


def post(http: httpx.Client, sae: str, **body: Any) -> httpx.Response:
    return http.post(f"/v1/saes/{sae}/contrast", json=body)


@pytest.fixture(scope="session")
def bundled(http: httpx.Client) -> str:
    """A bundled SAE of the demo model."""
    return next(sae["id"] for sae in http.get("/v1/saes").json()["data"] if sae["id"].startswith("smollm2-135m/"))


def pooled(http: httpx.Client, sae: str, texts: list[str], n_features: int, pool: str) -> np.ndarray:
    """``[texts, features]`` from /activations."""
    answer = http.post(f"/v1/saes/{sae}/activations", json={"input": texts, "top_k": 128})
    rows = np.zeros((len(texts), n_features))
    for row, entry in zip(rows, answer.json()["data"], strict=True):
        tokens = np.zeros((len(entry["tokens"]), n_features))
        for i, token in enumerate(entry["tokens"]):
            for feature in token["features"]:
                tokens[i, feature["index"]] = feature["activation"]
        row[:] = tokens.max(axis=0) if pool == "max" else tokens.mean(axis=0)
    return rows


@engine
def test_contrast_finds_features_that_also_separate_texts_it_never_saw(http: httpx.Client, bundled: str) -> None:
    answer = post(http, bundled, positive=MUSIC, negative=FINANCE).json()
    assert answer["score_name"] == "difference_of_means"
    data = answer["data"]
    assert len(data) == 10
    assert [item["score"] for item in data] == sorted((item["score"] for item in data), reverse=True)
    best = data[0]
    assert best["auroc"] >= 0.9
    low, high = best["auroc_interval"]
    assert 0.5 < low <= best["auroc"] <= high <= 1.0
    assert best["mean_positive"] > 2 * best["mean_negative"]
    assert 0 < best["density"] <= 0.5
    n_features = http.get(f"/v1/saes/{bundled}").json()["n_features"]
    new = [pooled(http, bundled, texts, n_features, "max")[:, best["index"]] for texts in (NEW_MUSIC, NEW_FINANCE)]
    assert auroc(*new).value >= 0.9


@engine
def test_exchanged_sides_find_other_features_with_mirrored_numbers(http: httpx.Client) -> None:
    one = post(http, RELU, positive=MUSIC, negative=FINANCE, limit=1000, max_density=1.0).json()["data"]
    other = post(http, RELU, positive=FINANCE, negative=MUSIC, limit=1000, max_density=1.0).json()["data"]
    assert one[0]["index"] != other[0]["index"]
    mirrored = {item["index"]: item for item in other}
    for item in one[:5]:
        assert mirrored[item["index"]]["score"] == pytest.approx(-item["score"], abs=0.05)
        assert mirrored[item["index"]]["auroc"] == pytest.approx(1 - item["auroc"], abs=0.05)


@engine
@pytest.mark.parametrize("pool", ["max", "mean"])
def test_scores_are_those_of_the_activations_of_the_same_texts(http: httpx.Client, pool: str) -> None:
    answer = post(http, RELU, positive=MUSIC, negative=FINANCE, pool=pool, limit=1000, max_density=1.0).json()
    rows = pooled(http, RELU, MUSIC + FINANCE, N_FEATURES, pool)
    positive, negative = rows[: len(MUSIC)], rows[len(MUSIC) :]
    silent = set(range(N_FEATURES)) - {item["index"] for item in answer["data"]}
    assert len(silent) < 10
    assert np.abs(rows[:, sorted(silent)]).max(initial=0) < 0.5  # rounding may decide whether a latent is just on
    assert answer["truncated_tokens"] == 0  # all 128 latents are reported
    known = {3: 7.0}  # what features.* beside the probe says of its largest activation
    for item in answer["data"]:
        i = item["index"]
        # bfloat16 on two runs: activations of about 10 with a rounding error of about 0.05.
        assert item["mean_positive"] == pytest.approx(positive[:, i].mean(), rel=0.02, abs=0.05)
        assert item["mean_negative"] == pytest.approx(negative[:, i].mean(), rel=0.02, abs=0.05)
        unit = max(known.get(i, 0.0), np.abs(rows[:, i]).max())
        score = (positive[:, i].mean() - negative[:, i].mean()) / unit
        assert item["score"] == pytest.approx(score, abs=0.02)
        exact = auroc(positive[:, i], negative[:, i])
        least, most = (auroc(positive[:, i] + rounding, negative[:, i]).value for rounding in (-0.5, 0.5))
        assert least <= item["auroc"] <= most
        assert item["auroc_interval"] == pytest.approx([exact.low, exact.high], abs=0.15)


@engine
def test_tokens_with_norms_beyond_ten_medians_are_no_evidence(http: httpx.Client, bundled: str) -> None:
    from transformers import AutoModelForCausalLM

    from editserver.demo.model import ensure_demo_model

    texts = ["\n\nMicrosoft announced a new device.", "The\nThe cat sat on the mat.", *MUSIC[:2]]
    model = AutoModelForCausalLM.from_pretrained(ensure_demo_model(), dtype=torch.bfloat16)
    layer = http.get(f"/v1/saes/{bundled}").json()["layer"]
    norms, counted = [], 0
    for text in texts:
        ids = http.post("/tokenize", json={"model": MODEL, "prompt": text}).json()["tokens"]
        with torch.no_grad():
            hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1][0]
        norms += hidden.float().norm(dim=1)[1:].tolist()
        counted += len(ids) - 1
    median = float(np.median(norms))
    outliers = sum(norm > OUTLIER * median for norm in norms)
    answer = post(http, bundled, positive=texts[:2], negative=texts[2:]).json()
    assert answer["outlier_tokens"] == outliers
    assert answer["tokens"] == counted - outliers


@engine
def test_chats_are_read_after_the_template(http: httpx.Client, bundled: str) -> None:
    chats = [[{"role": "user", "content": text}] for text in (*MUSIC[:4], *FINANCE[:4])]
    answer = post(http, bundled, positive=chats[:4], negative=[*chats[4:], "and a text"], limit=3).json()
    assert len(answer["data"]) == 3
    lengths = [len(http.post("/tokenize", json={"model": MODEL, "messages": chat}).json()["tokens"]) for chat in chats]
    assert answer["tokens"] + answer["outlier_tokens"] > sum(lengths) - len(chats)


@engine
def test_dense_features_are_left_out_unless_asked_for(http: httpx.Client) -> None:
    few = post(http, RELU, positive=MUSIC, negative=FINANCE, limit=1000, max_density=0.3).json()["data"]
    every = post(http, RELU, positive=MUSIC, negative=FINANCE, limit=1000, max_density=1.0).json()["data"]
    assert {item["index"] for item in few} == {item["index"] for item in every if item["density"] <= 0.3}
    assert next(item for item in every if item["index"] == 3)["density"] == 0.5  # known beats measured


@engine
def test_a_dictionary_whose_members_are_relative_is_read_as_well(http: httpx.Client) -> None:
    answer = post(http, TOPK, positive=MUSIC, negative=FINANCE, max_density=1.0).json()
    assert answer["truncated_tokens"] == 0
    assert answer["data"][0]["score"] > 0


@engine
@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "invalid_inspection", "positive"),
        ({"positive": ["a b"]}, "invalid_inspection", "negative"),
        ({"positive": [], "negative": ["a b"]}, "invalid_inspection", "positive"),
        ({"positive": ["a b"], "negative": []}, "invalid_inspection", "negative"),
        ({"positive": "a b", "negative": ["a b"]}, "invalid_inspection", "positive"),
        ({"positive": ["a b", 3], "negative": ["a b"]}, "invalid_inspection", "positive[1]"),
        ({"positive": [[]], "negative": ["a b"]}, "invalid_inspection", "positive[0]"),
        ({"positive": [["a b"]], "negative": ["a b"]}, "invalid_inspection", "positive[0]"),
        ({"positive": ["a b"], "negative": [[{"no": "role"}]]}, "invalid_inspection", "negative[0]"),
        ({"positive": ["a b"], "negative": ["a b", ""]}, "invalid_inspection", "negative[1]"),
        ({"positive": ["word " * 1100], "negative": ["a b"]}, "invalid_inspection", "positive[0]"),
        ({"positive": ["a"], "negative": ["a b"]}, "invalid_inspection", "positive[0]"),
        ({"positive": ["a b"], "negative": ["a b"], "limit": 0}, "invalid_inspection", "limit"),
        ({"positive": ["a b"], "negative": ["a b"], "limit": 10**30}, "invalid_inspection", "limit"),
        ({"positive": ["a b"], "negative": ["a b"], "pool": "median"}, "invalid_inspection", "pool"),
        ({"positive": ["a b"], "negative": ["a b"], "max_density": 0}, "invalid_inspection", "max_density"),
        ({"positive": ["a b"], "negative": ["a b"], "max_density": float("nan")}, "invalid_inspection", "max_density"),
        ({"positive": ["a b"], "negative": ["a b"], "postive": ["a b"]}, "invalid_inspection", "postive"),
        ({"positive": ["a b"] * (MAX_CONTRAST_TEXTS + 1), "negative": ["a b"]}, "limit_exceeded", "positive"),
    ],
)
def test_a_bad_body_is_refused_by_its_field(http: httpx.Client, body: Any, code: str, param: str) -> None:
    answer = http.post(f"/v1/saes/{RELU}/contrast", content=json.dumps(body))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param), error


@engine
def test_an_unknown_sae_is_404_and_other_methods_are_not_there(http: httpx.Client) -> None:
    answer = post(http, "nope/l15", positive=["a b"], negative=["c d"])
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_sae")
    assert http.get(f"/v1/saes/{RELU}/contrast").status_code in (404, 405)


WORDS = st.text(max_size=20)
CHAT = st.lists(st.dictionaries(st.sampled_from(["role", "content", "x"]), WORDS | st.none(), max_size=3), max_size=2)
SIDE = st.lists(WORDS | CHAT | st.integers() | st.none(), max_size=3) | WORDS | st.none()


@engine
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    positive=SIDE,
    negative=SIDE,
    other=st.dictionaries(
        st.sampled_from(["limit", "pool", "max_density", "x"]),
        st.integers() | st.floats() | WORDS | st.none(),
        max_size=2,
    ),
)
def test_any_json_is_either_answered_or_a_4xx(http: httpx.Client, positive: Any, negative: Any, other: Any) -> None:
    content = json.dumps({"positive": positive, "negative": negative} | other)
    answer = http.post(f"/v1/saes/{RELU}/contrast", content=content)
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, (content, answer.text)
    if answer.status_code != 200:
        assert isinstance(answer.json()["error"]["code"], str)


@engine
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"3", b"[" * 100_000])
def test_a_body_that_is_no_object_is_a_400(http: httpx.Client, content: bytes) -> None:
    assert http.post(f"/v1/saes/{RELU}/contrast", content=content).status_code == 400


@engine
def test_limits_and_schema_are_published(http: httpx.Client) -> None:
    assert http.get("/v1/capabilities").json()["limits"]["contrast_texts"] == MAX_CONTRAST_TEXTS
    route = http.get("/openapi.json").json()["paths"]["/v1/saes/{sae_id}/contrast"]["post"]
    schema = route["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["properties"]) == {"positive", "negative", "limit", "pool", "max_density"}
    assert schema["required"] == ["positive", "negative"]


@engine
def test_the_client_and_the_command_line_ask_the_same(server: Server, tmp_path: Any) -> None:
    with Client(server.url) as client:
        answer = client.contrast(RELU, MUSIC, FINANCE, limit=3, max_density=1.0)
    assert answer.data[0].auroc_interval is not None
    files = []
    for name, texts in (("music.txt", MUSIC), ("finance.txt", FINANCE)):
        files.append(tmp_path / name)
        files[-1].write_text("\n".join(texts), encoding="utf-8")
    arguments = ["features", "contrast", "--sae", RELU, "--positive", str(files[0]), "--negative", str(files[1])]
    arguments += ["--limit", "3", "--max-density", "1", "--url", server.url]
    listed = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)["data"]
    assert [item["index"] for item in listed] == [item.index for item in answer.data]
    table = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})
    assert table.exit_code == 0
    assert "8 positive against 8 negative" in table.output
    refused = CliRunner().invoke(app, [*arguments, "--pool", "median"], env={"COLUMNS": "160"})
    assert refused.exit_code == 2
    assert "pool" in refused.output


# pooling, without an engine --------------------------------------------------------------------------------------------


def seen(tokens: list[dict[int, float]]) -> Seen:
    pairs = [(t, i, value) for t, token in enumerate(tokens) for i, value in token.items()]
    at, features, values = (np.array(column) for column in zip(*pairs, strict=True))
    return Seen(at, features, values.astype(float), np.ones(len(tokens)), np.array([len(token) for token in tokens]))


def test_pooling_counts_silent_tokens_as_zero_and_leaves_out_what_is_not_kept() -> None:
    text = seen([{5: 2.0, 7: -1.0}, {5: 4.0}, {5: 100.0, 9: 100.0}])
    kept, columns = np.array([True, True, False]), np.array([5, 7, 9])
    largest, counts = _pool(text, kept, columns, "max")
    assert largest.tolist() == [4.0, 0.0, 0.0]  # −1 on one token, 0 on the other
    assert counts.tolist() == [2, 1, 0]
    mean, _ = _pool(text, kept, columns, "mean")
    assert mean.tolist() == [3.0, -0.5, 0.0]


def test_a_signed_feature_that_is_negative_on_every_token_pools_to_its_largest() -> None:
    largest, _ = _pool(seen([{7: -3.0}, {7: -1.0}]), np.array([True, True]), np.array([7]), "max")
    assert largest.tolist() == [-1.0]
