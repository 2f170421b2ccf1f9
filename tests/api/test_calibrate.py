"""Calibration on a real server: at the strength returned, the KL is the target; what cannot be reached is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from editserver.api.passes import MAX_CALIBRATION_PROMPTS
from editserver.catalogue import build_catalogue, open_sae
from editserver.cli.main import app
from editserver.demo.model import ensure_demo_model
from editserver.engine.config import EngineConfig
from editserver.settings import Settings
from editserver_client import BadRequest, Client, Steer
from interventions.compile import compile_request
from interventions.reference import ReferenceExecutor
from interventions.spec import parse_interventions

from .conftest import D_MODEL, MODEL, N_FEATURES, RELU, Server, make_probes, start_server

pytestmark = pytest.mark.engine

PROMPTS = [
    "The capital of France is Paris, and the river that runs through it is called the",
    "Once upon a time a small dragon lived in a cave by the sea and",
    "Water boils at one hundred degrees, but on a high mountain it boils",
]
TARGET = 0.5
STEER = {"type": "steer", "sae": RELU, "feature": 3}
EDIT = {"type": "edit_features", "sae": RELU, "features": [{"index": 3, "op": "add", "value": 1}]}
Ask = Callable[..., httpx.Response]
Divergence = Callable[[dict[str, Any]], float]


@pytest.fixture(scope="session")
def ask(http: httpx.Client) -> Ask:
    def post(intervention: Any = STEER, **fields: Any) -> httpx.Response:
        body = {"intervention": intervention, "prompts": PROMPTS, "target_kl": TARGET} | fields
        return http.post("/v1/calibrate_strength", json=body)

    return post


@pytest.fixture(scope="module")
def divergence(http: httpx.Client, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Divergence]:
    """Mean next-token KL of an intervention on PROMPTS by plain ``transformers`` in fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = ensure_demo_model()
    folder = tmp_path_factory.mktemp("reference")
    source = open_sae(f"{RELU}={make_probes(folder)[RELU]}").source()
    catalogue = build_catalogue(
        EngineConfig(armed=(10, 15, 20), saes=(source,), full_encode=(RELU,)),
        Settings(library=folder / "library"),
        d_model=D_MODEL,
        n_layers=30,
        vocab_size=49152,
        tokenizer=AutoTokenizer.from_pretrained(path),
    )
    sae = catalogue.sae(RELU).sae
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    reference = ReferenceExecutor(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), {sae.digest: sae})
    tokens = [http.post("/tokenize", json={"model": MODEL, "prompt": p}).json()["tokens"] for p in PROMPTS]

    def distribution(ids: list[int], payload: Any) -> torch.Tensor:
        return reference.forward(ids, len(ids), payload).logits[-1].double().log_softmax(dim=-1)

    clean = [distribution(ids, None) for ids in tokens]

    def measure(intervention: dict[str, Any]) -> float:
        payload = compile_request(parse_interventions([intervention]), [], catalogue).payload()
        edited = [distribution(ids, payload) for ids in tokens]
        return float(torch.stack([(p.exp() * (p - q)).sum() for p, q in zip(clean, edited, strict=True)]).mean())

    yield measure
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "intervention",
    [
        STEER,
        STEER | {"strength": -40},
        STEER | {"mode": "normalized", "strength": 0.1},
        STEER | {"tokens": "last_prompt_token"},
        EDIT,
        EDIT | {"features": [{"index": 3, "op": "set", "value": -1}, {"index": 5, "op": "add", "value": 2}]},
    ],
    ids=["add", "negative", "normalized", "last token", "add to a latent", "set and add"],
)
def test_the_kl_at_the_returned_strength_is_the_target_by_plain_transformers(
    ask: Ask, divergence: Divergence, intervention: dict[str, Any]
) -> None:
    answer = ask(intervention)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["within_tolerance"]
    assert found["kl"] == pytest.approx(TARGET, rel=0.05)
    assert found["prompts"] == len(PROMPTS)
    # The server runs in bfloat16, the reference in float32.
    assert divergence(found["intervention"]) == pytest.approx(TARGET, rel=0.15)
    strengths = [abs(point["strength"]) for point in found["curve"]]
    assert strengths == sorted(strengths)
    assert len(strengths) <= 20
    assert found["strength"] in [point["strength"] for point in found["curve"]]


def test_the_servers_kl_is_exact_not_a_bound_from_a_few_tokens(ask: Ask, divergence: Divergence) -> None:
    """Over the whole vocabulary the server's KL and the reference's agree at every strength that was run."""
    for point in ask(target_kl=3.0).json()["curve"]:
        expected = divergence(STEER | {"strength": point["strength"]})
        assert point["kl"] == pytest.approx(expected, rel=0.1, abs=0.02), point


