"""Concepts fitted on a real server: from labelled texts to a suppression, by HTTP, by the clients and by the command."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from editserver.api.concept_labels import Labelling, Marked
from editserver.api.passes import MAX_FIT_CLASSES, MAX_FIT_TEXTS, MAX_FIT_TOKENS, Prompt
from editserver.api.routes_concepts import _dictionary
from editserver.catalogue import ServedSAE
from editserver.cli.main import app
from editserver.demo.model import ensure_demo_model
from editserver_client import AsyncClient, BadRequest, Client, JobFailed, JobStatus, NotFound, Suppress
from interventions.concepts.detector import detector_from_dict
from interventions.errors import InterventionError
from sae_weights.hook import Hook
from sae_weights.sae import SAE

from .conftest import D_MODEL, MODEL, Server
from .test_contrast import FINANCE, MUSIC, NEW_FINANCE, NEW_MUSIC

pytestmark = pytest.mark.engine

L15 = "smollm2-135m/l15"
ORDINARY = [
    "The train leaves at noon and arrives before dark.",
    "Rain fell on the hills all night, and the river rose.",
    "Add two cups of flour and stir until the dough is smooth.",
    "Penguins are birds that swim well but cannot fly.",
]
CLASSES = {"music": MUSIC, "finance": FINANCE}
BODY: dict[str, Any] = {"name": "music", "sae": L15, "concepts": CLASSES, "target": "music", "top": 20}
QUICK: dict[str, Any] = BODY | {"concepts": {"music": MUSIC[:3], "finance": FINANCE[:3]}, "held_out": 0}
Post = Callable[..., httpx.Response]


def start(http: httpx.Client, body: dict[str, Any]) -> str:
    answer = http.post("/v1/concepts/fit", json=body)
    assert answer.status_code == 202, answer.text
    assert set(answer.json()) == {"job"}
    return str(answer.json()["job"])


def wait(http: httpx.Client, job: str, timeout: float = 60) -> list[dict[str, Any]]:
    """Everything that the job said, the last time as finished."""
    told = []
    deadline = time.monotonic() + timeout
    while not told or told[-1]["state"] in ("queued", "running"):
        assert time.monotonic() < deadline, told[-1]
        told.append(http.get(f"/v1/jobs/{job}").json())
        time.sleep(0.05)
    return told


def fit(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    """The result of a fit."""
    last = wait(http, start(http, QUICK | fields))[-1]
    assert last["state"] == "succeeded", last
    result: dict[str, Any] = last["result"]
    return result


@pytest.fixture(scope="module")
def fitted(http: httpx.Client) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One fit with its report: what the job said on the way, and its result."""
    told = wait(http, start(http, BODY | {"background": ORDINARY, "strengths": [1, 3]}))
    assert told[-1]["state"] == "succeeded", told[-1]
    return told, told[-1]["result"]


def test_the_job_says_how_far_it_is_and_ends_with_everything_done(fitted: Any) -> None:
    told, _ = fitted
    done = [one["progress"]["done"] for one in told]
    assert done == sorted(done)
    assert len(set(done)) > 3
    texts, held_out = 20, 2 + 2 + 1
    assert {one["progress"]["total"] for one in told} == {texts + 5 * held_out}
    assert done[-1] == texts + 5 * held_out
    stages = {one["progress"]["stage"].split()[0] for one in told}
    assert {"reading", "measuring", "done"} <= stages
    assert all("result" not in one and "error" not in one for one in told[:-1])


