"""The HTTP contract on a real server: what comes back has the shapes and numbers that the contract promises."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest

from .conftest import ARMED, D_MODEL, MODEL, N_FEATURES, RELU, TOPK

pytestmark = pytest.mark.engine

STEER = {"type": "steer", "sae": RELU, "feature": 3, "strength": 90}
Chat = Callable[..., httpx.Response]


def prompt_tokens(http: httpx.Client, content: str = "Tell me about Paris.") -> list[int]:
    answer = http.post("/tokenize", json={"model": MODEL, "messages": [{"role": "user", "content": content}]})
    return answer.json()["tokens"]


def test_capabilities_publish_layers_limits_types_and_schemas(http: httpx.Client) -> None:
    body = http.get("/v1/capabilities").json()
    assert set(body) == {
        "version", "vllm", "model", "d_model", "n_layers", "armed_layers", "limits", "saes", "intervention_types", "schemas"
    }  # fmt: skip
    assert (body["model"], body["d_model"], body["n_layers"]) == (MODEL, D_MODEL, 30)
    assert body["armed_layers"] == ARMED
    minimum = {"interventions": 32, "instructions": 1024, "rows": 1024, "rules": 64, "propositions": 128}
    minimum |= {"inspected_features": 256, "top_k": 128, "bank_rows": 8192}
    assert body["limits"].items() >= minimum.items()
    assert body["intervention_types"] == ["steer", "edit_features", "suppress", "remap", "rules"]
    assert set(body["schemas"]) == {"steer", "edit_features", "suppress", "remap", "rules", "inspect"}
    assert RELU in [sae["id"] for sae in body["saes"]]


def test_saes_are_listed_and_found_under_ids_with_slashes(http: httpx.Client) -> None:
    listed = http.get("/v1/saes").json()
    assert listed["object"] == "list"
    probe = next(sae for sae in listed["data"] if sae["id"] == RELU)
    assert http.get(f"/v1/saes/{RELU}").json() == probe
    assert http.get(f"/v1/saes/{RELU.replace('/', '%2F')}").json() == probe
    assert (probe["layer"], probe["d_model"], probe["n_features"]) == (15, D_MODEL, N_FEATURES)
    assert (probe["architecture"], probe["editable"], probe["top_k"]) == ("relu", True, True)
    assert len(probe["digest"]) == 64


def test_features_show_what_is_known_and_null_for_what_is_not(http: httpx.Client) -> None:
    card = http.get(f"/v1/saes/{RELU}/features/3").json()
    assert (card["label"], card["density"], card["max_activation"]) == ("a probe direction", 0.5, 7.0)
    assert http.get(f"/v1/saes/{RELU}/features/4").json()["label"] is None
    assert set(card) >= {"contexts", "promoted", "suppressed", "neighbours", "quantiles"}
    found = http.get(f"/v1/saes/{RELU}/features", params={"q": "probe"}).json()["data"]
    assert [(f["index"], f["score"]) for f in found] == [(3, 1.0)]
    assert [f["index"] for f in http.get(f"/v1/saes/{RELU}/features?limit=5").json()["data"]] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/v1/saes/nope", "unknown_sae"),
        ("/v1/saes/nope/features", "unknown_sae"),
        (f"/v1/saes/{RELU}/features/{N_FEATURES}", "unknown_feature"),
        (f"/v1/saes/{RELU}/features/-1", "unknown_feature"),
        ("/v1/library/vectors/nope", "unknown_vector"),
        ("/v1/library/vectors/..%2F..%2Fetc", None),
        ("/v1/library/gadgets", None),
        ("/v1/library/rulesets/nope", "unknown_ruleset"),
        ("/v1/library/maps/nope", "unknown_map"),
        ("/v1/library/concepts/nope", "unknown_concept"),
        ("/v1/jobs/1", "unknown_job"),
    ],
)
def test_an_unknown_path_resource_is_404_in_the_envelope(http: httpx.Client, path: str, code: str | None) -> None:
    answer = http.get(path)
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert code is None or error["code"] == code


def test_a_plain_request_has_none_of_our_fields(chat: Chat) -> None:
    body = chat().json()
    assert "interventions" not in body
    assert "inspection" not in body
    assert chat(interventions=[], inspect=None).json()["choices"][0]["message"] == body["choices"][0]["message"]


def test_a_receipt_counts_every_selected_token(http: httpx.Client, chat: Chat) -> None:
    n_prompt, n = len(prompt_tokens(http)), 12
    cases = {
        "all": (n_prompt + n - 2, n_prompt - 1),
        "prompt": (n_prompt - 1, n_prompt - 1),
        "generated": (n - 1, 0),
        "last_prompt_token": (1, 1),
    }
    interventions = [STEER | {"strength": 5, "tokens": tokens, "id": str(tokens)} for tokens in cases]
    interventions.append(STEER | {"tokens": {"from": -3, "to": -1}, "id": "slice"})
    interventions.append(STEER | {"tokens": {"from": 0, "to": 1}, "include_bos": True, "id": "bos"})
    interventions.append(STEER | {"tokens": ["last_prompt_token", "generated"], "id": "answer"})
    body = chat(interventions=interventions).json()
    entries = {entry["id"]: entry for entry in body["interventions"]["receipt"]}
    for name, counts in (cases | {"slice": (2, 2), "bos": (1, 1), "answer": (n, 1)}).items():
        assert (entries[name]["tokens_edited"], entries[name]["prompt_tokens_edited"]) == counts, name
        assert entries[name]["fired"] == counts[0] - max(0, min(counts[1], entries[name]["computed_from"] - 1)), name
    assert body["usage"]["completion_tokens"] == n
    assert len(body["interventions"]["digest"]) == 64
    assert 0 < entries["all"]["dose_mean"] <= entries["all"]["dose_max"]


def test_positions_are_those_behind_the_template_and_a_prefilled_answer_is_prompt(
    http: httpx.Client, chat: Chat
) -> None:
    messages = [{"role": "user", "content": "Tell me about Paris."}, {"role": "assistant", "content": "It is the"}]
    prefilled = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    ids = http.post("/tokenize", json={"model": MODEL, **prefilled}).json()["tokens"]
    assert len(ids) > len(prompt_tokens(http))
    generated = STEER | {"strength": 5, "tokens": "generated"}
    body = chat(**prefilled, interventions=[generated], inspect={"sae": RELU, "features": [3]}, max_tokens=4).json()
    (entry,) = body["interventions"]["receipt"]
    assert (entry["tokens_edited"], entry["prompt_tokens_edited"]) == (3, 0)
    read = body["inspection"]["tokens"]
    assert [token["token_id"] for token in read if token["phase"] == "prompt"] == ids[1:]
    assert len(read) == len(ids) - 1 + 3


def test_positions_are_those_behind_truncation(http: httpx.Client) -> None:
    prompt = "One two three four five six seven eight nine ten"
    ids = http.post("/tokenize", json={"model": MODEL, "prompt": prompt}).json()["tokens"]
    body = {"model": MODEL, "prompt": prompt, "truncate_prompt_tokens": 5, "max_tokens": 3, "ignore_eos": True}
    fields = {"interventions": [STEER | {"strength": 5}], "inspect": {"sae": RELU, "features": [3], "tokens": "prompt"}}
    answer = http.post("/v1/completions", json=body | fields).json()
    assert answer["usage"]["prompt_tokens"] == 5
    (entry,) = answer["interventions"]["receipt"]
    assert (entry["tokens_edited"], entry["prompt_tokens_edited"]) == (5 + 3 - 2, 4)
    read = answer["inspection"]["tokens"]
    assert [token["position"] for token in read] == [1, 2, 3, 4]
    assert [token["token_id"] for token in read] == ids[-4:]


def test_a_seed_draws_the_same_edited_answer_again(chat: Chat) -> None:
    drawn = {"temperature": 1.0, "seed": 5, "interventions": [STEER | {"strength": 20}]}
    chat(**drawn)  # the next ones find its prompt in the prefix cache
    again = [chat(**drawn).json() for _ in range(2)]
    assert again[0]["choices"][0]["message"] == again[1]["choices"][0]["message"]
    assert again[0]["interventions"] == again[1]["interventions"]
    assert chat(**drawn | {"seed": 6}).json()["choices"][0]["message"] != again[0]["choices"][0]["message"]


def test_an_edit_changes_the_answer_and_a_noop_does_not(chat: Chat) -> None:
    plain = chat().json()
    edited = chat(interventions=[STEER]).json()
    noop = chat(interventions=[STEER | {"strength": 0}]).json()
    assert edited["choices"][0]["message"]["content"] != plain["choices"][0]["message"]["content"]
    assert noop["choices"][0]["message"]["content"] == plain["choices"][0]["message"]["content"]
    assert noop["interventions"]["digest"] is None
    (entry,) = noop["interventions"]["receipt"]
    assert (entry["noop"], entry["fired"]) == (True, 0)


def test_equal_edits_have_equal_digests_whatever_they_are_called(http: httpx.Client, chat: Chat) -> None:
    values = [1.0] + [0.0] * (D_MODEL - 1)
    http.put("/v1/library/vectors/first-axis", json={"layers": {"15": values}}).raise_for_status()
    packed = {"dtype": "float32", "shape": [D_MODEL], "data": base64.b64encode(np.float32(values).tobytes()).decode()}
    sources = [
        {"vector": "first-axis"},
        {"values": values, "layer": 15},
        {"values": packed, "layers": [15], "id": "packed"},
    ]
    digests = {
        chat(interventions=[{"type": "steer", "strength": 30, **s}]).json()["interventions"]["digest"] for s in sources
    }
    assert len(digests) == 1


def test_an_intervention_over_several_layers_has_numbers_per_layer(chat: Chat) -> None:
    values = np.random.default_rng(0).normal(size=(2, D_MODEL)).tolist()
    steer = {"type": "steer", "values": values, "layers": [10, 20], "strength": 0.5, "mode": "normalized"}
    (entry,) = chat(interventions=[steer]).json()["interventions"]["receipt"]
    assert set(entry["layers"]) == {"10", "20"}
    assert "layer" not in entry
    for numbers in entry["layers"].values():
        assert numbers["dose_mean"] == pytest.approx(0.5, rel=0.02)


def test_an_active_feature_that_is_set_reads_as_set_after_the_edit(chat: Chat) -> None:
    edits = [
        {"type": "edit_features", "sae": RELU, "features": [{"index": 7, "op": "set", "value": 40.0}]},
        {"type": "edit_features", "sae": TOPK, "features": [{"index": 1, "op": "add", "value": 9.0}]},
    ]
    before = chat(inspect={"sae": RELU, "features": [7], "tokens": "prompt"}).json()["inspection"]["tokens"]
    inspect = [{"sae": RELU, "features": [7], "after": True}, {"sae": TOPK, "features": [1], "top_k": 3}]
    body = chat(interventions=edits, inspect=inspect).json()
    assert [part["sae"] for part in body["inspection"]] == [RELU, TOPK]
    after = {token["position"]: token["features"][0]["activation"] for token in body["inspection"][0]["tokens"]}
    active = [token["position"] for token in before if token["features"][0]["activation"] > 0]
    assert len(active) > 3
    # Encoder and decoder rows of the probe are equal and of length 1; bfloat16 rounds the written stream.
    assert [after[position] for position in active] == pytest.approx([40.0] * len(active), rel=0.05)


def test_readings_are_contiguous_once_each_and_named_by_their_tokens(http: httpx.Client, chat: Chat) -> None:
    ids = prompt_tokens(http)
    body = chat(interventions=[STEER], inspect={"sae": RELU, "top_k": 4, "features": [3]}, return_token_ids=True).json()
    tokens = body["inspection"]["tokens"]
    fed = ids + body["choices"][0]["token_ids"][:-1]
    assert [token["position"] for token in tokens] == list(range(1, len(fed)))
    assert [token["token_id"] for token in tokens] == fed[1:]
    assert {t["phase"] for t in tokens[: len(ids) - 1]} == {"prompt"}
    assert {t["phase"] for t in tokens[len(ids) - 1 :]} == {"generated"}
    for token in tokens:
        first, *top = token["features"]
        assert (first["index"], first["label"]) == (3, "a probe direction")
        sizes = [abs(f["activation"]) for f in top]
        assert sizes == sorted(sizes, reverse=True)
        assert 0.0 not in sizes


def test_reading_generated_tokens_keeps_the_prefix_cache_and_reading_the_prompt_does_not(chat: Chat) -> None:
    chat()
    kept = chat(inspect={"sae": RELU, "top_k": 1, "tokens": "generated"}).json()
    assert kept["usage"]["prompt_tokens_details"]["cached_tokens"] >= 32
    whole = chat(inspect={"sae": RELU, "top_k": 1}).json()
    assert whole["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert whole["inspection"]["tokens"][0]["position"] == 1


def test_several_choices_carry_their_own_receipts_and_readings(http: httpx.Client, chat: Chat) -> None:
    inspect = {"sae": RELU, "features": [3]}
    body = chat(n=3, temperature=1.0, seed=7, interventions=[STEER], inspect=inspect, return_token_ids=True).json()
    assert "interventions" not in body
    n_prompt = len(prompt_tokens(http))
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    for choice in body["choices"]:
        (entry,) = choice["interventions"]["receipt"]
        assert entry["tokens_edited"] == n_prompt + 12 - 2
        generated = [t["token_id"] for t in choice["inspection"]["tokens"] if t["phase"] == "generated"]
        assert generated == choice["token_ids"][:-1]


def test_list_prompts_times_n_have_one_receipt_per_choice(http: httpx.Client) -> None:
    prompts = ["The sky is", "Once upon a time there was"]
    lengths = [len(http.post("/tokenize", json={"model": MODEL, "prompt": p}).json()["tokens"]) for p in prompts]
    body = {"model": MODEL, "prompt": prompts, "n": 2, "max_tokens": 5, "ignore_eos": True, "interventions": [STEER]}
    choices = http.post("/v1/completions", json=body).json()["choices"]
    edited = [choice["interventions"]["receipt"][0]["tokens_edited"] for choice in choices]
    assert edited == [lengths[0] + 3, lengths[0] + 3, lengths[1] + 3, lengths[1] + 3]


def test_activations_read_every_prompt_token_without_generating(http: httpx.Client, chat: Chat) -> None:
    texts = ["The cat sat on the mat", "Paris"]
    answer = http.post(f"/v1/saes/{RELU}/activations", json={"input": texts[0], "features": [3], "top_k": 2})
    (only,) = answer.json()["data"]
    ids = http.post("/tokenize", json={"model": MODEL, "prompt": texts[0]}).json()["tokens"]
    assert [token["token_id"] for token in only["tokens"]] == ids[1:]
    twice = http.post(
        f"/v1/saes/{RELU}/activations", json={"input": [texts[0]] * 2, "features": [3], "top_k": 2}
    ).json()
    assert [entry["index"] for entry in twice["data"]] == [0, 1]
    assert [t["position"] for t in twice["data"][1]["tokens"]] == [t["position"] for t in only["tokens"]]
    messages = [{"role": "user", "content": "Tell me about Paris."}]
    seen = http.post(f"/v1/saes/{RELU}/activations", json={"messages": messages, "features": [3]}).json()
    whole = chat(inspect={"sae": RELU, "features": [3], "tokens": "prompt"}).json()["inspection"]["tokens"]
    for a, b in zip(seen["data"][0]["tokens"], whole, strict=True):
        assert a["features"][0]["activation"] == pytest.approx(b["features"][0]["activation"], rel=0.05, abs=0.3)


def test_openapi_describes_our_fields_and_routes(http: httpx.Client) -> None:
    api = http.get("/openapi.json").json()
    body = api["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    chat_schema = api["components"]["schemas"][body["$ref"].rsplit("/", 1)[1]]
    assert {"messages", "interventions", "inspect"} <= set(chat_schema["properties"])
    assert {"Steer", "EditFeatures", "Inspect"} <= set(api["components"]["schemas"])
    ours = re.compile(r"/v1/(capabilities|saes|calibrate_strength|library|rulesets|concepts|jobs)\b")
    described = {
        (method.upper(), re.sub(r"\{\w+\}", "{}", path))
        for path, methods in api["paths"].items()
        if ours.match(path)
        for method in methods
    }
    assert described == documented()
    assert http.get("/docs").status_code == 200


def documented() -> set[tuple[str, str]]:
    """(method, path) of the table of other endpoints in ``docs/api.md``; a method without a path belongs to the next path."""
    text = (Path(__file__).parents[2] / "docs" / "api.md").read_text().partition("## Other endpoints")[2]
    found: set[tuple[str, str]] = set()
    methods: list[str] = []
    for row in re.findall(r"^\| (`[A-Z].*?) \|", text.partition("\n## ")[0], re.MULTILINE):
        for item in re.findall(r"`([^`]+)`", row):
            method, _, path = item.partition(" ")
            methods.append(method)
            if path:
                plain = re.sub(r"\{\w+\}", "{}", path.partition("?")[0])
                found |= {(one, plain) for one in methods}
                methods.clear()
    return found - {("GET", "/metrics")}


def test_metrics_count_edits_refusals_and_the_bank(http: httpx.Client, chat: Chat) -> None:
    chat(interventions=[STEER])
    chat(interventions=[{"type": "steer"}])
    text = http.get("/metrics/").text
    for line in (
        'editserver_requests_total{type="steer"}',
        'editserver_edited_tokens_total{type="steer"}',
        'editserver_dose_count{type="steer"}',
        'editserver_refusals_total{code="invalid_intervention"}',
        "editserver_bank_rows_capacity 8192.0",
        "editserver_bank_rows_in_use 0.0",
    ):
        assert line in text


def test_structured_output_and_tool_calls_survive_an_edit(chat: Chat) -> None:
    mild = STEER | {"strength": 10}
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    schema |= {"additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "c", "schema": schema}}
    answer = chat(interventions=[mild], response_format=form, max_tokens=40, ignore_eos=False)
    content = answer.json()["choices"][0]["message"]["content"]
    assert json.loads(content)["city"] in ("Paris", "Rome")
    tool = {"type": "function", "function": {"name": "pick", "parameters": schema}}
    choice = {"type": "function", "function": {"name": "pick"}}
    answer = chat(interventions=[mild], tools=[tool], tool_choice=choice, max_tokens=40, ignore_eos=False).json()
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "pick"
    assert json.loads(call["function"]["arguments"])
    assert answer["interventions"]["receipt"][0]["fired"] > 0


def test_logprobs_come_with_edits(chat: Chat) -> None:
    body = chat(interventions=[STEER], logprobs=True, top_logprobs=2).json()
    assert len(body["choices"][0]["logprobs"]["content"]) == 12
