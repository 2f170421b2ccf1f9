"""Architectures against their authors' own classes, run in their own environment, on the same weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_weights import SAE, Folding, Hook
from tests.sae_weights.formats.agreement import check_agreement
from tests.sae_weights.formats.draws import Draws
from tests.sae_weights.oracle import needs_oracle, run_oracle

pytestmark = needs_oracle

HOOK = Hook("resid_post", 3)
D, N, TOKENS = 16, 48, 40
GROUPS = [8, 16, 24]


@dataclass(frozen=True)
class Case:
    author: str  # function of oracle_architectures.py
    options: dict[str, Any]  # for the authors' class
    ours: dict[str, Any]  # for SAE.from_tensors
    zero: tuple[str, ...] = ()  # tensors that this checkpoint does not have
    prefix: int | None = None
    unit: bool = False  # decoder rows of norm 1
    tensors: tuple[str, ...] = ("W_enc", "W_dec", "b_enc", "b_dec")
    inputs: float = field(default=1.0)


def pursuit(**settings):
    return {"architecture": "matching_pursuit", "settings": settings}


MP = {"author": "matching_pursuit", "tensors": ("W_dec", "b_dec"), "unit": True}
CENTRED = {"folding": Folding(subtract_b_dec=True)}
CASES = {
    "abstopk": Case("abstopk", {"k": 5}, {"architecture": "abstopk", "k": 5, **CENTRED}),
    "abstopk-plain": Case(
        "abstopk", {"k": 5, "apply_b_dec_to_input": False}, {"architecture": "abstopk", "k": 5, "folding": None}
    ),
    "abstopk-rescaled": Case(
        "abstopk",
        {"k": 7, "rescale_acts_by_decoder_norm": True},
        {"architecture": "abstopk", "k": 7, "folding": Folding(decoder_norm=True, subtract_b_dec=True)},
    ),
    "abstopk-layer-norm": Case(
        "abstopk",
        {"k": 5, "normalize_activations": "layer_norm", "apply_b_dec_to_input": False},
        {"architecture": "abstopk", "k": 5, "input_norm": "layer_norm"},
    ),
    "mp-threshold": Case(
        options={"residual_threshold": 1.5, "stop_on_duplicate_support": False},
        ours=pursuit(residual_threshold=1.5, stop_on_duplicate_support=False) | CENTRED,
        **MP,
    ),
    "mp-defaults": Case(options={}, ours=pursuit() | CENTRED, **MP),
    "mp-iterations": Case(
        options={"max_iterations": 6, "residual_threshold": 0.0, "stop_on_duplicate_support": False},
        ours=pursuit(max_iterations=6, residual_threshold=0.0, stop_on_duplicate_support=False) | CENTRED,
        **MP,
    ),
    "mp-not-centred": Case(
        options={"apply_b_dec_to_input": False, "max_iterations": 9},
        ours=pursuit(max_iterations=9),
        zero=("b_dec",),
        **MP,
    ),
    "mp-constant-norm": Case(
        options={"normalize_activations": "constant_norm_rescale", "max_iterations": 9},
        ours=pursuit(max_iterations=9) | CENTRED | {"input_norm": "constant_norm_rescale"},
        **MP,
    ),
    "mp-sae-of-overcomplete": Case(
        "mp_sae",
        {"k": 5},
        pursuit(max_iterations=5, residual_threshold=0.0, stop_on_duplicate_support=False, rectify=False),
        zero=("b_dec",),
        unit=True,
        tensors=("W_dec",),
    ),
    # So few atoms that all correlations of some tokens are negative: the best of them is subtracted all the same.
    "mp-sae-of-overcomplete-negative": Case(
        "mp_sae",
        {"k": 4},
        pursuit(max_iterations=4, residual_threshold=0.0, stop_on_duplicate_support=False, rectify=False),
        zero=("b_dec",),
        unit=True,
        tensors=("W_dec",),
        inputs=-1.0,
    ),
    "groupmax": Case("groupmax", {"k": 6}, {"architecture": "groupmax", "k": 6, **CENTRED}),
    "groupmax-transcode": Case(
        "groupmax", {"k": 6, "transcode": True}, {"architecture": "groupmax", "k": 6, "folding": None}
    ),
    **{
        f"matryoshka-{active}": Case(
            "matryoshka",
            {"group_sizes": GROUPS, "active_groups": active},
            {"architecture": "matryoshka", "settings": {"group_sizes": GROUPS}, **CENTRED},
            prefix=active,
            tensors=("W_enc", "W_dec", "b_enc", "b_dec", "threshold"),
        )
        for active in (1, 2, 3)
    },
}


def weights(name: str) -> dict[str, torch.Tensor]:
    case = CASES[name]
    draws = Draws(sorted(CASES).index(name))
    few = 5 if name.endswith("negative") else N
    made = {
        "W_enc": draws.normal(few, D),
        "W_dec": draws.uneven(few, D),
        "b_enc": draws.normal(few, spread=0.3),
        "b_dec": draws.normal(D, spread=0.5),
        "threshold": torch.full((few,), 1.25),
    }
    if case.unit:
        made["W_dec"] = made["W_dec"] / made["W_dec"].norm(dim=1, keepdim=True)
    if name.endswith("negative"):
        made["W_dec"] = made["W_dec"].abs()
    x = draws.tokens(TOKENS, D)
    return {"x": x.abs() * case.inputs if case.inputs < 0 else x, **made}


def ours(name: str) -> SAE:
    case, made = CASES[name], weights(name)
    given = {n: made[n] if n in case.tensors and n not in case.zero else torch.zeros_like(made[n]) for n in made}
    gate = {"b_enc": given["b_enc"]}
    if "threshold" in case.tensors:
        gate["threshold"] = given["threshold"]
    encoder = {"W_enc": given["W_enc"]} if "W_enc" in case.tensors else {}
    sae = SAE.from_tensors(hook=HOOK, W_dec=given["W_dec"], b_dec=given["b_dec"], gate=gate, **encoder, **case.ours)
    return sae if case.prefix is None else sae.prefix(case.prefix)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    work = tmp_path_factory.mktemp("authors")
    for name, case in CASES.items():
        made = weights(name)
        (work / name).mkdir()
        (work / name / "case.json").write_text(json.dumps({"author": case.author, "options": case.options}))
        save_file({n: made[n].contiguous() for n in ("x", *case.tensors)}, work / name / "given.safetensors")
    run_oracle("oracle_architectures.py", work)
    return work


@pytest.mark.parametrize("name", CASES)
def test_the_same_numbers_as_the_authors_code(answers, name):
    found = load_file(answers / name / "answers.safetensors")
    sae, f = ours(name), found["f"]
    # A prefix has its own features only; the authors keep the rest at zero.
    assert not f[:, sae.n_features :].any()
    check_agreement(sae, weights(name)["x"], f[:, : sae.n_features], found["x_hat"])


def test_the_cases_show_what_they_are_for(answers):
    f = {name: load_file(answers / name / "answers.safetensors")["f"] for name in CASES}
    active = {name: (values != 0).sum(dim=1) for name, values in f.items()}
    assert (f["abstopk"] < 0).any()
    assert (f["abstopk"] > 0).any()
    assert active["mp-threshold"].unique().numel() > 3  # tokens stop at different times
    assert (active["mp-iterations"] < 6).any()  # a latent is chosen twice
    assert (active["mp-iterations"] == 6).any()
    assert (f["mp-sae-of-overcomplete-negative"] < 0).any()
    assert active["groupmax"].max() <= 6
    assert active["matryoshka-1"].sum() < active["matryoshka-3"].sum()