def test_the_report_says_what_was_fitted_and_finds_features_about_music(http: httpx.Client, fitted: Any) -> None:
    _, result = fitted
    report = result["report"]
    assert report["classes"]["music"] | {"tokens": 0} == {"texts": 8, "held_out": 2, "tokens": 0}
    assert list(report["classes"]) == ["music", "finance", "background"]
    assert (report["target"], report["background"], report["sae"], report["layer"]) == ("music", "background", L15, 15)
    features = report["features"]
    assert len(features) == 20
    scores = [one["score"] for one in features]
    assert scores == sorted(scores, reverse=True)
    assert "music" in features[0]["label"]
    for one in features:
        assert 0 < one["separability"] <= 1
        assert set(one["rates"]) == set(report["classes"])
        assert one["rates"]["background"] <= report["max_rate"]
    assert 0 < report["layer_score"] < report["active_score"] < features[0]["separability"]
    assert all(one["rate"] > report["max_rate"] for one in report["dense"]["features"])
    # The same texts by /contrast: what separates them best there is among the latents of the concept.
    contrast = http.post(f"/v1/saes/{L15}/contrast", json={"positive": MUSIC, "negative": FINANCE, "limit": 1}).json()
    assert contrast["data"][0]["index"] in {one["index"] for one in features}


def test_the_report_measures_removal_and_cost_on_held_out_texts(fitted: Any) -> None:
    _, result = fitted
    held_out = result["report"]["held_out"]
    assert held_out["readout"] | {"columns": 0} == {
        "sae": "smollm2-135m/l20",
        "layer": 20,
        "after_edit_at_same_layer": False,
        "columns": 0,
    }
    points = {(point["method"], point["strength"]): point for point in held_out["points"]}
    assert list(points) == [("app", 1), ("app", 3), ("attenuate", 0.5), ("range", 1), ("mask", 1)]
    plain = held_out["perplexity"]
    assert set(plain) == {"target", "other", "background"}
    assert held_out["accuracy"]["target"] > 0
    for point in points.values():
        for name, (before, after) in point["perplexity"].items():
            assert before == plain[name]
            assert after != before
            assert point["perplexity_increase"][name] == pytest.approx(after / before - 1)
        assert point["removal"] == pytest.approx(point["before"]["target"] - point["after"]["target"])
    for name in plain:
        assert points["mask", 1]["attenuated"][name] == pytest.approx(1, abs=1e-6)
        assert points["attenuate", 0.5]["attenuated"][name] == pytest.approx(0.5, abs=1e-6)
        assert points["app", 3]["attenuated"][name] == pytest.approx(3 * points["app", 1]["attenuated"][name], rel=1e-4)
    increase = {name: point["perplexity_increase"]["target"] for name, point in points.items()}
    assert increase["app", 3] > increase["app", 1]


def test_perplexity_is_that_of_an_ordinary_request_with_the_same_edit(http: httpx.Client, fitted: Any) -> None:
    """Two of the three texts are held out; which two is not told."""
    result = fit(http, held_out=0.999, strengths=[2], name="half")
    points = result["report"]["held_out"]["points"]
    # The plain side has an edit that rounds away: bfloat16 rounds once more where any edit passes.
    nothing = {"type": "steer", "values": [1.0] + [0.0] * (D_MODEL - 1), "layer": 15, "strength": 1e-6}
    for column, edit in enumerate((nothing, {"type": "suppress", "concept": "half", "strength": 2})):
        texts = []
        for text in MUSIC[:3]:  # one at a time, as the fit reads them: logits of bfloat16 differ with the batch
            body = {"model": MODEL, "prompt": text, "max_tokens": 1, "prompt_logprobs": 0, "interventions": [edit]}
            (choice,) = http.post("/v1/completions", json=body).json()["choices"]
            texts.append([next(iter(one.values()))["logprob"] for one in choice["prompt_logprobs"] if one])
        pairs = [[*texts[i], *texts[j]] for i, j in ((0, 1), (0, 2), (1, 2))]
        expected = [math.exp(-sum(pair) / len(pair)) for pair in pairs]
        assert points[0]["perplexity"]["target"][column] in [pytest.approx(one, rel=1e-3) for one in expected]


