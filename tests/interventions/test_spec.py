"""What a request may say, and that everything else is an error that names its field."""

from __future__ import annotations

import base64
import contextlib
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interventions.errors import InterventionError
from interventions.fields import Part
from interventions.spec import EditFeatures, Steer, parse_inspect, parse_interventions, schemas

STEER = {"type": "steer", "vector": "formal"}
EDIT = {"type": "edit_features", "sae": "s", "features": [{"index": 3, "op": "ablate"}]}


def edit(**feature: Any) -> dict[str, Any]:
    return {**EDIT, "features": [{"index": 3, **feature}]}


def error_of(parse: Any, raw: Any) -> InterventionError:
    with pytest.raises(InterventionError) as caught:
        parse(raw)
    error = caught.value
    assert error.status == 400
    error.message.encode("utf-8")
    assert error.param is not None
    error.param.encode("utf-8")
    return error


@pytest.mark.parametrize("raw", [None, []])
def test_none_and_empty_lists_mean_absent(raw):
    assert parse_interventions(raw) == []
    assert parse_inspect(raw) == []


def test_null_fields_mean_absent():
    (spec,) = parse_interventions(
        [{**STEER, "strength": None, "id": None, "when": None, "layer": None, "tokens": None}]
    )
    assert isinstance(spec, Steer)
    assert (spec.id, spec.strength, spec.mode, spec.include_bos) == ("0", 1.0, "add", False)
    assert spec.tokens == (Part(keyword="all"),)
    (edited,) = parse_interventions([edit(op="ablate", value=None, min=None)])
    assert isinstance(edited, EditFeatures)


def test_default_id_is_the_index_and_labels_are_kept():
    specs = parse_interventions([STEER, {**STEER, "id": "tone"}, STEER])
    assert [spec.id for spec in specs] == ["0", "tone", "2"]
    assert [spec.param for spec in specs] == ["interventions[0]", "interventions[1]", "interventions[2]"]


