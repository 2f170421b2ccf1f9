"""Servers that speculate by n-grams: what was rejected is in no answer, receipt or reading, and what cannot be is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from editserver.demo.model import ensure_demo_model
from sae_weights.formats import save_native
from tests.engine.dictionaries import random_sae

from .conftest import MODEL, N_FEATURES, RELU, make_probes, sse, start_server

pytestmark = pytest.mark.engine

NGRAMS = json.dumps({"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1})
SPECULATING = ("--speculative-config", NGRAMS, "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "4")
ECHO = "one two three one two three one two three one two three one two"
"""Answers go round as well: many drafts are right."""
MINI = "mini/l1"
STEER = {"type": "steer", "sae": RELU, "feature": 3, "strength": 30}
Json = dict[str, Any]


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("speculating")
    return ["--sae", f"{RELU}={make_probes(folder)[RELU]}", "--library", str(folder / "library")]


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory, flags: list[str]) -> Iterator[httpx.Client]:
    with start_server(tmp_path_factory.mktemp("ngrams"), *flags, *SPECULATING) as server, server.client() as client:
        yield client


def body_of(**fields: Any) -> Json:
    body: Json = {"model": MODEL, "prompt": ECHO, "temperature": 0, "max_tokens": 24, "ignore_eos": True}
    return body | fields


def post(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post("/v1/completions", json=body_of(**fields))


def drafts(client: httpx.Client) -> dict[str, float]:
    """Counters of vLLM: tokens that were drafted, and accepted."""
    names = ("vllm:spec_decode_num_draft_tokens_total", "vllm:spec_decode_num_accepted_tokens_total")
    lines = client.get("/metrics/").text.splitlines()
    return {name: sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name)) for name in names}


def test_every_token_of_an_edited_answer_is_edited_and_read_as_in_one_pass_without_drafts(http: httpx.Client) -> None:
    """What is read before an edit at the same layer does not depend on it: a plain pass over the tokens reads the same."""
    before = drafts(http)
    inspect = {"sae": RELU, "features": [3, 4], "include_bos": True}
    answer = post(http, interventions=[STEER], inspect=inspect).json()
    read = answer["inspection"]["tokens"]
    drafted, accepted = (now - then for now, then in zip(drafts(http).values(), before.values(), strict=True))
    assert drafted > accepted > 0, "drafts were neither right nor wrong"
    assert [one["position"] for one in read] == list(range(len(read)))
    assert len(read) == answer["usage"]["prompt_tokens"] + 24 - 1
    (receipt,) = answer["interventions"]["receipt"]
    assert (receipt["tokens_edited"], receipt["fired"]) == (len(read) - 1, len(read) - 1)
    ids = [one["token_id"] for one in read]
    again = post(http, prompt=ids, inspect=inspect, max_tokens=1).json()["inspection"]["tokens"]
    assert [one["token_id"] for one in again] == ids
    for mine, theirs in zip(read, again, strict=True):
        values = [[feature["activation"] for feature in one["features"]] for one in (mine, theirs)]
        assert values[0] == pytest.approx(values[1], rel=0.05, abs=1), mine


def test_a_stream_reads_every_token_once_and_in_order(http: httpx.Client) -> None:
    fields: Json = {"interventions": [STEER], "inspect": {"sae": RELU, "features": [3]}}
    whole = post(http, **fields).json()
    events = [event for event in sse(post(http, stream=True, **fields)) if event != "[DONE]"]
    assert not [event for event in events if "error" in event]
    read = [token for event in events for token in event.get("inspection", {}).get("tokens", ())]
    assert read == whole["inspection"]["tokens"]
    assert "".join(c["text"] for event in events for c in event["choices"]) == whole["choices"][0]["text"]
    (receipt,) = [event["interventions"] for event in events if "interventions" in event]
    assert receipt == whole["interventions"]


def test_a_rule_refuses_at_its_token_whatever_was_drafted_behind_it(http: httpx.Client) -> None:
    inspect = {"sae": RELU, "features": list(range(N_FEATURES)), "include_bos": True}
    seen = post(http, inspect=inspect).json()
    read = np.array([[one["activation"] for one in token["features"]] for token in seen["inspection"]["tokens"]])
    begun = seen["usage"]["prompt_tokens"] + 4
    margin = read[begun:].max(axis=0) - read[:begun].max(axis=0)
    feature = int(margin.argmax())
    assert margin[feature] > 0.2, "no feature is higher in the answer than before it"
    limit = float(read[begun:, feature].max() - margin[feature] / 2)
    text = f"rule: feature({RELU}, {feature}) >= {limit:.3f} -> stop\n"
    rules = {"type": "rules", "id": "guard", "text": text + 'on stop: refuse "No."'}
    answer = post(http, interventions=[rules])
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    assert choice["finish_reason"] == "content_filter"
    assert choice["text"] == "No."
    events = [event for event in sse(post(http, interventions=[rules], stream=True)) if event != "[DONE]"]
    said = [c for event in events for c in event["choices"] if c.get("text")]
    assert said[-1]["text"] == "No."
    told = "".join(c["text"] for c in said[:-1])
    assert told
    assert seen["choices"][0]["text"].startswith(told)
    assert [c["finish_reason"] for event in events for c in event["choices"] if c["finish_reason"]] == [
        "content_filter"
    ]


# -- a model that forgets ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Two layers of random weights, each with a sliding window; the demo's tokenizer."""
    from transformers import AutoTokenizer, MistralConfig

    folder = tmp_path_factory.mktemp("windows")
    tokenizer = AutoTokenizer.from_pretrained(ensure_demo_model(progress=False))
    tokenizer.save_pretrained(folder)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=64,
        architectures=["MistralForCausalLM"],
        dtype="float32",
    )
    config.save_pretrained(folder)
    flags = ["--load-format", "dummy", "--served-model-name", MODEL, *SPECULATING]
    flags += ["--library", str(folder / "library"), "--gpu-memory-utilization", "0.3"]
    flags += ["--sae", f"{MINI}={save_native(random_sae('relu', 64, layer=1), folder / 'mini')}"]
    env = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with start_server(folder, *flags, model=str(folder), env=env) as server, server.client() as client:
        yield client


def test_where_no_layer_keeps_every_token_what_listens_is_refused_by_code(forgetful: httpx.Client) -> None:
    steer: Json = {"type": "steer", "sae": MINI, "feature": 1, "strength": 2}
    served = post(forgetful, interventions=[steer], inspect={"sae": MINI, "features": [1]})
    assert served.status_code == 200, served.text
    assert served.json()["interventions"]["receipt"][0]["fired"] > 0
    rules: Json = {"type": "rules", "text": f"rule: feature({MINI}, 1) > 0 -> found\non found: flag"}
    gated: Json = steer | {"when": f"seen(feature({MINI}, 1) > 0)"}
    for listening in (rules, gated):
        for stream in (False, True):
            answer = post(forgetful, interventions=[steer, listening], stream=stream)
            error = answer.json()["error"]
            told = (answer.status_code, error["code"], error["param"])
            assert told == (400, "unsupported_with_interventions", "interventions[1]")
            assert "a KV cache that keeps every token" in error["message"]
    calibration = {"intervention": gated, "prompts": [ECHO], "target_kl": 0.1}
    error = forgetful.post("/v1/calibrate_strength", json=calibration).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_with_interventions", "intervention")