def test_the_fitted_concept_is_in_the_library_and_takes_music_away(http: httpx.Client, chat: Post, fitted: Any) -> None:
    _, result = fitted
    listing = result["concept"]
    assert (listing["name"], listing["kind"]) == ("music", "concept")
    body = http.get("/v1/library/concepts/music").json()["body"]
    assert body["target"] == "music"
    notes = body["fitted_on"]
    assert (notes["sae"], notes["settings"]["top"], notes["settings"]["seed"]) == (L15, 20, 0)
    assert notes["classes"]["music"]["texts"] == 8
    assert notes["classes"]["music"]["fitted"] == 6
    assert len(notes["classes"]["music"]["sha256"]) == 64
    dose = {}
    for text in (MUSIC[3], FINANCE[3]):
        answer = http.post(
            "/v1/completions",
            json={
                "model": MODEL,
                "prompt": text,
                "max_tokens": 1,
                "interventions": [{"type": "suppress", "concept": "music"}],
            },
        ).json()
        (entry,) = answer["interventions"]["receipt"]
        dose[text] = entry["fired"] * entry["dose_mean"]
    assert dose[MUSIC[3]] > 2 * dose[FINANCE[3]]


def test_the_fitted_concept_is_a_proposition_and_rules_decide_as_its_detector(http: httpx.Client, fitted: Any) -> None:
    """Readings, detector and the rules of the engine agree: token by token, score by score, and of whole prompts."""
    _, result = fitted
    report = result["report"]["detector"]
    shown = http.get("/v1/library/concepts/music").json()
    detector = detector_from_dict(shown["body"]["detector"])
    assert shown["detector"] == shown["body"]["detector"] | {"sae": L15, "expressions": report["expressions"]}
    assert detector.as_dict() == report["definition"]
    assert {one["index"] for one in report["latents"]} == set(detector.features())
    stored = http.put("/v1/library/concepts/music-again", json=shown["body"]).json()
    assert stored["digest"] == result["concept"]["digest"]
    words = report["expressions"]
    rules = f"rule: {words['token']} -> here\nrule: {words['text']} -> present\non here: flag\non present: flag"
    reads = {"sae": L15, "features": list(detector.features())}
    told = set()
    for text in (*NEW_MUSIC[:3], *NEW_FINANCE[:3]):
        body = {"model": MODEL, "prompt": text, "max_tokens": 1, "inspect": reads}
        answer = http.post("/v1/completions", json=body | {"interventions": [{"type": "rules", "text": rules}]}).json()
        tokens = answer["inspection"]["tokens"]
        values = [[one["activation"] for one in token["features"]] for token in tokens]
        order = [one["index"] for one in tokens[0]["features"]]
        readings = dict(zip(order, np.array(values, np.float32).T, strict=True))
        scores = detector.scores(readings)
        (entry,) = answer["interventions"]["receipt"]
        held = {one["name"]: one for one in entry["propositions"]}
        expected = [tokens[i]["position"] for i in np.flatnonzero(detector.tokens(scores))]
        found = held.get("music", {"positions": [], "scores": []})
        assert found["positions"] == expected
        np.testing.assert_allclose(found["scores"], scores[detector.tokens(scores)], rtol=1e-5)
        present = any(one["conclusion"] == "present" for one in entry["fired"])
        assert present == detector.holds(scores)
        told.add((text in NEW_MUSIC, present))
    assert {(True, True), (False, False)} <= told


def test_the_report_judges_the_detector_on_held_out_texts_beside_a_dense_probe(fitted: Any) -> None:
    _, result = fitted
    report = result["report"]["detector"]
    assert (report["asked"], report["labels"], report["folds"]) == ("auto", "sentence", 5)
    assert set(report["trials"]) == {"single", "multi", "relation"}
    chosen = report["trials"][report["kind"]]["text"]
    assert max(chosen.values()) == max(value for one in report["trials"].values() for value in one["text"].values())
    for key, positives, negatives in (("cross_validated", 6, 6 + 3), ("held_out", 2, 2 + 1)):
        texts = report[key]["text"]
        assert (texts["detector"]["positives"], texts["detector"]["negatives"]) == (positives, negatives)
        for level in ("token", "text"):
            for name in ("detector", "dense"):
                one = report[key][level][name]
                assert 0 <= one["low"] <= one["balanced_accuracy"] <= one["high"] <= 1
                assert one["balanced_accuracy"] == pytest.approx((one["recall"] + one["specificity"]) / 2)
    for level, told in report["against_dense"].items():
        pair = report["held_out"][level]
        gap = pair["dense"]["balanced_accuracy"] - pair["detector"]["balanced_accuracy"]
        assert told["difference"] == pytest.approx(gap)
        assert "the dense probe" in told["says"]
    assert report["cross_validated"]["token"]["dense"]["balanced_accuracy"] > 0.6  # it reads the stream itself
    sure = (
        report["held_out"]["text"]["detector"]["low"] > 0.5
        and report["cross_validated"]["text"]["detector"]["low"] > 0.5
    )
    assert (report["doubt"] is None) == sure