def test_twice_the_strength_has_more_effect(ask: Ask, divergence: Divergence) -> None:
    found = ask().json()
    twice = found["intervention"] | {"strength": 2 * found["strength"]}
    assert divergence(twice) > 1.5 * divergence(found["intervention"])


def test_a_larger_target_takes_a_larger_strength_and_dose(ask: Ask) -> None:
    small, large = ask(target_kl=0.1).json(), ask(target_kl=1.0).json()
    assert 0 < small["strength"] < large["strength"]
    assert 0 < small["dose_mean"] < large["dose_mean"]


def test_sign_and_proportions_of_what_was_given_are_kept(ask: Ask) -> None:
    assert ask(STEER | {"strength": -5}).json()["strength"] < 0
    edits = [
        {"index": 3, "op": "set", "value": -1},
        {"index": 5, "op": "add", "value": 2},
        {"index": 7, "op": "scale", "value": 0.5},
    ]
    found = ask(EDIT | {"features": edits, "id": "mine"}).json()
    first, second, third = found["intervention"]["features"]
    assert first["value"] == pytest.approx(found["strength"])
    assert found["strength"] < 0
    assert second["value"] == pytest.approx(-2 * first["value"])
    assert third == edits[2]
    assert found["intervention"]["id"] == "mine"


def test_the_dose_is_that_of_the_receipts_of_an_ordinary_request(http: httpx.Client, ask: Ask) -> None:
    found = ask().json()
    body = {"model": MODEL, "prompt": PROMPTS, "max_tokens": 1, "interventions": [found["intervention"]]}
    choices = http.post("/v1/completions", json=body | {"temperature": 0}).json()["choices"]
    entries = [choice["interventions"]["receipt"][0] for choice in choices]
    if all(entry["computed_from"] == 0 for entry in entries):  # nothing came from the prefix cache
        fired = sum(entry["fired"] for entry in entries)
        mean = sum(entry["fired"] * entry["dose_mean"] for entry in entries) / fired
        assert found["dose_mean"] == pytest.approx(mean, rel=0.02)
    assert found["dose_max"] == pytest.approx(max(entry["dose_max"] for entry in entries), rel=0.02)
    assert found["clamped"] == 0


def test_chats_are_prompts_too(ask: Ask) -> None:
    chats = [[{"role": "user", "content": "Tell me about Paris."}], "plain text as well"]
    found = ask(prompts=chats).json()
    assert found["prompts"] == 2
    assert found["kl"] == pytest.approx(TARGET, rel=0.05)


def test_the_same_question_has_the_same_answer(ask: Ask) -> None:
    """Nothing is read from the prefix cache, so a second run computes what the first did."""
    one, other = ask().json(), ask().json()
    assert other["strength"] == pytest.approx(one["strength"], rel=0.05)
    assert other["dose_mean"] == pytest.approx(one["dose_mean"], rel=0.05)


def test_library_vectors_over_several_layers_are_calibrated(http: httpx.Client, ask: Ask) -> None:
    generator = torch.Generator().manual_seed(0)
    layers = {str(layer): torch.randn(D_MODEL, generator=generator).tolist() for layer in (10, 20)}
    http.put("/v1/library/vectors/calibrated", json={"layers": layers}).raise_for_status()
    found = ask({"type": "steer", "vector": "calibrated", "strength": 1}).json()
    assert found["kl"] == pytest.approx(TARGET, rel=0.05)
    assert found["dose_mean"] > 0


def test_an_edit_that_never_acts_is_refused_with_the_largest_kl(http: httpx.Client, ask: Ask) -> None:
    sae = next(one["id"] for one in http.get("/v1/saes").json()["data"] if one["id"].startswith("smollm2-135m/"))
    seen = http.post(f"/v1/saes/{sae}/activations", json={"input": PROMPTS, "top_k": 128}).json()["data"]
    active = {feature["index"] for text in seen for token in text["tokens"] for feature in token["features"]}
    silent = min(set(range(1000)) - active)
    features = [{"index": silent, "op": "set", "value": 1, "only_if_active": True}]
    answer = ask({"type": "edit_features", "sae": sae, "features": features})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("invalid_intervention", "target_kl")
    assert "largest is" in error["message"]


