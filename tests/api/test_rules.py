"""Rules over HTTP, on the shared real server: what they see, do, tell and refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from editserver_client import ActionEvent, Client, RuleError, RuleEvent, Rules, Steer, TextDelta, extra_body

from .conftest import MODEL, N_FEATURES, RELU, TOPK, Server, sse

pytestmark = pytest.mark.engine

Chat = Callable[..., httpx.Response]
STEER = {"type": "steer", "sae": TOPK, "feature": 3, "strength": 90}
MESSAGE = 'I <b>cannot</b> say.\n\n<tool_call>\n{"name": "x", "arguments": {}}\n</tool_call> data: [DONE]'


@dataclass(frozen=True)
class Seen:
    """What the ReLU probe sees in the standard chat and its greedy answer."""

    answer: dict[str, Any]
    prompt_len: int
    activation: Any
    """float ``[positions, N_FEATURES]``; row 0 (position 0) is zeros."""

    @property
    def tokens(self) -> list[str]:
        return [one["token"] for one in self.answer["choices"][0]["logprobs"]["content"]]

    def between(self, feature: int, low: float, high: float) -> float:
        """A threshold halfway, which no rounding can miss."""
        assert high - low > 0.2, (feature, low, high)
        return round((low + high) / 2, 4)

    def prompt_feature(self) -> tuple[int, float]:
        """A feature that reaches a threshold at some prompt tokens, and at others not."""
        inside = np.sort(self.activation[1 : self.prompt_len], axis=0)
        n = len(inside) // 3
        feature = int((inside[-n] - inside[-n - 1]).argmax())
        return feature, self.between(feature, inside[-n - 1, feature], inside[-n, feature])

    def answer_feature(self) -> tuple[int, float, int]:
        """A feature that reaches a threshold at no prompt token, and in the answer first at the returned position."""
        inside, later = self.activation[1 : self.prompt_len], self.activation[self.prompt_len + 2 :]
        margin = later.max(0) - np.maximum(inside.max(0), self.activation[self.prompt_len : self.prompt_len + 2].max(0))
        feature = int(margin.argmax())
        high = later[:, feature].max()
        threshold = self.between(feature, high - margin[feature], high)
        return feature, threshold, int((self.activation[:, feature] >= threshold).argmax())


@pytest.fixture(scope="module")
def seen(chat: Chat) -> Seen:
    answer = chat(inspect={"sae": RELU, "features": list(range(N_FEATURES))}, logprobs=True).json()
    tokens = answer["inspection"]["tokens"]
    activation = np.array([[one["activation"] for one in token["features"]] for token in tokens])
    prompt_len = 1 + sum(token["phase"] == "prompt" for token in tokens)
    return Seen(answer, prompt_len, np.concatenate([np.zeros((1, N_FEATURES)), activation]))


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def refuse(feature: int, threshold: float, message: str = MESSAGE) -> dict[str, Any]:
    text = f"rule r1: feature({RELU}, {feature}) >= {threshold} -> stop\non stop: refuse {json.dumps(message)}"
    return {"type": "rules", "text": text, "id": "guard"}


# what they see -------------------------------------------------------------------------------------------------------


def test_proofs_and_scores_are_those_of_inspect_and_a_flag_changes_nothing(
    server: Server, http: httpx.Client, chat: Chat, seen: Seen
) -> None:
    feature, threshold = seen.prompt_feature()
    text = f"""
    proposition hot = feature({RELU}, {feature}) >= {threshold}
    rule once: hot -> warm
    rule often: warm and at least 3 of seen(hot) -> latch many
    on many: flag
    on many: log
    """
    inspect = {"sae": RELU, "features": [feature]}
    before = http.get("/metrics/").text
    answer = chat(interventions=[{"type": "rules", "text": text, "id": "watch"}], inspect=inspect)
    assert text_of(answer) == seen.answer["choices"][0]["message"]["content"]
    body = answer.json()
    read = {t["position"]: t["features"][0]["activation"] for t in body["inspection"]["tokens"]}
    hot = [position for position, activation in read.items() if activation >= threshold]
    (entry,) = body["interventions"]["receipt"]
    (facts,) = entry["propositions"]
    assert (facts["name"], facts["count"], facts["positions"]) == ("hot", len(hot), hot)
    assert facts["scores"] == [read[position] for position in hot]
    assert [t["position"] for t in body["inspection"]["tokens"] if t["rules"]] == [
        p for p in read if p in hot or p >= hot[2]
    ]
    told = next(t["rules"]["watch"] for t in body["inspection"]["tokens"] if t["position"] == hot[2])
    assert told == {"propositions": {"hot": read[hot[2]]}, "conclusions": ["many", "warm"]}
    edges = [position for position in hot if position - 1 not in hot]
    assert [f["position"] for f in entry["fired"] if f["conclusion"] == "warm"] == edges
    (many,) = [f for f in entry["fired"] if f["conclusion"] == "many"]
    assert (many["rule"], many["position"]) == ("often", hot[2])
    evidence = {"evidence": "at least 3 of seen(hot)", "count": 3, "positions": hot[:3]}
    evidence["scores"] = {"hot": [read[position] for position in hot[:3]]}
    assert evidence in many["proof"]["because"]
    premise = next(reason for reason in many["proof"]["because"] if reason.get("conclusion") == "warm")
    assert (premise["rule"], premise["position"]) == ("once", hot[2])
    last = max(read)
    assert entry["actions"] == [
        {"on": "many", "do": kind, "position": hot[2], "tokens": last - hot[2] + 1} for kind in ("flag", "log")
    ]
    assert "edited" not in entry
    (again,) = chat(interventions=[{"type": "rules", "text": text, "id": "watch"}]).json()["interventions"]["receipt"]
    start = again["computed_from"]  # the prefix cache has the tokens before: what held is known there, scores are not
    assert start > hot[2]
    assert [again["propositions"][0][name] for name in ("count", "positions")] == [len(hot), hot]
    scores = again["propositions"][0]["scores"]
    assert [score is None for score in scores] == [p < start for p in hot]
    for position, score in zip(hot, scores, strict=True):
        if score is not None:  # computed in another batch shape
            assert score == pytest.approx(read[position], rel=0.05, abs=0.5)
    assert [(f["rule"], f["position"]) for f in again["fired"]] == [(f["rule"], f["position"]) for f in entry["fired"]]
    after = http.get("/metrics/").text
    for kind in ("flag", "log"):
        line = f'editserver_rules_fired_total{{action="{kind}"}} '
        assert count(after, line) == count(before, line) + 2
    assert f"concluded many at position {hot[2]}" in server.log.read_text()


def count(metrics: str, line: str) -> float:
    return float(next((text.removeprefix(line) for text in metrics.splitlines() if text.startswith(line)), "0"))


def test_steering_by_rule_is_steering_the_tokens_that_the_rule_chose(chat: Chat, seen: Seen) -> None:
    feature, threshold = seen.prompt_feature()
    on = {"on": "go", "do": STEER}
    ruled = {"type": "rules", "rules": [{"if": f"feature({RELU}, {feature}) >= {threshold}", "then": "go"}]}
    inspect = {"sae": RELU, "features": [feature]}
    first = chat(interventions=[ruled | {"actions": [on]}], inspect=inspect, logprobs=True)
    assert text_of(first) != seen.answer["choices"][0]["message"]["content"]
    body = first.json()
    (entry,) = body["interventions"]["receipt"]
    hot = [t["position"] for t in body["inspection"]["tokens"] if t["features"][0]["activation"] >= threshold]
    assert entry["actions"] == [{"on": "go", "do": "steer", "position": hot[0], "tokens": len(hot)}]
    assert entry["edited"]["20"]["fired"] == len(hot)
    assert entry["edited"]["20"]["dose_max"] > 0
    tokens = [{"from": position, "to": position + 1} for position in hot]
    by_hand = chat(interventions=[STEER | {"tokens": tokens}], inspect=inspect, logprobs=True).json()
    assert by_hand["choices"][0]["message"] == body["choices"][0]["message"]
    logprobs = [[t["logprob"] for t in answer["choices"][0]["logprobs"]["content"]] for answer in (body, by_hand)]
    assert np.allclose(logprobs[0], logprobs[1], atol=1e-4)
    gated = chat(interventions=[STEER | {"when": ruled["rules"][0]["if"]}], inspect=inspect, logprobs=True).json()
    assert gated["choices"][0]["message"] == body["choices"][0]["message"]
    (entry,) = gated["interventions"]["receipt"]
    assert entry["when"] == {"open_from": hot[0], "tokens": len(hot)}
    assert entry["fired"] == len(hot)


def test_when_names_what_a_rule_set_of_the_request_concluded(chat: Chat, seen: Seen) -> None:
    feature, threshold = seen.prompt_feature()
    text = f"rule r1: prompt(feature({RELU}, {feature}) >= {threshold}) -> latch hot"
    rules = {"type": "rules", "text": text}
    answer = chat(interventions=[STEER | {"when": "hot"}, STEER | {"id": "never", "when": "not prompt_ended"}, rules])
    assert text_of(answer) != seen.answer["choices"][0]["message"]["content"]
    steer, never, told = answer.json()["interventions"]["receipt"]
    generated = len(seen.activation) - seen.prompt_len
    assert steer["when"] == {"open_from": seen.prompt_len - 1, "tokens": generated + 1}
    assert never["when"]["tokens"] == seen.prompt_len - 2  # every prompt token but position 0 and the last
    assert [(f["conclusion"], f["position"]) for f in told["fired"]] == [("hot", seen.prompt_len - 1)]
    closed = chat(interventions=[STEER | {"when": f"feature({RELU}, {feature}) > 1e9"}])
    assert text_of(closed) == seen.answer["choices"][0]["message"]["content"]
    (entry,) = closed.json()["interventions"]["receipt"]
    assert (entry["fired"], entry["when"]) == (0, {"open_from": None, "tokens": 0})


# refusals ------------------------------------------------------------------------------------------------------------


def test_refused_in_the_prompt_the_model_says_nothing(chat: Chat, http: httpx.Client, seen: Seen) -> None:
    feature, threshold = seen.prompt_feature()
    position = int((seen.activation[:, feature] >= threshold).argmax())
    rules = [refuse(feature, threshold)]
    tools = [{"type": "function", "function": {"name": "x", "parameters": {"type": "object"}}}]
    for choosing in ({}, {"tools": tools, "tool_choice": "auto"}, {"tools": tools, "tool_choice": "required"}):
        body = chat(interventions=rules, logprobs=True, **choosing).json()
        (choice,) = body["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (MESSAGE, "content_filter")
        assert not choice["message"].get("tool_calls")
        assert choice["logprobs"] is None
        assert body["usage"]["completion_tokens"] == 0
    events = sse(chat(stream=True, stream_options={"include_usage": True}, interventions=rules))
    said = [e["choices"][0] for e in events[:-1] if e["choices"]]
    assert [c["delta"] for c in said] == [{"role": "assistant", "content": ""}, {"content": MESSAGE}]
    assert [c["finish_reason"] for c in said] == [None, "content_filter"]
    told = [e["interventions"]["events"] for e in events[:-1] if "events" in e.get("interventions", ())]
    assert told == [
        [
            {"id": "guard", "rule": "r1", "conclusion": "stop", "position": position},
            {"id": "guard", "action": "refuse", "conclusion": "stop", "position": position},
        ]
    ]
    (receipt,) = [e["interventions"]["receipt"][0] for e in events[:-1] if "receipt" in e.get("interventions", ())]
    assert [f["position"] for f in receipt["fired"]] == [position]  # and nothing of what was computed behind it
    assert events[-2]["usage"]["completion_tokens"] == 0
    assert count(http.get("/metrics/").text, 'editserver_rule_refusals_total{phase="prompt"} ') >= 4


def test_refused_later_the_message_is_all_of_an_answer_and_the_end_of_a_stream(chat: Chat, seen: Seen) -> None:
    feature, threshold, position = seen.answer_feature()
    n_before = position - seen.prompt_len
    fields = {"interventions": [refuse(feature, threshold)], "inspect": {"sae": RELU, "features": [feature]}}
    body = chat(**fields, logprobs=True, return_token_ids=True).json()
    (choice,) = body["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (MESSAGE, "content_filter")
    assert (choice["logprobs"], choice["token_ids"], choice["stop_reason"]) == (None, [], None)
    assert body["usage"]["completion_tokens"] == n_before
    assert [t["position"] for t in body["inspection"]["tokens"]] == list(
        range(1, position)
    )  # the withheld one is not read
    events = sse(chat(**fields, stream=True))[:-1]
    said = [e["choices"][0]["delta"].get("content") or "" for e in events if e["choices"]]
    assert "".join(said[:-1]) == "".join(seen.tokens[:n_before])
    assert said[-1] == MESSAGE
    ends = [e["choices"][0]["finish_reason"] for e in events if e["choices"]]
    assert ends == [None] * (len(ends) - 1) + ["content_filter"]
    never = chat(interventions=[refuse(feature, 1e9)], stream=True)  # one token behind, and yet all of them
    told = [e["choices"][0]["delta"].get("content") or "" for e in sse(never)[:-1] if e["choices"]]
    assert "".join(told) == seen.answer["choices"][0]["message"]["content"]


def test_openais_sdk_reads_a_refused_stream(server: Server, seen: Seen) -> None:
    feature, threshold, position = seen.answer_feature()
    ours = extra_body(interventions=[Rules(text=refuse(feature, threshold)["text"])])
    ask: Any = [{"role": "user", "content": "Tell me about Paris."}]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-") as sdk:
        fields: dict[str, Any] = {"model": MODEL, "messages": ask, "temperature": 0, "max_tokens": 12, "stream": True}
        chunks = list(sdk.chat.completions.create(**fields, extra_body=ours | {"ignore_eos": True}))
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    text = "".join(choice.delta.content or "" for choice in choices)
    assert text == "".join(seen.tokens[: position - seen.prompt_len]) + MESSAGE
    assert choices[-1].finish_reason == "content_filter"


@pytest.mark.parametrize("stream", [False, True])
def test_one_refused_choice_leaves_the_others_alone(chat: Chat, http: httpx.Client, stream: bool) -> None:
    sampled = {"n": 2, "temperature": 1.5, "seed": 11, "max_tokens": 10}
    plain = chat(**sampled, inspect={"sae": RELU, "features": list(range(N_FEATURES))}).json()
    read = [
        np.array([[one["activation"] for one in token["features"]] for token in choice["inspection"]["tokens"]])
        for choice in plain["choices"]
    ]
    margin = read[0].max(0) - read[1].max(0)
    feature = int(margin.argmax())
    below = margin[feature] * (0.5 if stream else 0.45)  # two programs: neither reads the other's prefix cache
    guard = refuse(feature, round(float(read[0][:, feature].max() - below), 4))
    answer = chat(**sampled, interventions=[guard], stream=stream)
    if not stream:
        refused, other = answer.json()["choices"]
        assert (refused["message"]["content"], refused["finish_reason"]) == (MESSAGE, "content_filter")
        assert (other["message"]["content"], other["finish_reason"]) == (
            plain["choices"][1]["message"]["content"],
            "length",
        )
        assert [len(c["interventions"]["receipt"][0]["fired"]) for c in (refused, other)] == [1, 0]
        return
    events = sse(answer)[:-1]
    said = {i: [e["choices"][0] for e in events if e["choices"] and e["choices"][0]["index"] == i] for i in (0, 1)}
    texts = {i: "".join(c["delta"].get("content") or "" for c in own) for i, own in said.items()}
    assert texts[1] == plain["choices"][1]["message"]["content"]
    whole = plain["choices"][0]["message"]["content"]
    assert texts[0].endswith(MESSAGE)
    assert whole.startswith(texts[0].removesuffix(MESSAGE))
    assert [own[-1]["finish_reason"] for own in said.values()] == ["content_filter", "length"]
    assert [e["choice"] for e in events if "receipt" in e.get("interventions", ())] == [0, 1]


@pytest.mark.parametrize("stream", [False, True])
def test_completions_are_refused_prompt_by_prompt_and_echo_stays(http: httpx.Client, seen: Seen, stream: bool) -> None:
    prompts = ["Paris is the capital", "One two three four five"]
    fields: dict[str, Any] = {"model": MODEL, "prompt": prompts, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
    read = http.post(f"/v1/saes/{RELU}/activations", json={"input": prompts, "features": list(range(N_FEATURES))})
    peaks = [
        np.max([[one["activation"] for one in token["features"]] for token in text["tokens"]], axis=0)
        for text in read.json()["data"]
    ]
    feature = int((peaks[0] - 2 * peaks[1]).argmax())
    guard = refuse(feature, round(float(peaks[0][feature] + peaks[1][feature]) / 2 + 0.001, 4), " No.")
    body = fields | {"interventions": [guard], "echo": True, "logprobs": 1, "stream": stream}
    plain = http.post("/v1/completions", json=fields | {"echo": True}).json()["choices"]
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    if stream:
        chunks = [e["choices"][0] for e in sse(answer)[:-1] if e["choices"]]
        texts = ["".join(c["text"] for c in chunks if c["index"] == i) for i in (0, 1)]
        ends = [[c["finish_reason"] for c in chunks if c["index"] == i][-1] for i in (0, 1)]
    else:
        choices = answer.json()["choices"]
        texts, ends = [c["text"] for c in choices], [c["finish_reason"] for c in choices]
        assert choices[0]["logprobs"] is None
    assert ends == ["content_filter", "length"]
    assert texts == [prompts[0] + " No.", plain[1]["text"]]


# the library, the check, the client ----------------------------------------------------------------------------------


def test_a_rule_set_of_the_library_runs_by_name_and_tells_its_normal_form(server: Server, seen: Seen) -> None:
    feature, threshold = seen.prompt_feature()
    text = f"proposition hot = feature({RELU}, {feature}) >= {threshold}\nrule r: seen(hot) -> warm\non warm: flag"
    with Client(server.url) as client:
        stored = client.rulesets.put("warmth", text, description="probe")
        assert (stored.kind, stored.version) == ("ruleset", 1)
        assert "warmth" in [one.name for one in client.rulesets.list()]
        got = client.rulesets.get("warmth")
        assert got.body == {"text": text, "description": "probe", "meta": {}}
        normal = client.rulesets.check(text)
        assert got.normal == normal
        assert client.rulesets.check(normal.json_form).digest == normal.digest
        ask = [{"role": "user", "content": "Tell me about Paris."}]
        with client.chat_stream(ask, interventions=[Rules("warmth", id="w")], temperature=0, max_tokens=4) as stream:
            events = list(stream)
        kinds = [type(event) for event in events]
        assert kinds[:2] == [RuleEvent, ActionEvent]
        assert TextDelta in kinds[2:]
        (entry,) = stream.receipt.rules
        assert (entry.digest, entry.fired[0].rule) == (normal.digest, "r")
        assert entry.fired[0].explain().startswith(f"warm at token {events[0].position}, by rule r\n  seen(hot) at ")
        with pytest.raises(RuleError) as caught:
            client.chat(
                ask, interventions=[Steer(sae=TOPK, feature=3, when=f"seen(\nfeature({RELU}, {N_FEATURES}) > 1)")]
            )
        error = caught.value
        assert (error.code, error.param, error.line) == ("unknown_feature", "interventions[0].when", 2)
        client.rulesets.delete("warmth")
        with pytest.raises(Exception, match="no ruleset 'warmth' in the library"):
            client.chat(ask, interventions=[Rules("warmth")])


HOT = f"feature({RELU}, 3) > 1"
MANY = "\n".join(f"rule: feature({RELU}, {i}) > 1 -> c" for i in range(65))
BAD: list[tuple[dict[str, Any], str, str | None, tuple[int, int] | None]] = [
    ({"text": f"rule r: {HOT} ->"}, "rule_syntax", "text", (1, len(f"rule r: {HOT} ->") + 1)),
    ({"text": f"rule r: {HOT} -> a\non b: flag"}, "rule_syntax", "text", (2, 4)),
    ({"text": "rule r: toxcity -> a"}, "unknown_concept", "text", (1, 9)),
    ({"text": "rule r: feature(nope, 3) > 1 -> a"}, "unknown_sae", "text", (1, 17)),
    ({"text": "rule r: not b -> a\nrule s: not a -> b"}, "rule_syntax", "text", (1, 6)),
    ({"text": f"rule r: not seen({HOT}) -> latch a"}, "rule_syntax", "text", (1, 6)),
    ({"text": MANY}, "limit_exceeded", "text", None),
    (
        {"text": f"rule r: feature({TOPK}, 3) > 1 -> a\non a: do " + json.dumps(STEER | {"sae": RELU})},
        "rule_layer_order",
        "text",
        (2, 4),
    ),
    (
        {
            "rules": [{"if": {"and": [HOT, {"not": {"seen": "b"}}]}, "then": "a"}],
        },
        "unknown_concept",
        "rules[0].if.and[1].not.seen",
        None,
    ),
    (
        {"rules": [{"if": HOT, "then": "a"}], "actions": [{"on": "a", "do": STEER | {"feature": N_FEATURES}}]},
        "unknown_feature",
        "actions[0].do.feature",
        None,
    ),
    ({"rules": [], "text": ""}, "rule_syntax", "text", None),
]


@pytest.mark.parametrize(("ruleset", "code", "param", "place"), BAD)
def test_a_bad_rule_set_is_refused_with_its_place_wherever_it_comes(
    http: httpx.Client, ruleset: dict[str, Any], code: str, param: str | None, place: tuple[int, int] | None
) -> None:
    for answer in (
        http.post("/v1/rulesets/check", json=ruleset),
        http.put("/v1/library/rulesets/bad", json=ruleset),
    ):
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == (code, param), error
        if place is not None:
            assert (error["line"], error["column"]) == place, error
    if "rules" in ruleset and "text" in ruleset:
        return
    body = {"model": MODEL, "prompt": "a b", "max_tokens": 2, "interventions": [{"type": "rules"} | ruleset]}
    error = http.post("/v1/completions", json=body).json()["error"]
    assert (error["code"], error["param"]) == (code, f"interventions[0].{param}"), error
    assert place is None or (error["line"], error["column"]) == place


@pytest.mark.parametrize(
    ("entry", "code", "param"),
    [
        ({"ruleset": "nope"}, "unknown_ruleset", "interventions[0].ruleset"),
        ({}, "invalid_intervention", "interventions[0]"),
        ({"ruleset": "a", "text": "b"}, "invalid_intervention", "interventions[0]"),
        ({"text": f"rule r: {HOT} -> a", "tokens": "prompt"}, "invalid_intervention", "interventions[0].tokens"),
        ({"text": f"rule r: {HOT} -> a", "when": "b"}, "unknown_concept", "interventions[0].when"),
        ({"text": f"rule r: {HOT} -> a", "rule": []}, "invalid_intervention", "interventions[0].rule"),
    ],
)
def test_a_bad_rules_entry_is_refused_by_field(
    http: httpx.Client, entry: dict[str, Any], code: str, param: str
) -> None:
    body = {"model": MODEL, "prompt": "a b", "max_tokens": 2, "interventions": [{"type": "rules"} | entry]}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param), error


def test_a_rule_set_without_rules_is_a_no_op(chat: Chat, seen: Seen) -> None:
    answer = chat(interventions=[{"type": "rules", "text": f"proposition hot = {HOT}", "id": "idle"}])
    assert text_of(answer) == seen.answer["choices"][0]["message"]["content"]
    told = answer.json()["interventions"]
    assert told["digest"] is None
    assert (told["receipt"][0]["noop"], told["receipt"][0]["fired"]) == (True, [])


def test_unknown_rule_sets_are_not_found_and_other_paths_do_not_exist(http: httpx.Client) -> None:
    answer = http.get("/v1/library/rulesets/nope")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_ruleset")
    assert http.post("/v1/rulesets/chek", json={}).status_code == 404
    assert http.post("/v1/rulesets/check", content=b"{").json()["error"]["code"] == "rule_syntax"
    empty = http.post("/v1/rulesets/check", json={"text": ""}).json()
    assert (empty["text"], empty["rules"]) == ("", [])