def test_words_and_places_are_labelled_and_the_rest_is_a_class_of_its_own(http: httpx.Client) -> None:
    texts = [f"The {word} stood in the corner of the room all day." for word in ("old piano", "big piano", "piano")]
    by_word = fit(http, name="piano", concepts={"piano": texts}, target="piano", labels="word", words=["Piano"])
    marked = [{"text": text, "spans": [[text.index("piano"), text.index("piano") + 5]]} for text in texts]
    places = {"piano": marked}
    by_place = fit(http, name="there", concepts=places, target="piano", labels="position", span_tokens="last")
    report = by_word["report"]
    assert list(report["classes"]) == ["piano", "unlabelled"]
    assert report["classes"]["piano"] == {"texts": 3, "held_out": 0, "tokens": 3}
    assert report["held_out"] is None
    assert report["features"] == by_place["report"]["features"]
    detector = report["detector"]
    assert detector["definition"] == by_place["report"]["detector"]["definition"]
    assert detector["expressions"] == {"token": "piano"}  # no text without a piano was given
    assert detector["tokens"]["labelled"] == 3
    assert detector["cross_validated"]["token"]["detector"]["balanced_accuracy"] > 0.9
    off = fit(http, name="plain", detector=None)
    assert off["report"]["detector"] is None
    assert "detector" not in http.get("/v1/library/concepts/plain").json()["body"]


def test_labels_find_words_and_spans_in_tokens() -> None:
    """1: labelled, -1: part of a labelled word whose last token stands for it, 0: not."""
    tokenizer = AutoTokenizer.from_pretrained(ensure_demo_model())

    def labels(text: str, labelling: Labelling, most: int = 99, **places: Any) -> dict[str, int]:
        ids = tokenizer(text)["input_ids"][:most]
        prompt = Prompt({}, ids, "x")
        found = labelling.of(tokenizer, prompt, Marked(text, **places))
        assert len(found) == len(ids) - 1
        pieces = [tokenizer.decode([one]) for one in ids[1:]]
        return {f"{i}{piece}": int(one) for i, (piece, one) in enumerate(zip(pieces, found, strict=True)) if one}

    words = Labelling("word", ("oboist", "New  York"), "last")
    text = "Oboists meet an OBOIST and the oboist's friend, new York-born; newyork"
    found = labels(text, words)
    assert [text for text, one in found.items() if one == 1 and "York" in text] == ["16 York"]
    assert sum(one == 1 for one in found.values()) == 3  # not Oboists, not newyork
    everything = labels(text, replace(words, part="all"))
    assert set(everything) == set(found)
    assert set(everything.values()) == {1}
    assert labels("Now the café is café, not cafés", Labelling("word", ("CAFÉ",)), 99)  # characters, not bytes
    spans = Labelling("position")
    assert labels("He plays it", spans, spans=((3, 8),)) == {"0 plays": 1}
    assert labels("He plays it", spans, positions=(2, 77)) == {"1 it": 1}
    for given, labelling in (
        ("The zebra", words),
        ("The zebra", Labelling("word", ("the",))),
        ("He saw New York", words),
    ):
        with pytest.raises(InterventionError, match="none of the words occurs after the first token"):
            labels(given, labelling, 3 if "York" in given else 99)