def test_a_target_beyond_what_an_edit_can_do_is_refused(ask: Ask) -> None:
    answer = ask(STEER | {"tokens": {"from": 1, "to": 2}}, target_kl=20)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("invalid_intervention", "target_kl")
    assert "largest is" in error["message"]


def test_an_edit_that_acts_however_small_is_refused_from_above(ask: Ask) -> None:
    features = [{"index": i, "op": "ablate"} for i in range(4, N_FEATURES)]
    answer = ask(EDIT | {"features": [{"index": 3, "op": "add", "value": 1}, *features]}, target_kl=0.001)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == "target_kl"
    assert "smallest KL" in error["message"]


def test_the_publics_logprobs_stay_within_vllms_limit(http: httpx.Client) -> None:
    body = {"model": MODEL, "prompt": "a b", "max_tokens": 1}
    for too_many in (21, -1):
        assert http.post("/v1/completions", json=body | {"logprobs": too_many}).status_code == 400
    assert http.post("/v1/completions", json=body | {"logprobs": 20}).status_code == 200


BAD: list[tuple[dict[str, Any], str, str | None]] = [
    ({"intervention": ...}, "invalid_intervention", "intervention"),
    ({"intervention": None}, "invalid_intervention", "intervention"),
    ({"intervention": [STEER]}, "invalid_intervention", "intervention"),
    ({"intervention": {"type": "steer"}}, "invalid_intervention", "intervention"),
    ({"intervention": {"type": "rules", "ruleset": "m"}}, "invalid_intervention", "intervention.type"),
    ({"intervention": {"type": "remap", "map": "m"}}, "unknown_map", "intervention.map"),
    ({"intervention": {"type": "remap", "map": "m", "strength": 0}}, "invalid_intervention", "intervention.strength"),
    ({"intervention": STEER | {"feature": N_FEATURES}}, "unknown_feature", "intervention.feature"),
    ({"intervention": STEER | {"sae": "nope"}}, "unknown_sae", "intervention.sae"),
    ({"intervention": {"type": "steer", "vector": "nope"}}, "unknown_vector", "intervention.vector"),
    ({"intervention": STEER | {"strength": 0}}, "invalid_intervention", "intervention.strength"),
    ({"intervention": STEER | {"mode": "cap", "max": 1}}, "invalid_intervention", "intervention.mode"),
    ({"intervention": STEER | {"tokens": "generated"}}, "invalid_intervention", "intervention.tokens"),
    ({"intervention": STEER | {"tokens": {"from": 500}}}, "invalid_intervention", "intervention.tokens"),
    (
        {"intervention": {"type": "steer", "values": [0.0] * D_MODEL, "layer": 15}},
        "invalid_intervention",
        "intervention",
    ),
    (
        {"intervention": {"type": "steer", "values": [1.0] * D_MODEL, "layer": 3}},
        "layer_not_armed",
        "intervention.layer",
    ),
    (
        {"intervention": EDIT | {"features": [{"index": 3, "op": "ablate"}]}},
        "invalid_intervention",
        "intervention.features",
    ),
    (
        {"intervention": EDIT | {"features": [{"index": 3, "op": "set", "value": 0}]}},
        "invalid_intervention",
        "intervention.features",
    ),
    (
        {"intervention": EDIT | {"features": [{"index": -1, "op": "set", "value": 1}]}},
        "unknown_feature",
        "intervention.features[0].index",
    ),
    ({"prompts": ...}, "invalid_intervention", "prompts"),
    ({"prompts": []}, "invalid_intervention", "prompts"),
    ({"prompts": "one"}, "invalid_intervention", "prompts"),
    ({"prompts": [3]}, "invalid_intervention", "prompts[0]"),
    ({"prompts": ["a b", ""]}, "invalid_intervention", "prompts[1]"),
    ({"prompts": ["word " * 1100]}, "invalid_intervention", "prompts[0]"),
    ({"prompts": ["a b"] * (MAX_CALIBRATION_PROMPTS + 1)}, "limit_exceeded", "prompts"),
    ({"target_kl": 0}, "invalid_intervention", "target_kl"),
    ({"target_kl": 1000}, "invalid_intervention", "target_kl"),
    ({"target_kl": float("nan")}, "invalid_intervention", "target_kl"),
    ({"target_kl": "0.5"}, "invalid_intervention", "target_kl"),
    ({"target": 0.5}, "invalid_intervention", "target"),
]


