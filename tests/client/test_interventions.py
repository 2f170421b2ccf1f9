from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from editserver_client import (
    AblateFeature,
    AddFeature,
    ClampFeature,
    EditFeatures,
    InlineConcept,
    Inspect,
    Remap,
    Rules,
    ScaleFeature,
    SetFeature,
    Steer,
    Suppress,
    Tokens,
    extra_body,
)

SAE = "smollm2-135m/l15"


def test_the_example_of_the_contract_is_reproduced_exactly() -> None:
    # the request of the API page, with a three-number vector in place of the d floats
    expected = json.loads("""
    { "interventions": [
        {"type": "steer", "vector": "formal", "strength": 1.5},
        {"type": "steer", "layer": 15, "values": [0.1, 0.2, 0.3], "strength": 4, "mode": "add", "tokens": "generated"},
        {"type": "steer", "sae": "smollm2-135m/l15", "feature": 1234, "strength": 8},
        {"type": "edit_features", "sae": "smollm2-135m/l15",
         "features": [{"index": 12, "op": "set", "value": 0}, {"index": 88, "op": "scale", "value": 2.5},
                      {"index": 90, "op": "add", "value": 3, "only_if_active": true},
                      {"index": 91, "op": "clamp", "max": 1.0}]},
        {"type": "suppress", "concept": "sports", "method": "app", "strength": 1.0},
        {"type": "remap", "map": "forget-paris", "strength": 1.0},
        {"type": "rules", "ruleset": "safety"} ],
      "inspect": {"sae": "smollm2-135m/l15", "top_k": 8, "features": [12, 88], "tokens": "all"} }
    """)
    edits = [
        SetFeature(12, 0.0),
        ScaleFeature(88, 2.5),
        AddFeature(90, 3, only_if_active=True),
        ClampFeature(91, max=1.0),
    ]
    built = extra_body(
        interventions=[
            Steer(vector="formal", strength=1.5),
            Steer(layer=15, values=[0.1, 0.2, 0.3], strength=4, mode="add", tokens=Tokens.generated),
            Steer(sae=SAE, feature=1234, strength=8),
            EditFeatures(SAE, edits),
            Suppress("sports", method="app", strength=1.0),
            Remap("forget-paris", strength=1.0),
            Rules("safety"),
        ],
        inspect=Inspect(SAE, top_k=8, features=[12, 88], tokens=Tokens.all),
    )
    assert json.loads(json.dumps(built)) == expected


@pytest.mark.parametrize(
    "built, expected",
    [
        (
            Steer(layers=[10, 15], values=[[1, 0], [0, 1]], mode="normalized"),
            {"type": "steer", "layers": [10, 15], "values": [[1, 0], [0, 1]], "mode": "normalized"},
        ),
        (
            Steer(layers=[10, 15], values=[1, 2]),
            {"type": "steer", "layers": [10, 15], "values": [1, 2]},
        ),
        (
            Steer(vector="v", mode="cap", min=-1, max=2),
            {"type": "steer", "vector": "v", "mode": "cap", "min": -1, "max": 2},
        ),
        (
            Steer(vector="v", strength=0, mode="project_out"),
            {"type": "steer", "vector": "v", "strength": 0, "mode": "project_out"},
        ),
        (
            EditFeatures(SAE, [AblateFeature(5)], id="quiet", when="seen(x)", include_bos=False, tokens=Tokens.prompt),
            {
                "type": "edit_features",
                "id": "quiet",
                "when": "seen(x)",
                "include_bos": False,
                "tokens": "prompt",
                "sae": SAE,
                "features": [{"index": 5, "op": "ablate"}],
            },
        ),
        (
            Suppress(InlineConcept(SAE, [1, 2], mu=[0.5, 1], sigma=[1, 1]), method="range"),
            {
                "type": "suppress",
                "concept": {"sae": SAE, "features": [1, 2], "mu": [0.5, 1], "sigma": [1, 1]},
                "method": "range",
            },
        ),
        (
            Suppress(InlineConcept(SAE, [1, 2], mu=0.5, sigma=1), method="range", tau=1.5, tokens="prompt"),
            {
                "type": "suppress",
                "tokens": "prompt",
                "concept": {"sae": SAE, "features": [1, 2], "mu": 0.5, "sigma": 1},
                "method": "range",
                "tau": 1.5,
            },
        ),
        (
            Remap("forget-paris", tokens="generated", id="u"),
            {"type": "remap", "id": "u", "tokens": "generated", "map": "forget-paris"},
        ),
        (
            Suppress("sports", strength=1.5),
            {"type": "suppress", "concept": "sports", "strength": 1.5},
        ),
        (
            Rules(rules=[{"if": "seen(toxicity)", "then": "q"}], actions=[{"on": "q", "flag": True}], id="r"),
            {
                "type": "rules",
                "rules": [{"if": "seen(toxicity)", "then": "q"}],
                "actions": [{"on": "q", "flag": True}],
                "id": "r",
            },
        ),
        (Rules(text="on q: flag", when="prompt(a)"), {"type": "rules", "text": "on q: flag", "when": "prompt(a)"}),
        (
            Steer(vector="calm", when={"not": {"seen": "toxicity"}}),
            {"type": "steer", "vector": "calm", "when": {"not": {"seen": "toxicity"}}},
        ),
        (Inspect(SAE, after=True, include_bos=True), {"sae": SAE, "after": True, "include_bos": True}),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, dict) else "",
)
def test_helpers_send_what_was_given_and_nothing_else(built: Any, expected: dict[str, Any]) -> None:
    assert json.loads(json.dumps(built.to_dict())) == expected


