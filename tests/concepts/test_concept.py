from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from interventions.concepts.concept import METHODS, Concept, build_concept
from interventions.concepts.density import Densities
from interventions.concepts.detector import Detector
from interventions.concepts.gain import Range, Whole, apply
from interventions.concepts.moments import Moments
from interventions.concepts.posterior import posterior
from interventions.concepts.salient import Selection, select
from interventions.errors import InterventionError
from interventions.rules.proposition import Sum
from tests.concepts.samples import CLASSES, fitted, sparse_batch

SAE = "ab" * 32


def statistics() -> tuple[Moments, Densities, Selection]:
    moments, densities = fitted([sparse_batch(seed) for seed in range(3)], CLASSES, 30)
    return moments, densities, select(moments, "world", top=3, max_rate=None)


def concept(**changes: Any) -> Concept:
    moments, densities, selection = statistics()
    fields: dict[str, Any] = {
        "sae_digest": SAE,
        "layer": 15,
        "model": "a model",
        "background": "background",
        "fitted_on": {"texts": {"world": 3}, "sha256": "0" * 64, "über": "σ"},
    }
    return build_concept(moments, densities, selection, "world", **(fields | changes))


def test_a_concept_holds_what_was_fitted() -> None:
    moments, densities, selection = statistics()
    made = concept()
    index = list(selection.features)
    assert made.features.tolist() == index
    torch.testing.assert_close(made.posterior, posterior(densities, "world")[index].float())
    torch.testing.assert_close(made.firing_rate, moments.firing_rate[:, index])
    torch.testing.assert_close(made.mean, moments.mean[:, index].float())
    torch.testing.assert_close(made.std, moments.std[:, index].float())
    assert made.tokens.tolist() == moments.tokens.tolist()
    assert (made.n_bins, made.by, made.target) == (30, "difference", "world")


def test_densities_of_the_selected_latents_alone_give_the_same_concept() -> None:
    moments, densities, selection = statistics()
    few = densities.select(torch.tensor(selection.features))
    facts: dict[str, Any] = {"sae_digest": SAE, "layer": 15, "model": "a model"}
    one = build_concept(moments, few, selection, "world", **facts)
    assert one.digest == build_concept(moments, densities, selection, "world", **facts).digest
    other = densities.select(torch.tensor([j for j in range(6) if j not in selection.features]))
    with pytest.raises(ValueError, match="not of the selected latents"):
        build_concept(moments, other, selection, "world", **facts)


def test_priors_enter_the_table() -> None:
    _, densities, selection = statistics()
    weights = {"sports": 1.0, "world": 1.0, "background": 6.0}
    made = concept(priors=weights)
    index = list(selection.features)
    torch.testing.assert_close(made.posterior, posterior(densities, "world", weights)[index].float())
    assert made.priors.tolist() == [0.125, 0.125, 0.75]
    assert made.digest != concept().digest


def test_every_method_has_its_transfer_function() -> None:
    made, a = concept(), torch.rand(20, 3) * 5
    assert isinstance(made.transfer("mask"), Whole)
    assert isinstance(made.transfer("attenuate"), Whole)
    mask = made.transfer("range", tau=1.5)
    assert isinstance(mask, Range)
    torch.testing.assert_close(mask.mean, made.mean[1])
    torch.testing.assert_close(mask.std, made.std[1])
    torch.testing.assert_close(apply(made.transfer("app"), a, 2.0), a * (1 - 2 * made.table.weight(a)))
    with pytest.raises(ValueError, match="app, attenuate, mask, range"):
        made.transfer("delete")  # type: ignore[arg-type]
    assert METHODS == ("app", "attenuate", "mask", "range")


def test_a_file_read_back_is_the_same_concept() -> None:
    made = concept()
    raw = made.to_bytes()
    read = Concept.from_bytes(raw)
    assert read.digest == made.digest
    assert read.to_bytes() == raw
    for field in dataclasses.fields(Concept):
        mine, theirs = getattr(made, field.name), getattr(read, field.name)
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs, field.name
    assert len(raw) < 10_000


