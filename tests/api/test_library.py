"""The library of vectors: versions by content, names that reach no other file, damage that is seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from editserver.library import Vector, VectorLibrary, parse_vector
from interventions.errors import InterventionError

from .conftest import D_MODEL

D = 4
BODY: dict[str, Any] = {"layers": {"2": [1.0, 0, 0, 0.5]}, "description": "d", "meta": {"a": 1}}


def vector(*values: float, layer: int = 2) -> Vector:
    return Vector({layer: np.array(values, np.float32)})


def test_content_comes_back_as_it_was_put(tmp_path: Path) -> None:
    library = VectorLibrary(tmp_path)
    library.put("one", parse_vector(BODY, D, 3))
    again = VectorLibrary(tmp_path).get("one")
    assert again.body() == {"layers": {"2": [1.0, 0.0, 0.0, 0.5]}, "description": "d", "meta": {"a": 1}}


def test_versions_count_contents_not_puts(tmp_path: Path) -> None:
    library = VectorLibrary(tmp_path)
    first = library.put("one", vector(1, 2))
    assert library.put("one", vector(1, 2)) == first
    second = library.put("one", vector(1, 3))
    assert (first.version, second.version) == (1, 2)
    assert first.digest != second.digest
    assert library.put("other", vector(1, 2)).digest == first.digest


def test_deleting_a_name_keeps_the_content_that_another_name_has(tmp_path: Path) -> None:
    library = VectorLibrary(tmp_path)
    library.put("one", vector(1, 2))
    library.put("two", vector(1, 2))
    library.delete("one")
    with pytest.raises(InterventionError, match="no vector 'one'"):
        library.get("one")
    assert VectorLibrary(tmp_path).get("two").layers[2].tolist() == [1, 2]
    library.delete("two")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\\b", ".hidden", "x" * 129, "a\0b", "é", "a b"])
def test_a_name_that_is_no_name_reaches_no_file(tmp_path: Path, name: str) -> None:
    library = VectorLibrary(tmp_path / "library")
    with pytest.raises(InterventionError) as caught:
        library.put(name, vector(1))
    assert caught.value.code == "invalid_artifact"
    with pytest.raises(InterventionError) as caught:
        library.get(name)
    assert caught.value.code == "unknown_vector"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ([], "invalid_artifact", None),
        ({}, "invalid_artifact", "layers"),
        ({"layers": {}}, "invalid_artifact", "layers"),
        ({"layers": {"x": [1.0] * D}}, "invalid_artifact", "layers"),
        ({"layers": {"-1": [1.0] * D}}, "invalid_artifact", "layers"),
        ({"layers": {"3": [1.0] * D}}, "invalid_artifact", "layers.3"),
        ({"layers": {"2": [1.0] * D, "02": [1.0] * D}}, "invalid_artifact", "layers"),
        ({"layers": {"2": [1.0]}}, "wrong_dimension", "layers.2"),
        ({"layers": {"2": [[1.0] * D]}}, "wrong_dimension", "layers.2"),
        ({"layers": {"2": [float("nan")] * D}}, "invalid_artifact", "layers.2"),
        ({"layers": {"2": ["1"] * D}}, "invalid_artifact", "layers.2"),
        ({"layers": {"2": {"dtype": "float32", "shape": [D], "data": "AA"}}}, "invalid_artifact", "layers.2"),
        (BODY | {"descripton": "x"}, "invalid_artifact", "descripton"),
        (BODY | {"description": 1}, "invalid_artifact", "description"),
        (BODY | {"meta": []}, "invalid_artifact", "meta"),
        (BODY | {"meta": {"x": float("nan")}}, "invalid_artifact", "meta"),
        (BODY | {"meta": {"x": "y" * 70_000}}, "invalid_artifact", "meta"),
    ],
)
def test_a_bad_body_is_refused_by_its_field(body: Any, code: str, param: str | None) -> None:
    with pytest.raises(InterventionError) as caught:
        parse_vector(body, D, 3)
    assert (caught.value.code, caught.value.param) == (code, param)


def test_damaged_files_are_errors_not_edits(tmp_path: Path) -> None:
    library = VectorLibrary(tmp_path)
    listing = library.put("one", vector(1, 2))
    library.put("one-b", vector(1, 3))
    objects = tmp_path / "vectors" / "objects"
    other = next(p for p in objects.glob("*.safetensors") if p.stem != listing.digest)
    (objects / f"{listing.digest}.safetensors").write_bytes(other.read_bytes())
    with pytest.raises(InterventionError, match="does not match its digest"):
        VectorLibrary(tmp_path).get("one")
    (objects / f"{listing.digest}.safetensors").write_bytes(b"x")
    with pytest.raises(InterventionError, match="cannot be read"):
        VectorLibrary(tmp_path).get("one")
    (tmp_path / "vectors" / "names" / "one.json").write_text("{}")
    with pytest.raises(InterventionError, match="damaged"):
        VectorLibrary(tmp_path).get("one")


@pytest.mark.engine
def test_a_vector_is_put_used_listed_changed_and_deleted_over_http(http: httpx.Client, chat: Any) -> None:
    path = "/v1/library/vectors/formal.v1"
    row = np.random.default_rng(1).normal(size=D_MODEL).tolist()
    put = http.put(path, json={"layers": {"15": row}, "description": "test"}).json()
    assert (put["name"], put["kind"], put["version"]) == ("formal.v1", "vector", 1)
    assert put in http.get("/v1/library/vectors").json()["data"]
    got = http.get(path).json()
    assert got["body"]["layers"]["15"] == pytest.approx(row, rel=1e-6)
    steer = {"type": "steer", "vector": "formal.v1", "strength": 4}
    first = chat(interventions=[steer]).json()["interventions"]
    assert first["receipt"][0]["fired"] > 0
    changed = http.put(path, json={"layers": {"15": row[::-1]}}).json()
    assert changed["version"] == 2
    assert chat(interventions=[steer]).json()["interventions"]["digest"] != first["digest"]
    assert http.delete(path).json()["deleted"] is True
    assert http.get(path).status_code == 404
    answer = chat(interventions=[steer])
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unknown_vector")
    bad = http.put("/v1/library/vectors/a%20b", json={"layers": {"15": row}})
    assert (bad.status_code, bad.json()["error"]["code"]) == (400, "invalid_artifact")
    bad = http.put(path, content=b"{")
    assert (bad.status_code, bad.json()["error"]["code"]) == (400, "invalid_artifact")
    http.put(path, json={"layers": {"3": row}}).raise_for_status()
    answer = chat(interventions=[steer])
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "layer_not_armed")
    http.delete(path).raise_for_status()