@pytest.mark.parametrize(
    "selector, expected",
    [
        (Tokens.all, "all"),
        (Tokens.last_prompt_token, "last_prompt_token"),
        (Tokens.slice(3, 9), {"from": 3, "to": 9}),
        (Tokens.slice(-4), {"from": -4}),
        (Tokens.slice(4, 4), {"from": 4, "to": 4}),
        (Tokens.ids([7042, " Paris"]), {"tokens": [7042, " Paris"]}),
        ({"from": 1, "to": 2}, {"from": 1, "to": 2}),
        ({"tokens": [5]}, {"tokens": [5]}),
        ([Tokens.last_prompt_token, Tokens.generated], ["last_prompt_token", "generated"]),
        ([Tokens.slice(0, 2), {"tokens": ["a"]}], [{"from": 0, "to": 2}, {"tokens": ["a"]}]),
    ],
)
def test_selectors_take_the_form_of_the_contract(selector: Any, expected: Any) -> None:
    assert Steer(vector="v", tokens=selector).to_dict()["tokens"] == expected
    assert Inspect(SAE, tokens=selector).to_dict()["tokens"] == expected


@pytest.mark.parametrize(
    "build, says",
    [
        (lambda: Steer(), "exactly one of vector, values"),
        (lambda: Steer(vector="v", sae=SAE, feature=1), "exactly one of"),
        (lambda: Steer(sae=SAE), "sae and feature go together"),
        (lambda: Steer(feature=3), "sae and feature go together"),
        (lambda: Steer(vector="v", layer=3), "bring their own layer"),
        (lambda: Steer(sae=SAE, feature=3, layers=[1]), "bring their own layer"),
        (lambda: Steer(values=[1.0]), "exactly one of layer and layers"),
        (lambda: Steer(values=[1.0], layer=1, layers=[1]), "exactly one of layer and layers"),
        (lambda: Steer(values=[[1.0], [2.0]], layers=[1, 2, 3]), "expected"),
        (lambda: Steer(values=[[1.0]], layer=1), "expected"),
        (lambda: Steer(values=[1.0], layers=[4, 4]), "layer 4 occurs twice"),
        (lambda: Steer(values=[1.0], layers=[]), "at least 1 item"),
        (lambda: Steer(values=[1.0], layer=-1), "greater than or equal to 0"),
        (lambda: Steer(vector="v", mode="cap"), "at least one of min and max"),
        (lambda: Steer(vector="v", mode="cap", min=2, max=1), "above max"),
        (lambda: Steer(vector="v", mode="cap", max=1, strength=2), "no strength"),
        (lambda: Steer(vector="v", max=1), "belong to mode cap"),
        (lambda: Steer(vector="v", mode="sideways"), "project_out"),
        (lambda: Steer(vector="v", strength=float("inf")), "finite"),
        (lambda: Steer(vector=""), "at least 1 character"),
        (lambda: Steer(vector="v", strenght=2), "strenght"),
        (lambda: Steer(vector="v", tokens="everything"), "last_prompt_token"),
        (lambda: Steer(vector="v", tokens=[]), "tokens"),
        (lambda: Steer(vector="v", tokens={"from": 1, "until": 2}), "until"),
        (lambda: Tokens.ids([]), "at least 1 item"),
        (lambda: EditFeatures(SAE, []), "at least 1 item"),
        (lambda: EditFeatures(SAE, [SetFeature(3, 1), AblateFeature(3)]), "feature 3 occurs twice"),
        (lambda: EditFeatures(SAE, [{"index": 1, "op": "double"}]), "'set', 'scale', 'add', 'clamp', 'ablate'"),
        (lambda: EditFeatures(SAE, [{"index": 1, "op": "set", "value": 1, "oly_if_active": True}]), "oly_if_active"),
        (lambda: SetFeature(-1, 0), "greater than or equal to 0"),
        (lambda: SetFeature(1, float("nan")), "finite"),
        (lambda: ClampFeature(1), "at least one of min and max"),
        (lambda: ClampFeature(1, min=3, max=2), "above max"),
        (lambda: Suppress("c", strength=-0.1), "greater than or equal to 0"),
        (lambda: Suppress(InlineConcept(SAE, [1]), method="range"), "needs its mu and sigma"),
        (lambda: Suppress(InlineConcept(SAE, [1], mu=1.0), method="range"), "needs its mu and sigma"),
        (lambda: Suppress(InlineConcept(SAE, [1]), method="app"), "only a fitted one"),
        (lambda: Suppress("c", tau=1.0), "tau belongs to method range"),
        (lambda: Suppress("c", method="range", tau=-1.0), "greater than or equal to 0"),
        (lambda: Remap("m", strength=-1), "greater than or equal to 0"),
        (lambda: Remap(""), "at least 1 character"),
        (lambda: Remap("m", scope="all"), "scope"),
        (lambda: InlineConcept(SAE, [1, 2], mu=[1]), "1 entries for 2 features"),
        (lambda: InlineConcept(SAE, [1, 2], sigma=[1, -1]), "not below 0"),
        (lambda: InlineConcept(SAE, [1], sigma=-2), "not below 0"),
        (lambda: Rules(), "exactly one of ruleset, text"),
        (lambda: Rules("safety", rules=[]), "exactly one of ruleset, text"),
        (lambda: Rules(text="", actions=[]), "exactly one of ruleset, text"),
        (lambda: Rules("safety", tokens="prompt"), "tokens"),
        (lambda: Rules(rules=["a -> b"]), "dictionary"),
        (lambda: Steer(vector="v", when=""), "at least 1 character"),
        (lambda: Inspect(SAE, features=[2, 2]), "feature 2 occurs twice"),
        (lambda: Inspect(SAE, topk=3), "topk"),
    ],
)
def test_what_cannot_be_right_is_refused_before_sending_and_says_why(build: Any, says: str) -> None:
    with pytest.raises(ValidationError) as refused:
        build()
    assert says in str(refused.value)