def test_equal_fits_have_equal_bytes_and_digest() -> None:
    assert concept().to_bytes() == concept().to_bytes()
    reordered = {"über": "σ", "sha256": "0" * 64, "texts": {"world": 3}}
    assert concept(fitted_on=reordered).digest == concept().digest


def test_the_digest_sees_every_field() -> None:
    made = concept()
    seen = {made.digest}
    for field in dataclasses.fields(Concept):
        value = getattr(made, field.name)
        other: Any
        match field.name:
            case "sae_digest":
                other = "cd" * 32
            case "classes":
                other = ("sport", "world", "background")
            case "target":
                other = "sports"
            case "background":
                other = None
            case "by":
                other = "mean"
            case "max_rate":
                other = 0.5
            case "fitted_on":
                other = {}
            case "priors":
                other = torch.tensor([0.25, 0.25, 0.5])
            case "layer" | "dense":
                other = value + 1
            case "model":
                other = "another model"
            case "features":
                other = value + 1
            case "firing":
                other = value - 1
            case "detector":
                other = Detector("single", Sum(((3, 1.0),)), 2.5)
            case _:  # the last number alone
                other = value.clone()
                other.view(-1)[-1] += (
                    1 if not value.is_floating_point() else 0.25 * (1 - 2 * other.view(-1)[-1].round())
                )
        seen.add(dataclasses.replace(made, **{field.name: other}).digest)
    assert len(seen) == 1 + len(dataclasses.fields(Concept))


def test_another_sae_is_refused() -> None:
    made = concept()
    made.check_sae(SAE, 15, 4608)
    for given, field, message in (
        (("cd" * 32, 15, 4608), "sae_digest", f"fitted on the SAE {SAE}, not on {'cd' * 32}"),
        ((SAE, 16, 4608), "layer", "at layer 15"),
        ((SAE, 15, 2), "features", "0..1"),
    ):
        with pytest.raises(InterventionError, match=message) as caught:
            made.check_sae(*given)
        assert (caught.value.code, caught.value.param, caught.value.status) == ("invalid_artifact", field, 400)


def poisoned(name: str, value: float, dtype: torch.dtype | None = None) -> torch.Tensor:
    tensor = getattr(concept(), name).clone()
    tensor = tensor.to(dtype) if dtype else tensor
    tensor.view(-1)[-1] = value
    return tensor


BAD: list[tuple[str, Any]] = [
    ("sae_digest", "AB" * 32),
    ("sae_digest", "ab"),
    ("sae_digest", 7),
    ("layer", -1),
    ("layer", True),
    ("layer", 1.0),
    ("layer", 10**400),
    ("dense", -1),
    ("model", ""),
    ("classes", ("world", "world", "background")),
    ("classes", ("world",)),
    ("classes", ("world", 3, "background")),
    ("classes", "world"),
    ("classes", ("world", "sports", "x" * 200)),
    ("target", "weather"),
    ("target", "\ud800"),
    ("target", ["world"]),
    ("background", "weather"),
    ("background", "world"),
    ("by", "median"),
    ("max_rate", math.nan),
    ("max_rate", 1.5),
    ("max_rate", "0.1"),
    ("fitted_on", []),
    ("fitted_on", {"loss": math.nan}),
    ("fitted_on", {"set": {1, 2}}),
    ("fitted_on", {"long": "x" * 70_000}),
    ("features", torch.tensor(3)),
    ("features", torch.tensor([1, 1, 2])),
    ("features", torch.tensor([3, 2, 1])),
    ("features", torch.tensor([-1, 2, 3])),
    ("features", torch.tensor([1.0, 2.0, 3.0])),
    ("edges", torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 1.0]])),
    ("edges", torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1e-44]])),
    ("edges", torch.tensor([[0.0, 1.0]])),
    ("posterior", torch.zeros(3)),
    ("posterior", torch.zeros(3, 0)),
    ("posterior", torch.zeros(3, 4, dtype=torch.float64)),
    *[
        (name, ("poison", math.nan))
        for name in ("edges", "posterior", "separability", "scores", "mean", "std", "priors")
    ],
    *[(name, ("poison", math.inf)) for name in ("scores", "mean", "std")],
    *[(name, ("poison", -0.5)) for name in ("posterior", "separability", "mean", "std", "priors")],
    *[(name, ("poison", 1.5)) for name in ("posterior", "separability", "priors")],
    ("priors", torch.tensor([0.2, 0.2, 0.2])),
    ("tokens", ("poison", 0)),
    ("firing", ("poison", -1)),
    ("firing", ("poison", 10**9)),
    ("mean", torch.zeros(2, 3)),
    ("tokens", torch.zeros(3)),
]


