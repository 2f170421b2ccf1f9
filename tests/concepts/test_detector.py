"""Detectors as artefacts and as propositions of rule sets."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from editserver.library.concepts import concept_body, parse_concept
from interventions.concepts.concept import Concept
from interventions.concepts.detector import Detector, Peak, Share, detector_from_dict
from interventions.errors import InterventionError
from interventions.rules.build import Context, Dictionary
from interventions.rules.proposition import Leaf, Split, Sum, Tree
from interventions.rules.reading import parse_ruleset
from interventions.rules.reference import evaluate
from tests.concepts.test_concept import concept

SAE = "smollm2-135m/l15"
MULTI = Detector("multi", Sum(((3, 0.5), (7, 1.0))), 2.5, Peak(4.0))
TREE = Detector(
    "relation",
    Tree(Split(3, ">=", 1.0, Leaf(0.875), Split(9, ">=", 0.125, Leaf(0.5), Leaf(0.125)))),
    0.5,
    Share(123_400),
)
SINGLE = Detector("single", Sum(((3, 1.0),)), float(np.float32(0.1)))
ALL = (MULTI, TREE, SINGLE, replace(MULTI, text=Peak(2.5)), replace(MULTI, text=Share(120_000)))


reals = st.floats(-100, 100, width=32).map(lambda value: value + 0.0)
sums = st.dictionaries(st.integers(0, 2**31 - 1), reals.filter(bool), min_size=2, max_size=6).map(
    lambda terms: Sum(tuple(sorted(terms.items())))
)
nodes = st.recursive(
    st.builds(Leaf, reals),
    lambda inner: st.builds(Split, st.integers(0, 99), st.just(">="), reals, inner, inner),
    max_leaves=8,
)
texts = st.one_of(st.none(), st.builds(Peak, reals), st.builds(Share, st.integers(1, 1_000_000)))
detectors = st.one_of(
    st.builds(Detector, st.just("multi"), sums, reals, texts),
    nodes.filter(lambda node: _plain(node) and not isinstance(node, Leaf)).flatmap(
        lambda node: st.builds(Detector, st.just("relation"), st.just(Tree(node)), reals, texts)
    ),
)


def _plain(node: Leaf | Split, depth: int = 0) -> bool:
    """No split between equal sides, and no deeper than the language allows."""
    if isinstance(node, Leaf):
        return True
    sides = node.then, node.other
    return depth < 8 and sides[0] != sides[1] and all(_plain(side, depth + 1) for side in sides)


@given(detectors)
def test_what_is_written_reads_back_the_same(made: Detector) -> None:
    assert detector_from_dict(json.loads(json.dumps(made.as_dict()))) == made
    assert Detector.from_arrays(json.loads(json.dumps(made.facts())), made.arrays()) == made


@pytest.mark.parametrize("made", ALL)
def test_a_concept_keeps_its_detector_in_its_file_and_over_http(made: Detector) -> None:
    whole = replace(concept(), detector=made)
    raw = whole.to_bytes()
    read = Concept.from_bytes(raw)
    assert read.detector == made
    assert (read.digest, read.to_bytes()) == (whole.digest, raw)
    assert parse_concept(json.loads(json.dumps(concept_body(whole)))).digest == whole.digest
    assert b"pickle" not in raw


def test_concepts_without_a_detector_stay_what_they_were() -> None:
    """Bytes and digest of format 1, as they were before there were detectors."""
    plain = concept(fitted_on={})
    raw = plain.to_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    facts = json.loads(header["__metadata__"]["concept"])
    assert facts["format"] == 1
    assert "detector" not in facts
    assert not any(name.startswith("detector") for name in header)
    sha = hashlib.sha256(b"editserver-concept/1")
    words = json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()
    sha.update(f"{len(words)}:".encode() + words)
    for name, tensor in sorted(load(raw).items()):
        values = tensor.numpy().tobytes()
        sha.update(f"{name}:{list(tensor.shape)}:{len(values)}:".encode() + values)
    assert plain.digest == sha.hexdigest()
    assert Concept.from_bytes(raw).detector is None
    assert "detector" not in concept_body(plain)


def test_equal_scores_at_another_level_are_another_concept() -> None:
    made = [replace(concept(), detector=one) for one in (*ALL, None)]
    assert len({one.digest for one in made}) == len(made)


# rules ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "name", "propositions", "text"),
    [
        (MULTI, "toxicity", {"toxicity", "toxicity.text"}, "prompt(toxicity.text)"),
        (TREE, "toxicity", {"toxicity"}, "at least 12.34 % of prompt(toxicity)"),
        (replace(MULTI, text=Peak(2.5)), "toxicity", {"toxicity"}, "prompt(toxicity)"),
        (SINGLE, "toxicity", {"toxicity"}, None),
        (replace(SINGLE, text=Peak(3.0)), "3d", {"3d", "3d.text"}, f"prompt(feature({SAE}, 3) >= 3)"),
        (replace(MULTI, text=Share(500_000)), "prompt", {"prompt"}, None),
    ],
)
def test_rules_know_a_concept_by_its_name(made: Detector, name: str, propositions: set[str], text: str | None) -> None:
    found = made.propositions(SAE, name)
    assert set(found) == propositions
    written = made.expressions(SAE, name)
    if text is not None:
        assert written["text"] == text
    assert ("text" in written) == (made.text is not None)
    context = Context({SAE: Dictionary(15, 4608)}, found)
    for words in written.values():  # names that the language does not take are written out
        (rule,) = parse_ruleset(f"rule: {words} -> found", context).rules
        assert rule.head == "found"


def test_a_rule_set_decides_as_the_detector_does() -> None:
    """Token by token and of whole prompts, on the same readings; position 0 is never evidence."""
    rng = np.random.default_rng(0)
    decided = set()
    for made in (MULTI, TREE, replace(MULTI, text=Share(300_000))):
        context = Context(None, made.propositions(SAE, "c"))
        written = made.expressions(SAE, "c")
        rules = parse_ruleset(f"rule: {written['token']} -> here\nrule: {written['text']} -> present", context)
        for _ in range(20):
            n = int(rng.integers(2, 12))
            x = {f: np.where(rng.random(n) < 0.6, 0, 4 * rng.random(n)).astype(np.float32) for f in (3, 7, 9)}
            steps = evaluate(rules, {(SAE, f): values for f, values in x.items()}, n, n)
            scores = made.scores({f: values[1:] for f, values in x.items()})
            here = [step.position for step in steps if "here" in step.conclusions]
            assert here == (np.flatnonzero(made.tokens(scores)) + 1).tolist()
            assert ("present" in steps[-1].conclusions) == made.holds(scores)
            decided.add((made, made.holds(scores)))
    assert len(decided) == 6


# what is refused -----------------------------------------------------------------------------------------------------


def hostile(made: Detector, **changes: Any) -> bytes:
    """A file of format 2 whose detector was tampered with; a value of None leaves something out."""
    raw = replace(concept(), detector=made).to_bytes()
    size = int.from_bytes(raw[:8], "little")
    facts = json.loads(json.loads(raw[8 : 8 + size])["__metadata__"]["concept"])
    tensors = load(raw)
    for name, value in changes.items():
        target: dict[str, Any] = tensors if name.startswith("detector_") else facts["detector"]
        if name in ("format", "detector"):
            target = facts
        target.pop(name, None)
        if value is not None:
            target[name] = value
    return save(tensors, {"concept": json.dumps(facts)})


def nodes_of(*rows: tuple[int, int, int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64)


HOSTILE: list[tuple[Detector, dict[str, Any], str | None]] = [
    (MULTI, {"format": 1}, "detector"),
    (MULTI, {"format": 3}, "format"),
    (MULTI, {"format": True}, "format"),
    (MULTI, {"detector": None}, "detector"),
    (MULTI, {"detector": "x" * 10_000}, "detector"),
    (MULTI, {"kind": "exec"}, "detector.kind"),
    (MULTI, {"kind": "relation"}, "detector"),
    (MULTI, {"kind": "single"}, "detector.kind"),
    (MULTI, {"code": "print()"}, "detector.code"),
    (MULTI, {"threshold": None}, "detector.threshold"),
    (MULTI, {"threshold": "1"}, "detector.threshold"),
    (MULTI, {"threshold": True}, "detector.threshold"),
    (MULTI, {"threshold": 10**400}, "detector.threshold"),
    (MULTI, {"threshold": 1e300}, "detector.threshold"),
    (MULTI, {"text": {"percent": 0}}, "detector.text.percent"),
    (MULTI, {"text": {"percent": 1e-9}}, "detector.text.percent"),
    (MULTI, {"text": {"percent": 5, "threshold": 1}}, "detector.text"),
    (MULTI, {"text": []}, "detector.text"),
    (MULTI, {"detector_features": None}, "detector"),
    (MULTI, {"detector_weights": torch.ones(3)}, "detector_weights"),
    (MULTI, {"detector_weights": torch.tensor([0.0, 1.0])}, "detector_weights"),
    (MULTI, {"detector_weights": torch.tensor([torch.nan, 1.0])}, "detector_weights"),
    (MULTI, {"detector_weights": torch.ones(2, dtype=torch.float64)}, "detector_weights"),
    (MULTI, {"detector_weights": torch.ones(2, dtype=torch.bfloat16)}, "detector_weights"),
    (MULTI, {"detector_features": torch.tensor([7, 3])}, "detector_features"),
    (MULTI, {"detector_features": torch.tensor([3, 3])}, "detector_features"),
    (MULTI, {"detector_features": torch.tensor([-1, 3])}, "detector_features"),
    (MULTI, {"detector_features": torch.tensor([3, 2**31])}, "detector_features"),
    (MULTI, {"detector_features": torch.zeros(0, dtype=torch.int64)}, "detector_features"),
    (MULTI, {"detector_features": torch.arange(300), "detector_weights": torch.ones(300)}, "detector_features"),
    (MULTI, {"detector_nodes": nodes_of((3, 1, 2))}, "detector"),
    (TREE, {"kind": "multi"}, "detector"),
    (TREE, {"detector_nodes": torch.zeros(5, 2, dtype=torch.int64)}, "detector_nodes"),
    (TREE, {"detector_nodes": nodes_of((3, 0, 0))}, "detector_values"),
    # a loop, a node that hangs on two, one that hangs on nothing, one that is not there, and no split at all
    (TREE, {"detector_nodes": nodes_of((3, 1, 0), (-1, 0, 0)), "detector_values": torch.ones(2)}, "detector_nodes"),
    (TREE, {"detector_nodes": nodes_of((3, 1, 1), (-1, 0, 0)), "detector_values": torch.ones(2)}, "detector_nodes"),
    (
        TREE,
        {"detector_nodes": nodes_of((3, 1, 2), *[(-1, 0, 0)] * 3), "detector_values": torch.arange(4.0)},
        "detector_nodes",
    ),
    (
        TREE,
        {"detector_nodes": nodes_of((3, 1, 9), *[(-1, 0, 0)] * 2), "detector_values": torch.arange(3.0)},
        "detector_nodes",
    ),
    (TREE, {"detector_nodes": nodes_of((-1, 0, 0)), "detector_values": torch.ones(1)}, "detector_nodes"),
    (
        TREE,
        {"detector_nodes": nodes_of((3, 1, 2), *[(-1, 0, 0)] * 2), "detector_values": torch.ones(3)},
        "detector_nodes",
    ),
    (
        TREE,
        {"detector_nodes": nodes_of((-2, 1, 2), *[(-1, 0, 0)] * 2), "detector_values": torch.arange(3.0)},
        "detector_nodes",
    ),
]


@pytest.mark.parametrize(("made", "changes", "param"), HOSTILE, ids=lambda value: str(value)[:40])
def test_a_tampered_file_is_refused_by_its_field(made: Detector, changes: dict[str, Any], param: str | None) -> None:
    with pytest.raises(InterventionError) as caught:
        Concept.from_bytes(hostile(made, **changes))
    assert (caught.value.code, caught.value.param) == ("invalid_artifact", param)


def test_a_tree_deeper_than_the_language_allows_is_refused() -> None:
    chain = [row for i in range(9) for row in ((i, 2 * i + 1, 2 * i + 2), (-1, 0, 0))]
    values = torch.arange(19.0)
    with pytest.raises(InterventionError, match="at most 8 below the root"):
        Concept.from_bytes(hostile(TREE, detector_nodes=nodes_of(*chain, (-1, 0, 0)), detector_values=values))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "detector.kind"),
        ({"kind": "multi"}, "detector.threshold"),
        ({"kind": "multi", "threshold": 1}, "detector"),
        ({"kind": "multi", "threshold": 1, "features": [{"index": 1.5}]}, "detector.features[0].index"),
        ({"kind": "multi", "threshold": 1, "features": [{"index": 1}], "op": ">"}, "detector.op"),
        ({"kind": "relation", "threshold": 1, "features": [{"index": 1}]}, "detector.kind"),
        ({"kind": "relation", "threshold": 1, "tree": {"feature": 1}}, "detector.tree.op"),
        ({"kind": "multi", "threshold": 1, "features": [{"index": 1}], "expressions": {}}, "detector.expressions"),
        (7, "detector"),
    ],
)
def test_a_bad_body_is_refused_by_its_field(body: Any, param: str) -> None:
    with pytest.raises(InterventionError) as caught:
        parse_concept(concept_body(concept()) | {"detector": body})
    assert (caught.value.code, caught.value.param) == ("invalid_artifact", param)


def test_a_latent_that_the_dictionary_does_not_have_is_refused() -> None:
    whole = replace(concept(), detector=replace(SINGLE, score=Sum(((5000, 1.0),))))
    with pytest.raises(InterventionError, match=r"index 5000; this SAE has 0\.\.4607"):
        whole.check_sae(whole.sae_digest, 15, 4608)