def test_equal_texts_give_an_equal_digest_and_other_settings_another(http: httpx.Client) -> None:
    base = fit(http)["concept"]
    assert fit(http)["concept"] == base  # the same version, too
    digests = {base["digest"]}
    for change in ({"by": "separability"}, {"max_rate": None}, {"priors": {"music": 3, "finance": 1}}):
        digests.add(fit(http, **change)["concept"]["digest"])
    assert len(digests) == 4


def test_rates_and_means_are_those_of_the_activations_of_the_same_tokens(http: httpx.Client) -> None:
    report = fit(http)["report"]
    best = report["features"][0]
    for name, texts in QUICK["concepts"].items():
        body = {"input": texts, "features": [best["index"]]}
        data = http.post(f"/v1/saes/{L15}/activations", json=body).json()["data"]
        values = [token["features"][0]["activation"] for one in data for token in one["tokens"]]
        assert report["classes"][name] == {
            "texts": 3,
            "held_out": 0,
            "tokens": len(values),
        }  # position 0 not among them
        firing = [value for value in values if value > 0]
        assert best["rates"][name] == pytest.approx(len(firing) / len(values), abs=0.05)
        if name == "music":
            assert best["mean"] == pytest.approx(sum(firing) / len(firing), rel=0.05)


def test_chats_and_the_probe_dictionary_are_fitted_too(http: httpx.Client) -> None:
    """At the highest served layer the probe reads the edited stream with the concept's own dictionary."""
    chats = {name: [[{"role": "user", "content": text}] for text in texts[:4]] for name, texts in CLASSES.items()}
    fields = {"concepts": chats, "sae": "smollm2-135m/l20", "held_out": 0.25, "strengths": [1], "background": "finance"}
    report = fit(http, **fields)["report"]
    assert report["background"] == "finance"
    assert report["held_out"]["readout"]["sae"] == "smollm2-135m/l20"
    assert report["held_out"]["readout"]["after_edit_at_same_layer"] is True
    assert set(report["held_out"]["perplexity"]) == {"target", "background"}


def test_a_running_fit_is_cancelled_and_stores_nothing(http: httpx.Client) -> None:
    long = BODY | {"name": "never", "concepts": {name: texts * 20 for name, texts in CLASSES.items()}}
    running, waiting = start(http, long), start(http, long)
    while http.get(f"/v1/jobs/{running}").json()["state"] != "running":
        time.sleep(0.02)
    # Traffic goes on meanwhile.
    assert http.post("/v1/completions", json={"model": MODEL, "prompt": "Hi", "max_tokens": 2}).status_code == 200
    listed = {job["id"]: job for job in http.get("/v1/jobs").json()["data"]}
    assert (listed[running]["state"], listed[waiting]["state"]) == ("running", "queued")
    for job in (waiting, running):
        answer = http.delete(f"/v1/jobs/{job}").json()
        assert (answer["state"], answer["deleted"]) == ("cancelled", False)
        assert http.get(f"/v1/jobs/{job}").json()["state"] == "cancelled"
        assert http.delete(f"/v1/jobs/{job}").json()["deleted"] is True
        assert http.get(f"/v1/jobs/{job}").status_code == 404
    assert http.get("/v1/library/concepts/never").status_code == 404
    assert fit(http)["concept"]["name"] == "music"  # the next one runs


def test_a_fit_that_finds_nothing_fails_with_the_reason(http: httpx.Client) -> None:
    same = {"music": MUSIC[:2], "finance": MUSIC[:2]}
    last = wait(http, start(http, QUICK | {"concepts": same}))[-1]
    assert last["state"] == "failed"
    assert last["error"]["code"] == "invalid_artifact"
    assert "no latent has a difference score above 0 for 'music'" in last["error"]["message"]
    assert "result" not in last