@pytest.mark.parametrize(("field", "value"), BAD, ids=lambda value: value if isinstance(value, str) else None)
def test_what_is_wrong_is_named(field: str, value: Any) -> None:
    if isinstance(value, tuple) and value[0] == "poison":
        value = poisoned(field, value[1])
    with pytest.raises(InterventionError) as caught:
        dataclasses.replace(concept(), **{field: value})
    assert caught.value.code == "invalid_artifact"
    assert caught.value.param == field
    assert caught.value.message.startswith(f"{field}: ")
    caught.value.message.encode()


def rewritten(facts: dict[str, Any] | None = None, drop: str = "", **tensors: torch.Tensor) -> bytes:
    """The file with other facts or tensors."""
    raw = concept().to_bytes()
    header = json.loads(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]["concept"])
    kept = {name: value for name, value in (load(raw) | tensors).items() if name != drop}
    merged = {name: value for name, value in (header | (facts or {})).items() if name != drop}
    return save(kept, {"concept": json.dumps(merged)})


@pytest.mark.parametrize("name", ["features", "posterior", "std", "target", "fitted_on", "format"])
def test_a_file_that_lacks_something_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(InterventionError) as caught:
        Concept.from_bytes(rewritten(drop=name))
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        (lambda: b"", None),
        (lambda: b"\x80\x04K\x01.", None),
        (lambda: concept().to_bytes()[:-1], None),
        (lambda: concept().to_bytes() + b"\0", None),
        (lambda: save({"features": torch.zeros(1)}), None),
        (lambda: save({"features": torch.zeros(1)}, {"concept": "{"}), None),
        (lambda: save({"features": torch.zeros(1)}, {"concept": "[" * 100_000}), None),
        (lambda: save({"features": torch.zeros(1)}, {"concept": "[]"}), "format"),
        (lambda: rewritten({"format": 3}), "format"),
        (lambda: rewritten({"colour": "red"}), "colour"),
        (lambda: rewritten({"layer": "15"}), "layer"),
        (lambda: rewritten({"classes": ["\ud800", "a"]}), "target"),
        (lambda: rewritten({"max_rate": math.nan}), "max_rate"),
        (lambda: rewritten({"classes": [["world"]] * 3}), "classes"),
        (lambda: rewritten(extra=torch.zeros(1)), "extra"),
        (lambda: rewritten(edges=torch.zeros(3, 2, dtype=torch.float16)), "edges"),
    ],
)
def test_files_that_are_no_concept_are_refused(raw: Any, param: str | None) -> None:
    with pytest.raises(InterventionError) as caught:
        Concept.from_bytes(raw())
    assert (caught.value.code, caught.value.param) == ("invalid_artifact", param)
    assert len(caught.value.message.encode()) < 400


def test_a_file_altered_in_its_tables_has_another_digest() -> None:
    made = concept()
    changed = made.posterior.clone()
    changed[0, 0] = changed[0, 0].nextafter(torch.tensor(0.5))
    assert Concept.from_bytes(rewritten(posterior=changed)).digest != made.digest
