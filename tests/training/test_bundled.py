"""The bundled dictionary is as good as its card says: judged again, on text that no corpus holds."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from editserver.demo.model import ensure_demo_model
from sae_weights.catalogue import BUNDLED_FOLDER, bundled, resolve
from sae_weights.training.activations import Truncated, collect
from sae_weights.training.evaluate import reconstruction

NAME = "smollm2-135m/l15"

PROSE = (
    (
        "The ferry left a little after seven, with the lamps of the harbour still burning. Marta stood at the rail and "
        "counted the gulls, as her grandmother had taught her to do whenever she was leaving home. There were nine. Behind "
        "her two men in raincoats argued about the price of apples, and a boy was trying to teach a parrot the word "
        "'captain'. By the time the island had sunk to a grey line, the sea had turned rough, and the cups in the small "
        "cafe below deck began to slide from one end of the shelf to the other."
    ),
    (
        "A bridge moves more than most people think. On a warm afternoon the steel of a long span grows by the width of a "
        "hand, and the engineers leave gaps at its ends so that it may. In winter the gaps open again. When the old bridge "
        "over the Tarn was measured last year, one of these joints was found to be packed with gravel; the deck had pushed "
        "against its own abutment for eleven summers, and a crack as thin as a hair ran through the second pier."
    ),
    (
        "The committee met on Thursday to discuss the budget for the coming year. Members agreed that the library needs a "
        "new roof, but they could not agree on how to pay for it. Mr. Okafor proposed a small increase in the parking fees; "
        "Mrs. Lindqvist said that the town had raised them twice since the spring, and that shopkeepers were complaining. "
        "The vote was put off until the treasurer can report on the sale of the former school."
    ),
)
CHAT = (
    [
        {"role": "user", "content": "How do I keep basil alive on a windowsill?"},
        {
            "role": "assistant",
            "content": "Basil likes light, warmth and steady moisture. Put the pot where it gets at least six hours of "
            "sun, water it when the top of the soil feels dry, and pinch off the tips so that it grows bushy.",
        },
        {"role": "user", "content": "And in winter?"},
        {
            "role": "assistant",
            "content": "In winter it needs a warm place away from cold glass. A small lamp helps, and you should water "
            "it less often because it grows more slowly.",
        },
    ],
    [
        {"role": "system", "content": "You are a helpful AI assistant."},
        {"role": "user", "content": "Write two sentences about a clockmaker."},
        {
            "role": "assistant",
            "content": "The clockmaker lived above his shop on a narrow street, where the ticking never stopped. Every "
            "evening he wound the oldest clock first and told it about the people he had met that day.",
        },
    ],
)


@pytest.fixture(scope="module")
def card():
    return json.loads((BUNDLED_FOLDER / NAME / "card.json").read_text())


@pytest.fixture(scope="module")
def sae():
    return resolve(NAME)[1]


@pytest.fixture(scope="module")
def judged(sae):
    path = ensure_demo_model(progress=False)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = Truncated(AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval(), 15)
    texts = {"prose": list(PROSE), "chat": [tokenizer.apply_chat_template(c, tokenize=False) for c in CHAT]}
    windows = {kind: [tokenizer.encode(t, add_special_tokens=False) for t in ts] for kind, ts in texts.items()}
    return {kind: collect(model, ids) for kind, ids in windows.items()}


@pytest.mark.parametrize("kind", ["prose", "chat"])
def test_reconstruction_and_sparsity_agree_with_the_card(kind, judged, card, sae):
    found = reconstruction(sae, judged[kind].values)
    assert found.fvu == pytest.approx(card[kind]["fvu"], abs=0.04)
    assert found.l0 == pytest.approx(card[kind]["l0"], rel=0.15)


def test_card_meets_what_was_asked_of_the_dictionary(card):
    assert max(card[kind]["fvu"] for kind in ("prose", "chat")) <= 0.20
    assert card["dead"] <= 0.01
    assert min(card[kind]["ce_recovered"] for kind in ("prose", "chat")) >= 0.98


def test_median_norm_of_the_sidecar_is_the_models(judged, sae):
    norms = torch.cat([part.values.float().norm(dim=1) for part in judged.values()])
    assert sae.metadata["median_norm"] == pytest.approx(float(norms.median()), rel=0.1)


def test_it_reads_layer_15_and_its_stored_matrices_are_bf16(sae):
    assert NAME in bundled()
    assert (str(sae.hook), sae.hook.hook_name) == ("resid_post(15)", "blocks.15.hook_resid_post")
    assert (sae.d_model, sae.n_features) == (576, 4608)
    with safe_open(BUNDLED_FOLDER / NAME / "sae_weights.safetensors", "pt") as file:
        assert {name: file.get_slice(name).get_dtype() for name in ("W_enc", "W_dec")} == {
            "W_enc": "BF16",
            "W_dec": "BF16",
        }


def test_decoder_rows_are_unit_so_activations_are_lengths(sae):
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(sae.n_features), atol=5e-3, rtol=0)


def test_each_labelled_feature_is_largest_on_the_tokens_it_is_labelled_by(sae):
    labelled = json.loads((BUNDLED_FOLDER / NAME / "features.json").read_text())["features"]
    path = ensure_demo_model(progress=False)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = Truncated(AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval(), 15)
    features = [entry["index"] for entry in labelled]
    means = []
    for entry in labelled:
        words = entry["fires_on"]
        texts = [tokenizer.encode("Yesterday they talked for a while about the" + word) for word in words]
        last = [model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64))[0, -1] for ids in texts]
        means.append(sae.encode(torch.stack(last).float())[:, features].mean(dim=0))
    table = torch.stack(means)  # [label whose tokens were read, feature]
    assert table.argmax(dim=0).tolist() == list(range(len(features)))
    assert float(table.diagonal().min()) > 5
