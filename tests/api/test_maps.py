"""Maps in the library and in requests: what is stored, what is refused, and that the server does what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from editserver.catalogue import build_catalogue, open_sae
from editserver.engine.config import EngineConfig
from editserver.library import MapLibrary
from editserver.settings import Settings
from editserver_client import Client, Remap
from interventions.errors import InterventionError
from interventions.maps.body import from_body, to_body
from interventions.maps.gates import START, CusumGate, Gate, ShareGate, WindowGate, advance
from interventions.maps.map import LatentMap, MentionTokens, SequenceGate, TriggerTokens
from interventions.maps.mentions import mention_ends, mention_positions
from interventions.maps.transfer import Transfer, Unit, clamp_active, clamp_hit, interpolate, move
from sae_weights.formats import load_sae
from sae_weights.sae import SAE

from .conftest import MODEL, N_FEATURES, RELU, TOPK, Server, make_probes, sse

Post = Callable[..., httpx.Response]
Put = Callable[..., LatentMap]


@pytest.fixture(scope="session")
def probes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SAE]:
    """The probe dictionaries of the shared server, by id."""
    return {name: load_sae(path) for name, path in make_probes(tmp_path_factory.mktemp("probes")).items()}


def make_map(sae: SAE, layer: int, *transfers: Transfer, **fields: Any) -> LatentMap:
    ordered = tuple(sorted(transfers or (interpolate(3, 2.5), *move(5, 9)), key=lambda t: t.latent))
    return LatentMap(**({"model": MODEL, "sae": sae.digest, "layer": layer, "transfers": ordered} | fields))


@pytest.fixture
def fitted(probes: dict[str, SAE]) -> LatentMap:
    gate = SequenceGate(ShareGate(0.25), (3, 5))
    return make_map(probes[RELU], 15, scope=MentionTokens(((12, 13), (7042,)), "last", ("Paris",)), gate=gate)


# the library ---------------------------------------------------------------------------------------------------------


def test_content_comes_back_as_it_was_put(tmp_path: Path, fitted: LatentMap) -> None:
    library = MapLibrary(tmp_path)
    first = library.put("paris", fitted)
    assert (first.kind, first.version, first.digest) == ("map", 1, fitted.digest)
    assert MapLibrary(tmp_path).get("paris") == fitted
    assert library.put("paris", fitted) == first
    assert library.put("paris", replace(fitted, report={"leak": 0.5})).version == 2
    assert (tmp_path / "maps" / "names" / "paris.json").exists()
    with pytest.raises(InterventionError) as caught:
        library.get("pari")
    assert caught.value.code == "unknown_map"
    assert caught.value.message == "no map 'pari' in the library, which has paris. Did you mean 'paris'?"
    library.delete("paris")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stem != first.digest]


def test_damaged_files_are_errors_not_edits(tmp_path: Path, fitted: LatentMap) -> None:
    listing = MapLibrary(tmp_path).put("paris", fitted)
    path = tmp_path / "maps" / "objects" / f"{listing.digest}.safetensors"
    for damage in (MapLibrary(tmp_path).encode(replace(fitted, gate=None))["safetensors"], b"x", b""):
        path.write_bytes(damage)
        with pytest.raises(InterventionError, match="put it again") as caught:
            MapLibrary(tmp_path).get("paris")
        assert caught.value.code == "invalid_artifact"


def test_a_map_is_bound_to_its_model_sae_and_layer(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, probes: dict[str, SAE], fitted: LatentMap
) -> None:
    opened = [open_sae(f"{name}={path}") for name, path in make_probes(tmp_path_factory.mktemp("again")).items()]
    config = EngineConfig((15, 20), tuple(one.source() for one in opened), ())
    shape = {"d_model": 576, "n_layers": 30, "vocab_size": 7043, "tokenizer": None}
    catalogue = build_catalogue(config, Settings(library=tmp_path), **shape, model=MODEL)
    assert catalogue.dictionary_of_map(fitted).id == RELU
    outside = MentionTokens(((7043,),))
    wrong = {
        "model": replace(fitted, model="another"),
        "sae": replace(fitted, sae="0" * 64),
        "layer": replace(fitted, layer=14),
        "transfers": replace(fitted, gate=SequenceGate(ShareGate(0.25), (N_FEATURES,))),
        "transfers[0]": make_map(probes[RELU], 15, Transfer(3, beta=1e39)),
        "scope.sequences[0]": replace(fitted, scope=outside),
    }
    for param, bad in wrong.items():
        with pytest.raises(InterventionError) as caught:
            catalogue.dictionary_of_map(bad)
        assert (caught.value.code, caught.value.param) == ("invalid_artifact", param)
        catalogue.maps.put("bad", bad)  # as another server of the same folder may
        with pytest.raises(InterventionError, match="map 'bad' is not of this server") as caught:
            catalogue.map("bad")
        assert (caught.value.code, caught.value.param) == ("invalid_artifact", None)
    unnamed = build_catalogue(config, Settings(library=tmp_path), **shape)
    assert unnamed.dictionary_of_map(wrong["model"]).id == RELU


# over HTTP -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def put(http: httpx.Client, probes: dict[str, SAE]) -> Put:
    """``put(*transfers, sae=RELU, name="m", scope=…, gate=…)``: the map, as the server now has it under that name."""

    def store(*transfers: Transfer, sae: str = RELU, name: str = "m", **fields: Any) -> LatentMap:
        made = make_map(probes[sae], {RELU: 15, TOPK: 20}[sae], *transfers, **fields)
        answer = http.put(f"/v1/library/maps/{name}", json=to_body(made))
        assert answer.status_code == 200, answer.text
        return made

    return store


@pytest.fixture
def complete(http: httpx.Client) -> Post:
    """POST one short greedy completion of a prompt, or of a list of them."""

    def post(prompt: Any = "Rome, Paris and New York: in Paris, the river", **fields: Any) -> Any:
        body = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 8, "ignore_eos": True}
        answer = http.post("/v1/completions", json=body | {"interventions": [{"type": "remap", "map": "m"}]} | fields)
        assert answer.status_code == 200, answer.text
        return answer.json()

    return post


def ids_of(http: httpx.Client, text: str) -> list[int]:
    body = {"model": MODEL, "prompt": text, "add_special_tokens": False}
    return list(http.post("/tokenize", json=body).json()["tokens"])


@pytest.mark.engine
def test_a_map_is_put_used_listed_changed_and_deleted_over_http(
    http: httpx.Client, chat: Post, probes: dict[str, SAE]
) -> None:
    path, made = "/v1/library/maps/forget.v1", make_map(probes[RELU], 15, *(interpolate(j, 30.0) for j in range(9)))
    listing = http.put(path, json=to_body(made)).json()
    assert (listing["name"], listing["kind"], listing["version"]) == ("forget.v1", "map", 1)
    assert listing["digest"] == made.digest
    assert listing in http.get("/v1/library/maps").json()["data"]
    assert listing not in http.get("/v1/library/concepts").json()["data"]
    body = http.get(path).json()["body"]
    assert from_body(body).digest == made.digest
    assert http.put(path, json=body).json() == listing
    remap = {"type": "remap", "map": "forget.v1"}
    digests = set()
    for strength in (0.5, 1.0, 2.0):
        part = chat(interventions=[remap | {"strength": strength}]).json()["interventions"]
        (entry,) = part["receipt"]
        assert (entry["type"], entry["layer"], "gate" in entry) == ("remap", 15, False)
        assert entry["fired"] == entry["tokens_edited"] > 0
        digests.add(part["digest"])
    assert len(digests) == 3
    assert chat(interventions=[remap]).json()["interventions"]["digest"] in digests
    other = make_map(probes[RELU], 15)
    assert http.put(path, json=to_body(other)).json()["version"] == 2
    assert chat(interventions=[remap]).json()["interventions"]["digest"] not in digests
    nothing = chat(interventions=[remap | {"strength": 0}]).json()["interventions"]
    assert (nothing["digest"], nothing["receipt"][0]["noop"]) == (None, True)
    near = chat(interventions=[remap | {"map": "forgt.v1"}])
    assert (near.status_code, near.json()["error"]["code"]) == (400, "unknown_map")
    assert near.json()["error"]["param"] == "interventions[0].map"
    assert "Did you mean 'forget.v1'" in near.json()["error"]["message"]
    assert http.delete(path).json()["deleted"] is True
    missing = http.get(path)
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "unknown_map")
    assert chat(interventions=[remap]).json()["error"]["code"] == "unknown_map"


@pytest.mark.engine
def test_a_map_of_something_else_is_refused_when_it_is_put(
    http: httpx.Client, fitted: LatentMap, probes: dict[str, SAE]
) -> None:
    bad = [
        (replace(fitted, sae="0" * 64), "sae", RELU),
        (replace(fitted, model="gemma-2-2b"), "model", MODEL),
        (replace(fitted, layer=20), "layer", "15"),
        (replace(fitted, sae=probes[TOPK].digest), "layer", "20"),
        (replace(fitted, scope=TriggerTokens((N_FEATURES,))), "transfers", str(N_FEATURES - 1)),
        (replace(fitted, scope=MentionTokens(((49152,),))), "scope.sequences[0]", "49151"),
        (
            make_map(probes[RELU], 15, Transfer(1, alpha=0.0), Transfer(3, gamma=1e39, source=4)),
            "transfers[1]",
            "gamma",
        ),
    ]
    for one, param, says in bad:
        answer = http.put("/v1/library/maps/bad", json=to_body(one))
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_artifact", param)
        assert says in error["message"]
    assert http.get("/v1/library/maps/bad").status_code == 404


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["all", "trigger", "mentions", "share", "cusum", "prompt", "x" * 300]),
    st.lists(st.integers(-1, 200), max_size=3),
    st.dictionaries(st.sampled_from(["kind", "latents", "k", "threshold"]), st.integers(0, 3), max_size=3),
)
PLACES: list[tuple[str | int, ...]] = [
    *((name,) for name in ("model", "sae", "layer", "transfers", "scope", "gate", "provenance", "report", "extra")),
    *(("transfers", 0, name) for name in ("latent", "alpha", "gamma", "source", "lo", "unit", "only_if_active", "x")),
    *(("scope", name) for name in ("kind", "sequences", "tokens", "names", "latents")),
    *(("gate", name) for name in ("kind", "threshold", "evidence", "over", "least", "calibration")),
]


@pytest.mark.engine
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(PLACES), LEAVES, min_size=1, max_size=2))
def test_any_body_is_stored_or_refused_by_a_field(http: httpx.Client, fitted: LatentMap, changes: Any) -> None:
    body = to_body(fitted)
    for place, value in sorted(changes.items(), key=lambda item: -len(item[0])):
        target: Any = body
        for step in place[:-1]:
            target = target[step]
        target[place[-1]] = value
    answer = http.put("/v1/library/maps/any", json=body)
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        error = answer.json()["error"]
        assert error["code"] == "invalid_artifact"
        assert error["param"]


@pytest.mark.engine
def test_what_is_no_body_is_refused(http: httpx.Client) -> None:
    for content in (b"{", b"[]", b"3", b'{"transfers": []}', b"[" * 100_000):
        answer = http.put("/v1/library/maps/bad", content=content)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_artifact")


@pytest.mark.engine
def test_the_server_says_that_it_remaps(http: httpx.Client) -> None:
    told = http.get("/v1/capabilities").json()
    assert "remap" in told["intervention_types"]
    assert {"map", "strength", "tokens", "include_bos"} <= set(told["schemas"]["remap"]["properties"])
    assert (told["limits"]["selectors"], told["limits"]["gates"]) == (64, 64)
    api = http.get("/openapi.json").json()
    body = api["paths"]["/v1/library/maps/{name}"]["put"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["properties"]) == set(to_body(make_map_schema()))


def make_map_schema() -> LatentMap:
    return LatentMap("m", "0" * 64, 1, (Transfer(1, alpha=0.0),))


# what a request does -------------------------------------------------------------------------------------------------


@pytest.mark.engine
@pytest.mark.parametrize("sae", [RELU, TOPK])
def test_every_transfer_fires_on_every_kind_of_dictionary(complete: Post, put: Put, sae: str) -> None:
    transfers = {
        "set": [interpolate(j, 20.0) for j in range(40)],
        "move": [part for j in range(20) for part in move(j, 40 + j, 2.0)],
        "norms": list(clamp_hit(range(20), 0.3, Unit.RESIDUAL_NORM)),
        "mean": [replace(t, alpha=1.0) for j in range(40) for t in [clamp_active(j, 9.0, Unit.PREACT_MEAN)]],
    }
    digests = set()
    for made in transfers.values():
        put(*made, sae=sae)
        part = complete()["interventions"]
        (entry,) = part["receipt"]
        assert entry["fired"] > 0
        assert entry["dose_mean"] > 0
        digests.add(part["digest"])
    assert len(digests) == 4
    edits = [{"index": j, "op": "set", "value": 20.0} for j in range(40)]
    edit = {"type": "edit_features", "sae": sae, "features": edits}
    assert complete(interventions=[edit])["interventions"]["digest"] in digests


@pytest.mark.engine
def test_two_remaps_and_a_suppress_of_one_latent_compose_in_request_order(complete: Post, put: Put) -> None:
    put(interpolate(3, 50.0), name="a")
    put(Transfer(3, alpha=3.0), name="b")
    a, b = {"type": "remap", "map": "a"}, {"type": "remap", "map": "b"}
    half = {"type": "suppress", "concept": {"sae": RELU, "features": [3]}, "method": "attenuate", "strength": 0.5}
    ordered = complete(interventions=[b, a, half])
    latent = {"sae": RELU, "features": [3]}
    edit = {"type": "edit_features", "sae": RELU, "features": [{"index": 3, "op": "set", "value": 25.0}]}
    want = complete(interventions=[edit])
    assert ordered["choices"][0]["text"] == want["choices"][0]["text"]
    doses = [one["interventions"]["receipt"][-1]["dose_max"] for one in (ordered, want)]
    assert doses[0] == pytest.approx(doses[1], rel=1e-3)
    other = complete(interventions=[half, a, b], inspect=latent)
    assert other["interventions"]["digest"] != ordered["interventions"]["digest"]
    assert other["interventions"]["receipt"][-1]["dose_max"] > 2 * doses[0]


GATES: list[Gate] = [
    ShareGate(0.2),
    ShareGate(0.2, "seen", least=3),
    ShareGate(0.35, "seen", latch=True, include_bos=True),
    WindowGate(0.4, 5, 2),
    CusumGate(1.5, 0.25, latch=True),
    CusumGate(1.0, 0.25, reset=True),
]


@pytest.mark.engine
@pytest.mark.parametrize("gate", GATES, ids=repr)
def test_the_receipt_says_what_the_gate_saw_and_the_edit_keeps_to_it(complete: Post, put: Put, gate: Gate) -> None:
    """Against the pure gate on the activations that the same request reports."""
    evidence, edited = (2, 4), 77
    put(interpolate(edited, 25.0), gate=SequenceGate(gate, evidence))
    inspect = {"sae": RELU, "features": [*evidence, edited], "include_bos": True}
    answer = complete(inspect=inspect)
    tokens = answer["inspection"]["tokens"]
    assert [token["position"] for token in tokens] == list(range(len(tokens)))
    prompt_len = answer["usage"]["prompt_tokens"]
    read = np.array([[feature["activation"] for feature in token["features"][:2]] for token in tokens])
    hits = (read != 0).any(axis=1)
    opened, values, _ = advance(gate, START, hits, prompt_len)
    (entry,) = answer["interventions"]["receipt"]
    told = entry["gate"]
    assert told["threshold"] == gate.threshold
    assert told["statistic"] == values.max()
    assert told["open_from"] == (int(opened.argmax()) if opened.any() else None)
    kinds = {ShareGate: "share", WindowGate: "window", CusumGate: "cusum"}
    assert (told["kind"], told.get("over")) == (kinds[type(gate)], getattr(gate, "over", None))
    assert entry["fired"] == int(opened[1:].sum()) > 0
    assert entry["tokens_edited"] == len(tokens) - 1


@pytest.mark.engine
def test_a_gate_that_stays_shut_leaves_the_answer_alone(complete: Post, put: Put) -> None:
    put(interpolate(7, 200.0), gate=SequenceGate(ShareGate(1.0), tuple(range(N_FEATURES))))
    answer = complete()
    (entry,) = answer["interventions"]["receipt"]
    told = {"kind": "share", "over": "prompt", "threshold": 1.0, "statistic": 1.0, "open_from": None}
    assert (entry["fired"], entry["gate"]) == (0, told)
    assert answer["choices"] == complete(interventions=[])["choices"]
    put(interpolate(7, 200.0), gate=SequenceGate(ShareGate(0.5), tuple(range(N_FEATURES))))
    assert complete()["choices"][0]["text"] != answer["choices"][0]["text"]


@pytest.mark.engine
def test_a_trigger_lets_hit_tokens_through(complete: Post, put: Put) -> None:
    put(interpolate(77, 25.0), scope=TriggerTokens((2, 4)))
    answer = complete(inspect={"sae": RELU, "features": [2, 4]})
    read = [[f["activation"] for f in token["features"]] for token in answer["inspection"]["tokens"]]
    hits = int((np.array(read) != 0).any(axis=1).sum())
    (entry,) = answer["interventions"]["receipt"]
    assert 0 < entry["fired"] == hits < len(read)
    assert "gate" not in entry


@pytest.mark.engine
def test_mentions_are_counted_and_edited_where_they_end(complete: Post, http: httpx.Client, put: Put) -> None:
    sequences = tuple(sorted({tuple(ids_of(http, text)) for text in (" Paris", " New York", "Paris", "Rome")}))
    assert max(map(len, sequences)) > 1
    put(interpolate(77, 25.0), scope=MentionTokens(sequences))
    prompt = "Rome, Paris and New York: in Paris, the river"
    answer = complete(prompt)
    ids = ids_of(http, prompt)
    (entry,) = answer["interventions"]["receipt"]
    ends = mention_ends(ids, sequences)
    assert ends[0]  # the mention at position 0 is left out
    assert entry["prompt_tokens_edited"] == int(ends[1:].sum()) == 3
    assert entry["fired"] >= 3
    with_first = complete(prompt, interventions=[{"type": "remap", "map": "m", "include_bos": True}])
    assert with_first["interventions"]["receipt"][0]["prompt_tokens_edited"] == 4


@pytest.mark.engine
def test_whole_mentions_enter_the_digest_of_each_prompt(complete: Post, http: httpx.Client, put: Put) -> None:
    york = tuple(ids_of(http, " New York"))
    put(interpolate(77, 25.0), scope=MentionTokens((york,), "all"))
    prompts = ["I love New York in May", "We all love New York", "You love New York in June", "I love London in May"]
    answer = complete(prompts)
    parts = [choice["interventions"] for choice in answer["choices"]]
    positions = [mention_positions(ids_of(http, prompt), (york,), "all") for prompt in prompts]
    assert [part["receipt"][0]["tokens_edited"] for part in parts] == [2, 2, 2, 0]
    assert [part["receipt"][0]["fired"] for part in parts] == [2, 2, 2, 0]
    digests = [part["digest"] for part in parts]
    assert (
        [digests.index(digest) for digest in digests] == [positions.index(found) for found in positions] == [0, 1, 0, 3]
    )
    alone = complete(prompts[1])["interventions"]
    assert alone["digest"] == digests[1]
    again = complete(prompts[1])["interventions"]
    assert again["digest"] == digests[1]


@pytest.mark.engine
def test_streamed_receipts_equal_the_whole_ones(complete: Post, http: httpx.Client, put: Put) -> None:
    york = tuple(ids_of(http, " New York"))
    put(interpolate(77, 25.0), scope=MentionTokens((york,), "all"), gate=SequenceGate(ShareGate(0.1, "seen"), (2, 4)))
    prompts = ["I love New York in May", "We all love New York"]
    body = {"model": MODEL, "prompt": prompts, "temperature": 0, "max_tokens": 8, "ignore_eos": True}
    body["interventions"] = [{"type": "remap", "map": "m"}]
    complete(prompts)  # both find the prefix cache filled
    whole = [choice["interventions"] for choice in complete(prompts)["choices"]]
    events = sse(http.post("/v1/completions", json=body | {"stream": True}))
    streamed = {e["choice"]: e["interventions"] for e in events if e != "[DONE]" and "interventions" in e}
    assert [streamed[i] for i in range(2)] == whole
    assert all("statistic" in part["receipt"][0]["gate"] for part in whole)


@pytest.mark.engine
def test_the_strength_of_a_remap_is_calibrated(http: httpx.Client, put: Put) -> None:
    put(*(interpolate(j, 0.0) for j in range(N_FEATURES)))
    spec = {"type": "remap", "map": "m"}
    body = {"prompts": ["Paris is the capital of"], "target_kl": 0.02, "intervention": spec}
    answer = http.post("/v1/calibrate_strength", json=body).json()
    assert answer["kl"] == pytest.approx(0.02, rel=0.5)
    assert answer["intervention"] == spec | {"strength": answer["strength"]}


@pytest.mark.engine
def test_what_cannot_be_done_is_refused_before_anything_runs(chat: Post, put: Put) -> None:
    put(interpolate(3, 2.0), gate=SequenceGate(ShareGate(0.1), tuple(range(N_FEATURES))))
    cases = [
        ({"strength": 1e38}, "invalid_intervention", "interventions[0]"),
        ({"tokens": {"from": 5000}}, "invalid_intervention", "interventions[0].tokens"),
        ({"gate": None, "scope": {}}, "invalid_intervention", "interventions[0].scope"),
    ]
    for fields, code, param in cases:
        answer = chat(interventions=[{"type": "remap", "map": "m", **fields}])
        assert (answer.status_code, answer.json()["error"]["code"], answer.json()["error"]["param"]) == (
            400,
            code,
            param,
        )
    copies = [{"type": "remap", "map": "m", "tokens": {"from": i + 1}} for i in range(32)]
    assert chat(interventions=copies).status_code == 200


@pytest.mark.engine
def test_our_client_keeps_maps_and_reads_gates(server: Server, probes: dict[str, SAE]) -> None:
    made = make_map(probes[RELU], 15, interpolate(7, 25.0), gate=SequenceGate(WindowGate(0.1, 4), tuple(range(9))))
    with Client(server.url) as client:
        stored = client.library.maps.put("sdk", to_body(made))
        assert stored in client.library.maps.list()
        assert from_body(client.library.maps.get("sdk").body).digest == stored.digest == made.digest
        entry = client.chat("Hi", interventions=[Remap("sdk", strength=0.5)], max_tokens=4).receipt.entry("0")
        assert entry.gate is not None
        assert (entry.gate.kind, entry.gate.over, entry.gate.threshold) == ("window", None, 0.1)
        assert entry.gate.open_from is not None
        client.library.maps.delete("sdk")