def test_a_plain_request_gets_no_field_of_ours() -> None:
    assert extra_body() == {}
    assert extra_body(interventions=[], inspect=None) == {}
    assert extra_body(inspect=[]) == {}


def test_inspect_may_be_one_or_a_list_and_plain_dicts_pass_as_they_are() -> None:
    assert extra_body(inspect=Inspect(SAE)) == {"inspect": {"sae": SAE}}
    assert extra_body(inspect=[Inspect(SAE), {"sae": "b"}]) == {"inspect": [{"sae": SAE}, {"sae": "b"}]}
    from_the_future = {"type": "teleport", "to": None}
    assert extra_body(interventions=[from_the_future]) == {"interventions": [from_the_future]}


@pytest.mark.parametrize("one", [Steer(vector="v"), {"type": "steer", "vector": "v"}])
def test_one_intervention_in_place_of_the_list_is_refused(one: Any) -> None:
    with pytest.raises(TypeError, match="is a list"):
        extra_body(interventions=one)


def test_numpy_scalars_are_numbers() -> None:
    steer = Steer(sae=SAE, feature=np.int64(3), strength=np.float32(0.5))  # type: ignore[arg-type]
    assert json.loads(json.dumps(steer.to_dict())) == {"type": "steer", "sae": SAE, "feature": 3, "strength": 0.5}
