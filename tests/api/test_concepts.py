"""Concepts in the library and in requests: what is stored, what is refused, and that the server does what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from editserver.catalogue import build_catalogue, open_sae
from editserver.engine.config import EngineConfig
from editserver.library import ConceptLibrary, concept_body, parse_concept
from editserver.settings import Settings
from interventions.concepts.concept import FACTS, TENSORS, Concept
from interventions.errors import InterventionError
from sae_weights.formats import load_sae
from sae_weights.sae import SAE
from tests.concepts.samples import made_concept

from .conftest import MODEL, RELU, TOPK, make_probes

Post = Callable[..., httpx.Response]


@pytest.fixture(scope="session")
def probes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SAE]:
    """The probe dictionaries of the shared server, by id."""
    return {name: load_sae(path) for name, path in make_probes(tmp_path_factory.mktemp("probes")).items()}


@pytest.fixture
def concept(probes: dict[str, SAE]) -> Concept:
    return made_concept(probes[RELU], 15, width=40.0, model=MODEL)


def lists(concept: Concept) -> dict[str, Any]:
    """The body with nested lists for tensors."""
    return concept_body(concept) | {name: getattr(concept, name).tolist() for name in TENSORS}


# the library ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [concept_body, lists])
def test_a_body_is_read_as_it_was_written(concept: Concept, form: Callable[[Concept], dict[str, Any]]) -> None:
    body = form(concept)
    assert set(body) == {*FACTS, *TENSORS}
    again = parse_concept(body)
    assert again.digest == concept.digest
    assert concept_body(again) == concept_body(concept)


def test_content_comes_back_as_it_was_put(tmp_path: Path, concept: Concept) -> None:
    library = ConceptLibrary(tmp_path)
    first = library.put("sports", concept)
    assert (first.kind, first.version, first.digest) == ("concept", 1, concept.digest)
    assert ConceptLibrary(tmp_path).get("sports").digest == concept.digest
    assert library.put("sports", concept) == first
    other = replace(concept, posterior=concept.posterior.flip(1).contiguous())
    assert library.put("sports", other).version == 2
    assert library.listings() == [library.find("sports")]
    assert (tmp_path / "concepts" / "names" / "sports.json").exists()
    assert not (tmp_path / "vectors").exists()
    library.delete("sports")
    with pytest.raises(InterventionError) as caught:
        library.get("sport")
    assert caught.value.code == "unknown_concept"


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path: Path, concept: Concept) -> None:
    library = ConceptLibrary(tmp_path)
    library.put("sports", concept)
    with pytest.raises(InterventionError) as caught:
        library.get("sport")
    assert caught.value.code == "unknown_concept"
    assert caught.value.message == "no concept 'sport' in the library, which has sports. Did you mean 'sports'?"


def test_damaged_files_are_errors_not_edits(tmp_path: Path, concept: Concept) -> None:
    listing = ConceptLibrary(tmp_path).put("sports", concept)
    path = tmp_path / "concepts" / "objects" / f"{listing.digest}.safetensors"
    path.write_bytes(replace(concept, dense=3).to_bytes())
    with pytest.raises(InterventionError, match="does not match its digest"):
        ConceptLibrary(tmp_path).get("sports")
    path.write_bytes(b"x")
    with pytest.raises(InterventionError) as caught:
        ConceptLibrary(tmp_path).get("sports")
    assert caught.value.code == "invalid_artifact"


BAD: list[tuple[dict[str, Any], str | None]] = [
    ({"sae_digest": "abc"}, "sae_digest"),
    ({"sae_digest": None}, "sae_digest"),
    ({"target": "weather"}, "target"),
    ({"classes": "sports"}, "classes"),
    ({"by": "luck"}, "by"),
    ({"fitted_on": []}, "fitted_on"),
    ({"postrior": []}, "postrior"),
    ({"posterior": None}, "posterior"),
    ({"posterior": [[2.0] * 20] * 6}, "posterior"),
    ({"posterior": [[0.5] * 20] * 5}, "posterior"),
    ({"posterior": [["x"]]}, "posterior"),
    ({"edges": [[1.0, 0.0]] * 6}, "edges"),
    ({"features": [1, 3, 4, 7, 12, 12]}, "features"),
    ({"features": [1, 3, 4, 7, 12, "20"]}, "features"),
    ({"features": [1, 3, 4, 7, 12, 2**70]}, "features"),
    ({"features": {"dtype": "int32", "shape": [6], "data": ""}}, "features"),
    ({"features": {"dtype": "int64", "shape": [6], "data": "AAAA"}}, "features.data"),
    ({"features": {"dtype": "int64", "shape": [6], "data": "!"}}, "features.data"),
    ({"features": {"dtype": "int64", "shape": [0], "data": ""}}, "features.shape"),
    ({"features": {"dtype": "int64", "shape": "6", "data": ""}}, "features.shape"),
    ({"firing": [[1, 2], [3]]}, "firing"),
    ({"firing": 7}, "firing"),
    ({"mean": {"dtype": "float32", "shape": [3, 6], "data": "AA"}}, "mean"),
]


@pytest.mark.parametrize(("change", "param"), BAD, ids=lambda value: str(value)[:40])
def test_a_bad_body_is_refused_by_its_field(concept: Concept, change: dict[str, Any], param: str | None) -> None:
    with pytest.raises(InterventionError) as caught:
        parse_concept(concept_body(concept) | change)
    assert (caught.value.code, caught.value.param) == ("invalid_artifact", param)


@pytest.mark.parametrize("body", [None, [], "x", 3])
def test_what_is_no_object_is_refused(body: Any) -> None:
    with pytest.raises(InterventionError) as caught:
        parse_concept(body)
    assert (caught.value.code, caught.value.param) == ("invalid_artifact", None)


def test_a_concept_is_bound_to_its_model_sae_and_layer(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, concept: Concept
) -> None:
    opened = [open_sae(f"{name}={path}") for name, path in make_probes(tmp_path_factory.mktemp("again")).items()]
    config = EngineConfig((15, 20), tuple(one.source() for one in opened), ())
    shape = {"d_model": 576, "n_layers": 30, "vocab_size": 10, "tokenizer": None}
    catalogue = build_catalogue(config, Settings(library=tmp_path), **shape, model=MODEL)
    assert catalogue.dictionary_of(concept).id == RELU
    wrong = {
        "model": replace(concept, model="another"),
        "sae_digest": replace(concept, sae_digest="0" * 64),
        "layer": replace(concept, layer=14),
        "features": replace(concept, features=torch.tensor([1, 3, 4, 7, 12, 128])),
    }
    for param, bad in wrong.items():
        with pytest.raises(InterventionError) as caught:
            catalogue.dictionary_of(bad)
        assert (caught.value.code, caught.value.param) == ("invalid_artifact", param)
        catalogue.concepts.put("bad", bad)  # as another server of the same folder may
        with pytest.raises(InterventionError, match="concept 'bad' is not of this server") as caught:
            catalogue.concept("bad")
        assert (caught.value.code, caught.value.param) == ("invalid_artifact", None)
    unnamed = build_catalogue(config, Settings(library=tmp_path), **shape)
    assert unnamed.dictionary_of(wrong["model"]).id == RELU


# over HTTP -----------------------------------------------------------------------------------------------------------


@pytest.mark.engine
def test_a_concept_is_put_used_listed_changed_and_deleted_over_http(
    http: httpx.Client, chat: Post, concept: Concept
) -> None:
    path = "/v1/library/concepts/sports.v1"
    put = http.put(path, json=concept_body(concept)).json()
    assert (put["name"], put["kind"], put["version"], put["digest"]) == ("sports.v1", "concept", 1, concept.digest)
    assert http.get("/v1/library/concepts").json()["data"] == [put]
    assert put not in http.get("/v1/library/vectors").json()["data"]
    assert parse_concept(http.get(path).json()["body"]).digest == concept.digest
    suppress = {"type": "suppress", "concept": "sports.v1", "strength": 2.0}
    digests = set()
    for method in ("app", "attenuate", "mask", "range"):
        part = chat(interventions=[suppress | {"method": method}]).json()["interventions"]
        (entry,) = part["receipt"]
        assert (entry["type"], entry["layer"]) == ("suppress", 15)
        assert entry["fired"] > 0
        assert entry["dose_mean"] > 0
        digests.add(part["digest"])
    assert len(digests) == 4
    app = chat(interventions=[suppress]).json()["interventions"]["digest"]
    assert app in digests
    other = replace(concept, posterior=concept.posterior.flip(1).contiguous())
    assert http.put(path, json=lists(other)).json()["version"] == 2
    assert chat(interventions=[suppress]).json()["interventions"]["digest"] not in digests
    nothing = chat(interventions=[suppress | {"strength": 0}]).json()["interventions"]
    assert (nothing["digest"], nothing["receipt"][0]["noop"]) == (None, True)
    near = chat(interventions=[suppress | {"concept": "sport.v1"}])
    assert (near.status_code, near.json()["error"]["code"]) == (400, "unknown_concept")
    assert near.json()["error"]["param"] == "interventions[0].concept"
    assert "Did you mean 'sports.v1'" in near.json()["error"]["message"]
    assert http.delete(path).json()["deleted"] is True
    missing = http.get(path)
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "unknown_concept")
    assert chat(interventions=[suppress]).json()["error"]["code"] == "unknown_concept"


@pytest.mark.engine
def test_a_concept_of_something_else_is_refused_when_it_is_put(
    http: httpx.Client, concept: Concept, probes: Any
) -> None:
    bins = torch.full((6, 600), 0.5)
    bad = [
        (replace(concept, sae_digest="0" * 64), "sae_digest", RELU),
        (replace(concept, model="gemma-2-2b"), "model", MODEL),
        (replace(concept, layer=20), "layer", "15"),
        (replace(concept, sae_digest=probes[TOPK].digest), "layer", "20"),
        (replace(concept, posterior=bins), "posterior", "573"),
    ]
    for one, param, says in bad:
        answer = http.put("/v1/library/concepts/bad", json=concept_body(one))
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_artifact", param)
        assert says in error["message"]
    broken = http.put("/v1/library/concepts/bad", content=b"{")
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "invalid_artifact")
    assert http.get("/v1/library/concepts/bad").status_code == 404


@pytest.mark.engine
@pytest.mark.parametrize("sae", [RELU, TOPK])
def test_latents_given_inline_are_suppressed(chat: Post, sae: str) -> None:
    features = list(range(64))
    for fields in ({}, {"method": "attenuate", "strength": 0.5}, {"method": "range", "tau": 50}):
        inline = {"sae": sae, "features": features} | ({"mu": 10.0, "sigma": [4.0] * 64} if "tau" in fields else {})
        (entry,) = chat(interventions=[{"type": "suppress", "concept": inline, **fields}]).json()["interventions"][
            "receipt"
        ]
        assert entry["fired"] > 0


@pytest.mark.engine
@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({}, "invalid_intervention", "concept"),
        ({"concept": "nope"}, "unknown_concept", "concept"),
        ({"concept": {"sae": RELU, "features": [3]}, "method": "app"}, "invalid_intervention", "method"),
        ({"concept": {"sae": RELU, "features": [3]}, "method": "range"}, "invalid_intervention", "concept.mu"),
        ({"concept": {"sae": RELU, "features": [3, 999]}}, "unknown_feature", "concept.features[1]"),
        ({"concept": {"sae": "nope", "features": [3]}}, "unknown_sae", "concept.sae"),
        ({"concept": {"sae": RELU, "features": [3]}, "strength": -1}, "invalid_intervention", "strength"),
        ({"concept": {"sae": RELU, "features": [3]}, "when": "x"}, "unknown_concept", "when"),
    ],
)
def test_what_cannot_be_done_is_refused_by_its_field(chat: Post, fields: Any, code: str, param: str) -> None:
    answer = chat(interventions=[{"type": "suppress", **fields}])
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, code, f"interventions[0].{param}")


@pytest.mark.engine
def test_the_server_says_that_it_suppresses(http: httpx.Client) -> None:
    told = http.get("/v1/capabilities").json()
    assert "suppress" in told["intervention_types"]
    schema = told["schemas"]["suppress"]
    assert {"concept", "method", "strength", "tau", "tokens"} <= set(schema["properties"])
    assert "/v1/library/concepts/{name}" in http.get("/openapi.json").json()["paths"]


@pytest.mark.engine
def test_the_strength_of_a_suppression_is_calibrated(http: httpx.Client) -> None:
    concept = {"sae": RELU, "features": list(range(128))}
    body = {"prompts": ["Paris is the capital of"], "target_kl": 0.02}
    spec = {"type": "suppress", "concept": concept, "method": "attenuate"}
    answer = http.post("/v1/calibrate_strength", json=body | {"intervention": spec}).json()
    assert answer["kl"] == pytest.approx(0.02, rel=0.5)
    assert answer["intervention"] == spec | {"strength": answer["strength"]}
    mask = http.post("/v1/calibrate_strength", json=body | {"intervention": {"type": "suppress", "concept": concept}})
    assert (mask.status_code, mask.json()["error"]["param"]) == (400, "intervention.method")
