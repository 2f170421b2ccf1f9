"""A second server with an API key, a refused dose, a tiny bank and no full encode: what operators can set is kept."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from sae_weights.formats import save_native
from tests.engine.dictionaries import random_sae

from .conftest import D_MODEL, MODEL, RELU, TOPK, Server, make_probes, sse, start_server

pytestmark = pytest.mark.engine

CHEAP = "cheap/l20"
KEY = {"Authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("strict")
    flags = [part for name, path in make_probes(folder).items() for part in ("--sae", f"{name}={path}")]
    calibrated = random_sae("topk", D_MODEL, layer=20, metadata={"calibrated_threshold": 1.5})
    flags += ["--sae", f"{CHEAP}={save_native(calibrated, folder / 'cheap')}", "--approximate", CHEAP]
    flags += ["--max_dose", "0.3:refuse", "--api-key", "secret", "--bank-rows", "4", "--limit", "rows=4"]
    flags += ["--limit", "top_k=2", "--full-encode", "none", "--library", str(folder / "library"), "--enforce-eager"]
    with start_server(folder, *flags) as running:
        yield running


@pytest.fixture(scope="module")
def http(strict: Server) -> Iterator[httpx.Client]:
    with strict.client(headers=KEY) as client:
        yield client


def ask(http: httpx.Client, strength: float, **fields: Any) -> httpx.Response:
    steer = {
        "type": "steer",
        "sae": RELU,
        "feature": fields.pop("feature", 3),
        "strength": strength,
        "mode": "normalized",
    }
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6, "temperature": 0}
    return http.post("/v1/chat/completions", json=body | {"interventions": [steer]} | fields)


def test_without_the_key_nothing_of_ours_is_served(strict: Server) -> None:
    paths = ["/v1/capabilities", "/v1/saes", f"/v1/saes/{RELU}", f"/v1/saes/{RELU}/features", "/v1/library/vectors"]
    with strict.client() as stranger:
        answers = [stranger.get(path) for path in paths]
        answers += [stranger.put("/v1/library/vectors/a", json={}), stranger.delete("/v1/library/vectors/a")]
        answers += [stranger.post(f"/v1/saes/{RELU}/activations", json={"input": "a b"}), ask(stranger, 0.1)]
        answers += [stranger.post("/v1/concepts/fit", json={}), stranger.get("/v1/jobs"), stranger.delete("/v1/jobs/x")]
        for answer in answers:
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "unauthorized"
        assert stranger.get("/health").status_code == 200


def test_a_dose_above_the_bound_ends_the_request(http: httpx.Client) -> None:
    answer = ask(http, 0.9)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "dose_exceeded")
    assert ask(http, 0.25).json()["interventions"]["receipt"][0]["dose_max"] == pytest.approx(0.25, rel=0.05)


def test_a_dose_above_the_bound_ends_a_stream_with_an_error_and_no_text(http: httpx.Client) -> None:
    events = sse(ask(http, 0.9, stream=True))
    assert events[-1] == "[DONE]"
    assert events[-2]["error"]["code"] == "dose_exceeded"
    assert not any(choice["delta"].get("content") for event in events[:-2] for choice in event["choices"])
    assert not any("interventions" in event for event in events[:-1])


def test_limits_that_the_operator_set_are_published_and_kept(http: httpx.Client) -> None:
    limits = http.get("/v1/capabilities").json()["limits"]
    assert (limits["rows"], limits["bank_rows"], limits["top_k"]) == (4, 4, 2)
    assert (limits["max_dose"], limits["max_dose_mode"]) == (0.3, "refuse")
    features = [{"index": i, "op": "ablate"} for i in range(5)]
    answer = ask(http, 0.1, interventions=[{"type": "edit_features", "sae": RELU, "features": features}])
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "limit_exceeded")


def test_what_needs_the_full_encode_is_refused_with_the_flag(http: httpx.Client) -> None:
    edit = {"type": "edit_features", "sae": TOPK, "features": [{"index": 1, "op": "ablate"}]}
    for fields in ({"interventions": [edit]}, {"interventions": None, "inspect": {"sae": RELU, "top_k": 1}}):
        error = ask(http, 0.1, **fields).json()["error"]
        assert "--full-encode" in error["message"]
    fit = {"name": "c", "sae": RELU, "concepts": {"a": ["a b"], "b": ["c d"]}, "target": "a"}
    error = http.post("/v1/concepts/fit", json=fit).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_artifact", "sae")
    assert f"--full-encode {RELU}" in error["message"]
    saes = {sae["id"]: sae for sae in http.get("/v1/saes").json()["data"]}
    assert (saes[RELU]["editable"], saes[RELU]["top_k"]) == (True, False)
    assert (saes[TOPK]["editable"], saes[TOPK]["top_k"], saes[TOPK]["execution"]) == (False, False, "dictionary")
    assert f"--full-encode {TOPK}" in saes[TOPK]["reason"]
    assert f"--approximate {TOPK}" in saes[TOPK]["reason"]


def test_edits_and_readings_of_a_stand_in_say_that_they_are_approximate(http: httpx.Client) -> None:
    edit = {"type": "edit_features", "sae": CHEAP, "features": [{"index": 1, "op": "add", "value": 2}]}
    exact = {"type": "edit_features", "sae": RELU, "features": [{"index": 1, "op": "add", "value": 2}]}
    along = {"type": "steer", "sae": CHEAP, "feature": 1}
    inspect = [{"sae": CHEAP, "features": [1, 2]}, {"sae": RELU, "features": [1]}]
    for stream in (False, True):
        answer = ask(http, 0.1, interventions=[edit, exact, along], inspect=inspect, stream=stream)
        assert answer.status_code == 200, answer.text
        bodies = [e for e in sse(answer) if e != "[DONE]"] if stream else [answer.json()]
        receipts = [body["interventions"]["receipt"] for body in bodies if "interventions" in body]
        assert [entry.get("approximate") for entry in receipts[0]] == [True, None, None]
        assert receipts[0][0]["fired"] > 0
        seen = [body["inspection"] for body in bodies if "inspection" in body]
        assert seen
        assert all([one.get("approximate") for one in both] == [True, None] for both in seen)
    saes = {sae["id"]: sae for sae in http.get("/v1/saes").json()["data"]}
    shown = saes[CHEAP]
    assert (shown["editable"], shown["approximate"], shown["architecture"]) == (True, True, "jumprelu")
    assert shown["approximates"] == "topk (k = 12)"
    assert [saes[name]["approximate"] for name in (RELU, TOPK)] == [False, False]
    read = http.post(f"/v1/saes/{CHEAP}/activations", json={"input": "a b", "features": [1]}).json()
    assert read["approximate"] is True


def test_a_full_bank_queues_and_beyond_four_banks_is_429(http: httpx.Client) -> None:
    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda i: ask(http, 0.1, feature=i, max_tokens=40, ignore_eos=True, n=1), range(40)))
    refused = [answer for answer in answers if answer.status_code == 429]
    done = [answer for answer in answers if answer.status_code == 200]
    assert len(refused) + len(done) == 40
    assert refused, "40 requests with a row each never were more than 16 at once"
    assert all(answer.json()["error"]["code"] == "capacity" and answer.headers["Retry-After"] for answer in refused)
    assert len(done) >= 16
    assert all(answer.json()["interventions"]["receipt"][0]["fired"] > 0 for answer in done)
    assert "editserver_bank_rows_in_use 0.0" in http.get("/metrics/").text