@pytest.mark.parametrize(
    ("raw", "param", "says"),
    [
        ({"type": "steer"}, "interventions", "list"),
        ("steer", "interventions", "list"),
        ([None], "interventions[0]", "object"),
        ([[STEER]], "interventions[0]", "object"),
        ([{"vector": "formal"}], "interventions[0].type", "steer, edit_features"),
        ([{"type": "ster", "vector": "formal"}], "interventions[0].type", "'steer'"),
        ([{"type": ["steer"]}], "interventions[0].type", "a list"),
        ([{**STEER, "strenght": 2}], "interventions[0].strenght", "'strength'"),
        ([{**STEER, 3: 2}], "interventions[0].3", "unknown field"),
        ([{**STEER, "strength": "2"}], "interventions[0].strength", "number"),
        ([{**STEER, "strength": True}], "interventions[0].strength", "number"),
        ([{**STEER, "strength": math.nan}], "interventions[0].strength", "finite"),
        ([{**STEER, "strength": -math.inf}], "interventions[0].strength", "finite"),
        ([{**STEER, "strength": 1e39}], "interventions[0].strength", "float32"),
        ([{**STEER, "strength": 10**400}], "interventions[0].strength", "float32"),
        ([{**STEER, "strength": "1e400"}], "interventions[0].strength", "number"),
        ([{**STEER, "mode": "capp"}], "interventions[0].mode", "'cap'"),
        ([{**STEER, "include_bos": 1}], "interventions[0].include_bos", "true or false"),
        ([{**STEER, "id": "x" * 65}], "interventions[0].id", "64"),
        ([{**STEER, "id": 7}], "interventions[0].id", "string"),
        ([{**STEER, "id": ""}], "interventions[0].id", "1 to 64"),
        ([{**STEER, "id": "\ud800"}], "interventions[0].id", "Unicode"),
        ([{**STEER, "\ud800": 1}], "interventions[0].\\ud800", "unknown field"),
        ([{**STEER, "id": "1"}, STEER], "interventions[1].id", "interventions[0]"),
        ([{"type": "steer"}], "interventions[0]", "exactly one of"),
        ([{**STEER, "sae": "s", "feature": 1}], "interventions[0]", "vector and feature"),
        ([{**STEER, "values": [1.0], "layer": 1}], "interventions[0]", "vector and values"),
        ([{"type": "steer", "sae": "s"}], "interventions[0].feature", "required"),
        ([{"type": "steer", "feature": 1}], "interventions[0].sae", "required"),
        ([{"type": "steer", "sae": "s", "feature": 1.0}], "interventions[0].feature", "integer"),
        ([{**STEER, "layer": 1}], "interventions[0].layer", "values only"),
        ([{"type": "steer", "sae": "s", "feature": 1, "layers": [1]}], "interventions[0].layers", "values only"),
        ([{"type": "steer", "values": [1.0]}], "interventions[0].layer", "exactly one of layer and layers"),
        ([{"type": "steer", "values": [1.0], "layer": 1, "layers": [1]}], "interventions[0].layer", "both"),
        ([{"type": "steer", "values": [1.0], "layers": []}], "interventions[0].layers", "empty"),
        ([{"type": "steer", "values": [1.0], "layers": [1, 2, 1]}], "interventions[0].layers[2]", "already"),
        ([{"type": "steer", "values": [1.0], "layers": [1, True]}], "interventions[0].layers[1]", "integer"),
        ([{"type": "steer", "values": [], "layer": 1}], "interventions[0].values", "empty"),
        ([{"type": "steer", "values": [1, math.nan], "layer": 1}], "interventions[0].values[1]", "finite"),
        ([{"type": "steer", "values": [1, None], "layer": 1}], "interventions[0].values[1]", "null"),
        ([{"type": "steer", "values": [1, True], "layer": 1}], "interventions[0].values[1]", "true"),
        ([{"type": "steer", "values": [1, 10**400], "layer": 1}], "interventions[0].values[1]", "float32"),
        ([{"type": "steer", "values": [[1, 2], [1]], "layers": [1, 2]}], "interventions[0].values[1]", "has 1"),
        (
            [{"type": "steer", "values": [[1, 2], [1, "2"]], "layers": [1, 2]}],
            "interventions[0].values[1][1]",
            "number",
        ),
        ([{"type": "steer", "values": [[1], 2], "layers": [1, 2]}], "interventions[0].values[1]", "list"),
        ([{"type": "steer", "values": [[[1]]], "layers": [1]}], "interventions[0].values[0][0]", "a list"),
        ([{"type": "steer", "values": "x", "layer": 1}], "interventions[0].values", "numbers"),
        ([{**STEER, "mode": "cap"}], "interventions[0].min", "min or max"),
        ([{**STEER, "mode": "cap", "min": 1, "strength": 2}], "interventions[0].strength", "cap"),
        ([{**STEER, "mode": "cap", "min": 1, "max": 0}], "interventions[0].min", "above"),
        ([{**STEER, "min": 1}], "interventions[0].min", "cap only"),
        ([{**STEER, "tokens": "promt"}], "interventions[0].tokens", "'prompt'"),
        ([{**STEER, "tokens": []}], "interventions[0].tokens", "empty"),
        ([{**STEER, "tokens": {}}], "interventions[0].tokens", "from"),
        ([{**STEER, "tokens": 3}], "interventions[0].tokens", "3"),
        ([{**STEER, "tokens": {"from": "1"}}], "interventions[0].tokens.from", "integer"),
        ([{**STEER, "tokens": {"from": 2**31}}], "interventions[0].tokens.from", "position"),
        ([{**STEER, "tokens": {"form": 1}}], "interventions[0].tokens.form", "'from'"),
        ([{**STEER, "tokens": ["prompt", {"to": True}]}], "interventions[0].tokens[1].to", "integer"),
        ([{**STEER, "tokens": [["prompt"]]}], "interventions[0].tokens[0]", "list"),
        ([{**STEER, "tokens": {"tokens": []}}], "interventions[0].tokens.tokens", "non-empty"),
        ([{**STEER, "tokens": {"tokens": [1.5]}}], "interventions[0].tokens.tokens[0]", "token id"),
        ([{**STEER, "tokens": {"tokens": ["\udfff"]}}], "interventions[0].tokens.tokens[0]", "Unicode"),
        ([{**STEER, "tokens": {"tokens": [1], "from": 2}}], "interventions[0].tokens", "union"),
        ([{"type": "edit_features", "features": [{"index": 1, "op": "ablate"}]}], "interventions[0].sae", "required"),
        ([{"type": "edit_features", "sae": "s"}], "interventions[0].features", "required"),
        ([{**EDIT, "features": []}], "interventions[0].features", "at least one"),
        ([{**EDIT, "features": {"index": 1}}], "interventions[0].features", "list"),
        ([{**EDIT, "features": [3]}], "interventions[0].features[0]", "object"),
        ([{**EDIT, "vector": "formal"}], "interventions[0].vector", "unknown field"),
        ([{**EDIT, "features": EDIT["features"] * 2}], "interventions[0].features[1].index", "features[0]"),
        ([edit()], "interventions[0].features[0].op", "required"),
        ([edit(op="sett")], "interventions[0].features[0].op", "'set'"),
        ([edit(op="set")], "interventions[0].features[0].value", "required"),
        ([edit(op="ablate", value=0)], "interventions[0].features[0].value", "ablate"),
        ([edit(op="clamp", value=1, max=1)], "interventions[0].features[0].value", "clamp"),
        ([edit(op="clamp")], "interventions[0].features[0].min", "min or max"),
        ([edit(op="clamp", min=2, max=1)], "interventions[0].features[0].min", "above"),
        ([edit(op="scale", value=1, min=0)], "interventions[0].features[0].min", "clamp only"),
        ([edit(op="add", value=[])], "interventions[0].features[0].value", "number"),
        (
            [edit(op="add", value=1, only_if_activ=True)],
            "interventions[0].features[0].only_if_activ",
            "'only_if_active'",
        ),
        (
            [edit(op="add", value=1, only_if_active="yes")],
            "interventions[0].features[0].only_if_active",
            "true or false",
        ),
    ],
)
def test_an_invalid_intervention_names_its_field(raw, param, says):
    error = error_of(parse_interventions, raw)
    assert error.code == "invalid_intervention"
    assert error.param == param
    assert says in error.message