@pytest.mark.parametrize(("fields", "code", "param"), BAD)
def test_a_bad_body_is_refused_by_its_field(
    http: httpx.Client, fields: dict[str, Any], code: str, param: str | None
) -> None:
    body = {"intervention": STEER, "prompts": PROMPTS} | fields
    content = json.dumps({name: value for name, value in body.items() if value is not ...})
    answer = http.post("/v1/calibrate_strength", content=content)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param), error
    assert "interventions[0]" not in error["message"]


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
CHANGES = st.dictionaries(
    st.sampled_from(["type", "sae", "feature", "features", "strength", "mode", "tokens", "values", "layer", "id", "x"]),
    SCALARS | st.lists(SCALARS, max_size=2),
    min_size=1,
    max_size=2,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=CHANGES, base=st.sampled_from([STEER, EDIT]), prompts=st.lists(st.text(max_size=8) | SCALARS, max_size=2)
)
def test_any_json_is_either_answered_or_a_4xx(http: httpx.Client, changes: Any, base: Any, prompts: Any) -> None:
    content = json.dumps({"intervention": base | changes, "prompts": prompts})
    answer = http.post("/v1/calibrate_strength", content=content)
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, (content, answer.text)
    if answer.status_code != 200:
        assert isinstance(answer.json()["error"]["code"], str)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"[" * 100_000])
def test_a_body_that_is_no_object_is_a_400(http: httpx.Client, content: bytes) -> None:
    assert http.post("/v1/calibrate_strength", content=content).status_code == 400


def test_limits_and_schema_are_published(http: httpx.Client) -> None:
    assert http.get("/v1/capabilities").json()["limits"]["calibration_prompts"] == MAX_CALIBRATION_PROMPTS
    api = http.get("/openapi.json").json()
    schema = api["paths"]["/v1/calibrate_strength"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["properties"]) == {"intervention", "prompts", "target_kl"}
    for reference in schema["properties"]["intervention"]["oneOf"]:
        assert reference["$ref"].rsplit("/", 1)[1] in api["components"]["schemas"]


def test_the_client_and_the_command_line_ask_the_same(server: Server, tmp_path: Path) -> None:
    with Client(server.url) as client:
        found = client.calibrate_strength(Steer(sae=RELU, feature=3), PROMPTS)
        assert found.kl == pytest.approx(TARGET, rel=0.05)
        with pytest.raises(BadRequest) as caught:
            client.calibrate_strength(Steer(sae=RELU, feature=3, tokens="generated"), PROMPTS)
        assert caught.value.param == "intervention.tokens"
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS), encoding="utf-8")
    arguments = ["calibrate", "--sae", RELU, "--feature", "3", "--prompt", str(file), "--url", server.url]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(result.output)["strength"] == pytest.approx(found.strength, rel=0.05)
    table = CliRunner().invoke(app, arguments, env={"COLUMNS": "120"})
    assert table.exit_code == 0
    edit = json.loads(table.output.strip().splitlines()[-1])
    assert edit["interventions"][0]["feature"] == 3
    assert CliRunner().invoke(app, [*arguments, "--target-kl", "0"]).exit_code == 2


@pytest.fixture(scope="module", params=["clamp", "refuse"])
def bounded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Server]]:
    """A server with a small largest dose and without the full encode."""
    folder = tmp_path_factory.mktemp("bounded")
    flags = ["--sae", f"{RELU}={make_probes(folder)[RELU]}", "--max-dose", f"0.05:{request.param}"]
    flags += [
        "--full-encode",
        "none",
        "--library",
        str(folder / "library"),
        "--enforce-eager",
        "--max-model-len",
        "512",
    ]
    with start_server(folder, *flags) as running:
        yield request.param, running


def test_a_bounded_dose_bounds_what_can_be_reached(bounded: tuple[str, Server]) -> None:
    mode, server = bounded
    with server.client() as http:
        answer = http.post("/v1/calibrate_strength", json={"intervention": STEER, "prompts": PROMPTS, "target_kl": 3.0})
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("dose_exceeded", "target_kl")
        assert "0.05" in error["message"]
        assert ("scaled down" if mode == "clamp" else "refuses") in error["message"]
        found = re.search(r"the largest is ([\d.e-]+) at strength", error["message"])
        assert found, error["message"]
        within = {"intervention": STEER, "prompts": PROMPTS, "target_kl": float(found[1]) / 2}
        small = http.post("/v1/calibrate_strength", json=within)
        assert small.status_code == 200, small.text
        assert small.json()["dose_max"] <= 0.0501
        # And contrast needs what this server does not compute.
        refused = http.post(f"/v1/saes/{RELU}/contrast", json={"positive": ["a b"], "negative": ["c d"]})
        assert refused.status_code == 400
        assert "--full-encode" in refused.json()["error"]["message"]