BAD: list[tuple[dict[str, Any], str, str | None, str]] = [
    ({"name": "a/b"}, "invalid_artifact", "name", "not a name"),
    ({"name": ...}, "invalid_artifact", "name", "required"),
    ({"sae": "smollm2-135m/l16"}, "unknown_sae", "sae", "Did you mean 'smollm2-135m/l15'?"),
    ({"target": "musik"}, "invalid_artifact", "target", "Did you mean 'music'?"),
    ({"background": "musi"}, "invalid_artifact", "background", "Did you mean 'music'?"),
    ({"background": "music"}, "invalid_artifact", "background", "the target itself"),
    ({"background": ["a b", 3]}, "invalid_artifact", "background[1]", "expected a text"),
    ({"background": []}, "invalid_artifact", "background", "expected texts"),
    ({"concepts": {"music": MUSIC}}, "invalid_artifact", "concepts", "nothing to differ from"),
    ({"concepts": {"music": [], "finance": FINANCE}}, "invalid_artifact", "concepts.music", "at least 1"),
    ({"concepts": {"music": ["a b", {}], "finance": FINANCE}}, "invalid_artifact", "concepts.music[1]", "a text"),
    ({"concepts": {"music": ["a b", "c"], "finance": FINANCE}}, "invalid_artifact", "concepts.music[1]", "one token"),
    (
        {"concepts": {"music": ["a b"], "finance": FINANCE}, "held_out": 0.1},
        "invalid_artifact",
        "concepts.music",
        "held",
    ),
    ({"concepts": {"": MUSIC, "finance": FINANCE}}, "invalid_artifact", "concepts", "no name of a class"),
    ({"concepts": [MUSIC, FINANCE]}, "invalid_artifact", "concepts", "dictionary"),
    ({"concepts": {"music": ["a b"] * MAX_FIT_TEXTS, "f": ["a b"]}}, "limit_exceeded", "concepts", str(MAX_FIT_TEXTS)),
    (
        {"concepts": {str(i): ["a b"] for i in range(MAX_FIT_CLASSES + 1)}, "target": "1"},
        "limit_exceeded",
        "concepts",
        "33",
    ),
    ({"concepts": {"music": ["a b " * 255] * 600, "finance": FINANCE}}, "limit_exceeded", "concepts", "tokens"),
    ({"top": 513}, "limit_exceeded", "top", "512"),
    ({"top": 0}, "invalid_artifact", "top", "1"),
    ({"bins": D_MODEL}, "limit_exceeded", "bins", str(D_MODEL - 3)),
    ({"by": "luck"}, "invalid_artifact", "by", "separability"),
    ({"max_rate": 2}, "invalid_artifact", "max_rate", "1"),
    ({"held_out": 1}, "invalid_artifact", "held_out", "less than 1"),
    ({"strengths": [1, -1]}, "invalid_artifact", "strengths[1]", "above 0"),
    ({"strengths": []}, "invalid_artifact", "strengths", "at least 1"),
    ({"priors": {"music": 1}}, "invalid_artifact", "priors", "finance has none"),
    ({"priors": {"music": 1, "finanse": 1}}, "invalid_artifact", "priors", "Did you mean 'finance'?"),
    ({"priors": {"music": "much", "finance": 1}}, "invalid_artifact", "priors.music", "number"),
    ({"seed": -1}, "invalid_artifact", "seed", "0"),
    ({"detector": "magic"}, "invalid_artifact", "detector", "relation"),
    ({"detector_top": 257}, "invalid_artifact", "detector_top", "256"),
    ({"tree_depth": 6}, "invalid_artifact", "tree_depth", "5"),
    ({"labels": "word"}, "invalid_artifact", "words", "which ones"),
    ({"words": ["x"]}, "invalid_artifact", "words", "labels is sentence"),
    ({"labels": "word", "words": [" "]}, "invalid_artifact", "words[0]", "characters"),
    ({"labels": "word", "words": ["zebra"]}, "invalid_artifact", "concepts.music[0]", "none of the words occurs"),
    ({"labels": "position"}, "invalid_artifact", "concepts.music[0]", "spans"),
    (
        {"concepts": {"music": [{"text": "a b", "spans": [[0, 9]]}] * 2, "finance": FINANCE}, "labels": "position"},
        "invalid_artifact",
        "concepts.music[0]",
        "not within the 3 characters",
    ),
    (
        {"concepts": {"music": [{"text": "a b", "positions": [1]}] * 2, "finance": FINANCE}},
        "invalid_artifact",
        "concepts.music[0]",
        "where labels is position",
    ),
    ({"sead": 1}, "invalid_artifact", "sead", "not permitted"),
]