@pytest.mark.parametrize(
    ("raw", "param", "says"),
    [
        ("s", "inspect", "object"),
        ({"sae": "s"}, "inspect", "top_k or features"),
        ({"top_k": 3}, "inspect.sae", "required"),
        ({"sae": "s", "top_k": 0}, "inspect.top_k", "at least 1"),
        ({"sae": "s", "top_k": -1, "features": [1]}, "inspect.top_k", "at least 1"),
        ({"sae": "s", "topk": 3}, "inspect.topk", "'top_k'"),
        ({"sae": "s", "features": []}, "inspect.features", "empty"),
        ({"sae": "s", "features": [1, 1]}, "inspect.features[1]", "already"),
        ([{"sae": "s", "top_k": 1}, {"sae": "t", "features": [True]}], "inspect[1].features[0]", "integer"),
        ([{"sae": "s", "top_k": 1}, {"sae": "s", "features": [2]}], "inspect[1].sae", "inspect[0]"),
        ({"sae": "s", "top_k": 1, "tokens": "generatd"}, "inspect.tokens", "'generated'"),
        ([3], "inspect[0]", "object"),
    ],
)
def test_an_invalid_inspection_names_its_field(raw, param, says):
    error = error_of(parse_inspect, raw)
    assert error.code == "invalid_inspection"
    assert error.param == param
    assert says in error.message


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [[6], [2, 3]])
def test_base64_values_equal_their_lists(dtype, shape):
    numbers = torch.tensor([0.5, -1.25, 3.0, 0.1, 100.0, -0.0], dtype=getattr(torch, dtype)).reshape(shape)
    raw = numbers.view(torch.int16 if dtype == "bfloat16" else numbers.dtype).numpy().tobytes()
    layers = [1, 2] if len(shape) == 2 else [1]
    data = {"dtype": dtype, "shape": shape, "data": base64.b64encode(raw).decode()}
    (encoded,) = parse_interventions([{"type": "steer", "values": data, "layers": layers}])
    (listed,) = parse_interventions([{"type": "steer", "values": numbers.tolist(), "layers": layers}])
    assert encoded.values.dtype == listed.values.dtype == np.float32
    np.testing.assert_array_equal(encoded.values, listed.values)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"dtype": "float64"}, "dtype"),
        ({"dtype": None}, "dtype"),
        ({"shape": [3]}, "data"),
        ({"shape": []}, "shape"),
        ({"shape": [0]}, "shape[0]"),
        ({"shape": [-2]}, "shape[0]"),
        ({"shape": [2**40]}, "shape[0]"),
        ({"shape": [2**21, 2**21]}, "shape"),
        ({"shape": [1, 1, 2]}, "shape"),
        ({"data": "A" * 11}, "data"),
        ({"data": "!" * 12}, "data"),
        ({"data": "é" * 12}, "data"),
        ({"data": 12}, "data"),
        ({"data": base64.b64encode(np.array([1, np.inf], "<f4")).decode()}, "data"),
        ({"byteorder": "big"}, "byteorder"),
    ],
)
def test_encoded_values_are_checked_to_the_byte(change, field):
    good = {"dtype": "float32", "shape": [2], "data": base64.b64encode(np.ones(2, "<f4")).decode()}
    assert parse_interventions([{"type": "steer", "values": good, "layer": 1}])
    error = error_of(parse_interventions, [{"type": "steer", "values": {**good, **change}, "layer": 1}])
    assert error.param == f"interventions[0].values.{field}"


def test_numbers_are_rounded_to_float32_once():
    (spec,) = parse_interventions([{**STEER, "strength": 0.1}])
    assert spec.strength == float(np.float32(0.1)) != 0.1


def test_schemas_describe_every_field_and_accept_null():
    published = schemas()
    assert set(published) == {"steer", "edit_features", "suppress", "remap", "rules", "inspect"}
    json.dumps(published, allow_nan=False)
    for schema in published.values():
        assert schema["additionalProperties"] is False
        assert all("description" in field for field in schema["properties"].values())
    assert all("when" in schema["properties"] for name, schema in published.items() if name != "inspect")
    assert published["steer"]["properties"]["tokens"]["default"] == "all"


# hostile input -------------------------------------------------------------------------------------------------------

_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**400, -(10**4000), 2**31, 2**63, 2**64]),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["\ud800", "x" * 5000, "1e400", "NaN", "steer", "all", "float32", "cap", "set"]),
)
_KNOWN = {name for schema in schemas().values() for name in schema["properties"]}
_keys = st.sampled_from(
    [*sorted(_KNOWN), "when", "index", "op", "value", "from", "to", "dtype", "shape", "data", "\ud800"]
)
_json = st.recursive(
    _scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=4), max_leaves=12
)
_good = [
    STEER,
    {"type": "steer", "layers": [1, 2], "values": [[1.0, 2.0], [3.0, 4.0]], "mode": "cap", "min": 0.0},
    {"type": "steer", "layer": 1, "values": {"dtype": "float16", "shape": [1], "data": "AAA="}},
    {"type": "steer", "sae": "s", "feature": 3, "tokens": ["prompt", {"from": -3, "to": 2}, {"tokens": [1, "a"]}]},
    {**EDIT, "features": [{"index": 1, "op": "set", "value": 2}, {"index": 2, "op": "clamp", "min": 1}]},
]


def _mutate(data: Any, where: list[int], value: Any) -> Any:
    """``data`` with the element that ``where`` leads to replaced by ``value``."""
    if not where or not isinstance(data, (dict, list)) or not data:
        return value
    keys = list(data) if isinstance(data, dict) else list(range(len(data)))
    key = keys[where[0] % len(keys)]
    copy = dict(data) if isinstance(data, dict) else list(data)
    copy[key] = _mutate(data[key], where[1:], value)
    return copy


def _valid_or_refused(parse: Any, raw: Any, code: str) -> None:
    with contextlib.suppress(InterventionError):
        parse(raw)
        return
    error = error_of(parse, raw)
    assert error.code == code
    assert len(error.message) < 1000


@given(raw=_json)
@settings(max_examples=300, deadline=None)
def test_any_json_is_valid_or_an_intervention_error(raw):
    _valid_or_refused(parse_interventions, raw, "invalid_intervention")
    _valid_or_refused(parse_interventions, [raw], "invalid_intervention")
    _valid_or_refused(parse_inspect, raw, "invalid_inspection")


@given(base=st.sampled_from(_good), where=st.lists(st.integers(0, 9), min_size=1, max_size=4), value=_json)
@settings(max_examples=500, deadline=None)
def test_a_valid_intervention_with_one_thing_replaced_is_valid_or_an_intervention_error(base, where, value):
    assert parse_interventions([base])
    _valid_or_refused(parse_interventions, [_mutate(base, where, value)], "invalid_intervention")


def test_deep_nesting_and_huge_keys_are_refused_like_anything_else():
    deep: Any = 1
    for _ in range(50_000):
        deep = [deep]
    for field in ("strength", "tokens", "values", "vector", "layers", "min", "mode", "id", "include_bos"):
        _valid_or_refused(parse_interventions, [{**STEER, field: deep}], "invalid_intervention")
    _valid_or_refused(parse_interventions, deep, "invalid_intervention")
    _valid_or_refused(parse_inspect, {"sae": deep, "features": deep}, "invalid_inspection")
    for field in ("strength", "tokens", "values", "vector", "layers", "id"):
        for huge in (10**5000, [10**5000], {"from": 10**5000}, {"tokens": [10**5000]}, {"shape": [10**5000]}):
            _valid_or_refused(parse_interventions, [{**STEER, field: huge}], "invalid_intervention")
    _valid_or_refused(parse_inspect, {"sae": "s", "features": [10**5000], "top_k": -(10**5000)}, "invalid_inspection")
    error = error_of(parse_interventions, [{**STEER, "x" * 10**6: 1}])
    assert len(error.message) < 1000