@pytest.mark.parametrize(("change", "code", "param", "says"), BAD, ids=lambda value: str(value)[:30])
def test_a_bad_body_is_refused_by_its_field_before_any_job_exists(
    http: httpx.Client, change: dict[str, Any], code: str, param: str, says: str
) -> None:
    before = len(http.get("/v1/jobs").json()["data"])
    body = {name: value for name, value in (QUICK | change).items() if value is not ...}
    answer = http.post("/v1/concepts/fit", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, code, param), error
    assert says in error["message"]
    assert len(http.get("/v1/jobs").json()["data"]) == before


def test_what_is_no_json_or_no_job_is_refused(http: httpx.Client) -> None:
    broken = http.post("/v1/concepts/fit", content=b"{")
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "invalid_artifact")
    for method in ("GET", "DELETE"):
        missing = http.request(method, "/v1/jobs/job-nope")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "unknown_job")


def test_the_server_publishes_the_routes_and_their_limits(http: httpx.Client) -> None:
    limits = http.get("/v1/capabilities").json()["limits"]
    told = (limits["fit_texts"], limits["fit_tokens"], limits["fit_classes"])
    assert told == (MAX_FIT_TEXTS, MAX_FIT_TOKENS, MAX_FIT_CLASSES)
    assert limits["jobs_waiting"] >= 1
    paths = http.get("/openapi.json").json()["paths"]
    fit_route = paths["/v1/concepts/fit"]["post"]
    assert "202" in fit_route["responses"]
    schema = fit_route["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["required"]) == {"name", "sae", "concepts", "target"}
    assert set(paths["/v1/jobs/{job_id}"]) == {"get", "delete"}


# the clients and the command -----------------------------------------------------------------------------------------


def test_the_client_fits_waits_and_uses_what_came_of_it(server: Server) -> None:
    told: list[JobStatus] = []
    with Client(server.url) as client:
        job = client.fit_concept(
            "by-client",
            sae=L15,
            concepts={"music": MUSIC[:3], "finance": FINANCE[:3]},
            target="music",
            background=ORDINARY,
            keep_dense=True,
            top=5,
            held_out=0,
        )
        found = job.wait(told.append, poll=0.05, timeout=60)
        assert (found.concept.name, len(found.report["features"])) == ("by-client", 5)
        assert found.report["max_rate"] is None
        assert told[-1].state == "succeeded"
        assert told[-1].progress.share == 1.0
        assert job.id in [one.id for one in client.jobs.list()]
        answer = client.complete(MUSIC[0], interventions=[Suppress("by-client", strength=2)], max_tokens=1)
        assert answer.receipt is not None
        assert answer.receipt.receipt[0].fired > 0
        assert job.cancel().state == "succeeded"  # finished: forgotten
        with pytest.raises(NotFound):
            job.status()
        with pytest.raises(BadRequest, match="Did you mean 'music'"):
            client.fit_concept("x", sae=L15, concepts=CLASSES, target="musik")
        with pytest.raises(TypeError, match="not both"):
            client.fit_concept("x", sae=L15, concepts=CLASSES, target="music", keep_dense=True, max_rate=0.2)


def test_the_async_client_waits_too_and_raises_for_a_cancelled_job(server: Server) -> None:
    async def main() -> None:
        async with AsyncClient(server.url) as client:
            job = await client.fit_concept(
                "x", sae=L15, concepts={k: v * 20 for k, v in CLASSES.items()}, target="music"
            )
            with pytest.raises(TimeoutError, match=job.id):
                await job.wait(poll=0.01, timeout=0)
            assert (await job.cancel()).state == "cancelled"
            with pytest.raises(JobFailed) as caught:
                await job.wait()
            assert caught.value.state == "cancelled"
            await client.jobs.delete(job.id)
            assert job.id not in [one.id for one in await client.jobs.list()]

    asyncio.run(main())


def test_the_command_fits_from_files_and_writes_its_report(server: Server, http: httpx.Client, tmp_path: Path) -> None:
    labelled, ordinary, music = tmp_path / "topics.csv", tmp_path / "ordinary.txt", tmp_path / "music.jsonl"
    rows = "".join(f'"{text}",finance\n' for text in FINANCE[:3])
    labelled.write_text(f"text,label\n{rows}")
    music.write_text("".join(json.dumps({"text": text}) + "\n" for text in MUSIC[:3]))
    ordinary.write_text("\n".join(ORDINARY[:2]))
    command = ["fit", "concept", "by-command", "--sae", L15, "--class", f"music={music}", "--labelled", str(labelled)]
    command += [
        "--target",
        "music",
        "--background",
        str(ordinary),
        "--top",
        "5",
        "--strengths",
        "2",
        "--url",
        server.url,
    ]
    folder = tmp_path / "report"
    done = CliRunner().invoke(app, [*command, "--report", str(folder)], env={"COLUMNS": "180"})
    assert done.exit_code == 0, done.output
    assert "by-command: 5 latents of smollm2-135m/l15" in done.output
    assert '{"interventions": [{"type": "suppress", "concept": "by-command"' in done.output
    written = json.loads((folder / "report.json").read_text())
    assert written["concept"]["digest"] == http.get("/v1/library/concepts/by-command").json()["digest"]
    assert [point["method"] for point in written["held_out"]["points"]] == ["app", "attenuate", "range", "mask"]
    picture = (folder / "concept.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert str(tmp_path) not in json.dumps(http.get("/v1/library/concepts/by-command").json())
    assert "by-command in rules: " in done.output
    assert "dense probe" in done.output
    assert written["detector"]["expressions"]["text"] in done.output
    as_json = CliRunner().invoke(app, [*command, "--held-out", "0", "--json"])
    assert json.loads(as_json.stdout)["report"]["held_out"] is None


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT is KeyboardInterrupt, as in a terminal: a process that a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_cancels_the_job_of_the_command(server: Server, http: httpx.Client, tmp_path: Path) -> None:
    file = tmp_path / "topics.jsonl"
    rows = [{"text": text, "label": name} for name, texts in CLASSES.items() for text in texts * 20]
    file.write_text("\n".join(map(json.dumps, rows)))

    def interrupt() -> None:
        with server.client() as other:
            while not any(
                job["name"] == "stopped" and job["state"] == "running" and job["progress"]["done"]
                for job in other.get("/v1/jobs").json()["data"]
            ):
                time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    command = [
        "fit",
        "concept",
        "stopped",
        "--sae",
        L15,
        "--labelled",
        str(file),
        "--target",
        "music",
        "--url",
        server.url,
    ]
    done = CliRunner().invoke(app, command)
    thread.join()
    assert done.exit_code == 130
    assert "nothing was stored" in done.stderr
    job = [job for job in http.get("/v1/jobs").json()["data"] if job["name"] == "stopped"][-1]
    assert job["state"] == "cancelled"


def test_a_dictionary_with_signed_latents_is_refused_by_name() -> None:
    rows = torch.eye(8)
    gate = {"b_enc": torch.zeros(8)}
    sae = SAE.from_tensors(
        architecture="abstopk", hook=Hook("resid_post", 3), W_enc=rows, W_dec=rows, b_dec=torch.zeros(8), gate=gate, k=2
    )
    served = SimpleNamespace(catalogue=SimpleNamespace(sae=lambda name: ServedSAE(name, 3, sae, full_encode=True)))
    with pytest.raises(InterventionError, match=r"the latents of signed \(abstopk\) may be negative") as caught:
        _dictionary(served, "signed")
    assert (caught.value.code, caught.value.param) == ("invalid_artifact", "sae")
