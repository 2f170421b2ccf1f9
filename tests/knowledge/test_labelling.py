"""The label pass against a plain loop, token by token, and its contexts against what they promise."""

from __future__ import annotations

import copy
import math
import random
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch

from sae_weights import SAE, Hook
from sae_weights.knowledge.facts import Feature
from sae_weights.knowledge.labelling import label, with_labels
from sae_weights.knowledge.lens import final_norm, logit_lens
from sae_weights.knowledge.measurement import AFTER, BEFORE, Passage

from .conftest import D_MODEL, LAYERS, WORDS, Lab

SOURCES = ("prose", "chat")


def make_passages(count: int = 60, seed: int = 0) -> list[Passage]:
    rng = random.Random(seed)
    passages = []
    for i in range(count):
        tokens = [rng.randrange(3, len(WORDS)) for _ in range(rng.randint(2, 40))]
        passages.append(Passage(tokens, SOURCES[i % 2], i // 3))
    return passages


@pytest.fixture(scope="module")
def passages() -> list[Passage]:
    return make_passages()


@torch.inference_mode()
def plain_loop(lab: Lab, sae: SAE, passages: list[Passage], median: float) -> dict[str, Any]:
    """Every statistic by its definition: one sequence, one token, one feature at a time."""
    fired: dict[int, list[tuple[float, int, int, int]]] = defaultdict(list)
    judged = outliers = 0
    for number, passage in enumerate(passages):
        out = lab.model(input_ids=torch.tensor([list(passage.tokens)]), output_hidden_states=True)
        hidden = out.hidden_states[sae.hook.layer + 1][0].float()
        for position in range(1, len(passage.tokens)):
            if float(hidden[position].norm()) > 10 * median:
                outliers += 1
                continue
            judged += 1
            for j, value in enumerate(sae.encode(hidden[position : position + 1])[0].tolist()):
                if value > 0:
                    fired[j].append((value, number, position, passage.tokens[position]))
    return {"fired": fired, "judged": judged, "outliers": outliers}


def test_statistics_are_those_of_a_plain_loop(lab: Lab, passages: list[Passage]) -> None:
    saes = [lab.sae(0, seed=1, median_norm=8.0), lab.sae(1, seed=2, median_norm=8.0)]
    for sae, found in zip(saes, label(lab.model, lab.tokenizer, saes, passages), strict=True):
        expected = plain_loop(lab, sae, passages, 8.0)
        assert (found.tokens, found.outliers) == (expected["judged"], expected["outliers"])
        assert sum(found.sources.values()) == found.tokens
        features = list(found.features())
        assert [f.index for f in features] == list(range(sae.n_features))
        for feature in features:
            fired = expected["fired"][feature.index]
            values = sorted(value for value, *_ in fired)
            assert feature.density == pytest.approx(len(fired) / expected["judged"], rel=1e-3)
            if not fired:
                assert (feature.max_activation, feature.contexts, feature.label) == (0.0, (), None)
                continue
            assert feature.max_activation == pytest.approx(values[-1], rel=1e-4)
            assert feature.mean_activation == pytest.approx(sum(values) / len(values), rel=1e-4)
            for q, given in feature.quantiles.items():
                exact = values[max(0, math.ceil(float(q) * len(values)) - 1)]
                assert given == pytest.approx(exact, rel=0.023), (feature.index, q)
    assert any(f.density for f in features)


def test_contexts_are_places_of_the_corpus_with_the_activations_that_the_loop_finds(
    lab: Lab, passages: list[Passage]
) -> None:
    sae = lab.sae(1, seed=3, median_norm=100.0)
    (found,) = label(lab.model, lab.tokenizer, [sae], passages)
    fired = plain_loop(lab, sae, passages, 100.0)["fired"]
    texts = [[WORDS[t] for t in p.tokens] for p in passages]
    shown = 0
    for feature in found.features():
        if feature.contexts:
            strongest = max(value for value, *_ in fired[feature.index])
            assert feature.contexts[0].activations[feature.contexts[0].peak] == pytest.approx(strongest, rel=1e-4)
        documents: dict[int, int] = defaultdict(int)
        peaks = [c.activations[c.peak] for c in feature.contexts]
        assert peaks == sorted(peaks, reverse=True)
        for context in feature.contexts:
            value = max(context.activations)
            assert context.activations[context.peak] == value
            places = [
                (number, position)
                for v, number, position, _ in fired[feature.index]
                if v == pytest.approx(value, rel=1e-4)
                and texts[number][max(0, position - BEFORE) : position + AFTER + 1] == list(context.tokens)
            ]
            assert places, (feature.index, context)
            number, position = places[0]
            assert passages[number].source == context.source
            documents[passages[number].document] += 1
            start = max(0, position - BEFORE)
            for offset, activation in enumerate(context.activations):
                there = [v for v, n, p, _ in fired[feature.index] if (n, p) == (number, start + offset)]
                assert activation == pytest.approx(there[0] if there else 0.0, rel=1e-4)
            shown += 1
        assert max(documents.values(), default=0) <= 2
    assert shown > 50


def test_batches_and_their_order_change_nothing(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_weights.knowledge import labelling, measurement, pool

    passages = make_passages(30, seed=5)
    sae = lab.sae(1, seed=3, median_norm=8.0)
    whole = list(label(lab.model, lab.tokenizer, [sae], passages)[0].features())
    monkeypatch.setattr(labelling, "TOKENS_PER_BATCH", 64)
    monkeypatch.setattr(measurement, "_ELEMENTS", 24 * 40)
    monkeypatch.setattr(pool.Pool, "LIMIT", 50)
    pieces = list(label(lab.model, lab.tokenizer, [sae], passages)[0].features())
    for a, b in zip(whole, pieces, strict=True):
        assert (a.label, a.density, a.words, [c.tokens for c in a.contexts]) == (
            b.label, b.density, b.words, [c.tokens for c in b.contexts],
        )  # fmt: skip
        assert a.max_activation == pytest.approx(b.max_activation, rel=1e-4)


def test_sinks_and_first_tokens_are_no_evidence(lab: Lab) -> None:
    """A token whose norm is beyond ten medians neither counts nor shows an activation."""
    passages = make_passages(20, seed=7)
    sae = lab.sae(1, seed=3, median_norm=0.01)  # by this median, every token is a sink
    (found,) = label(lab.model, lab.tokenizer, [sae], passages)
    assert found.tokens == 0
    assert found.outliers == sum(len(p.tokens) - 1 for p in passages)
    assert all(f.density == 0 and not f.contexts for f in found.features())


def test_strange_tokens_are_counted_but_neither_shown_nor_named(lab: Lab) -> None:
    """Between three and ten medians: here, all tokens, for of each passage only those are kept that are alike in norm."""
    with torch.inference_mode():
        norms = {
            token: float(
                lab.model(input_ids=torch.tensor([[5, token]]), output_hidden_states=True).hidden_states[2][0, 1].norm()
            )
            for token in range(3, len(WORDS))
        }
    middle = sorted(norms, key=norms.__getitem__)[15:40]
    passages = [Passage([5, token], "prose", token) for token in middle]
    largest = max(norms[token] for token in middle)
    assert largest < 3 * min(norms[token] for token in middle)
    sae = lab.sae(1, seed=3, median_norm=largest / 9.5)
    (found,) = label(lab.model, lab.tokenizer, [sae], passages)
    features = list(found.features())
    assert (found.tokens, found.outliers) == (len(middle), 0)
    assert max(f.density or 0 for f in features) > 0.1
    assert not any(f.contexts or f.words for f in features)


def test_a_dictionary_without_a_median_norm_gets_one_from_the_text(lab: Lab) -> None:
    (found,) = label(lab.model, lab.tokenizer, [lab.sae(1)], make_passages(20))
    assert found.median_norm > 0
    assert found.outliers == 0


def test_a_planted_token_is_found_with_its_contexts_its_density_and_its_label(lab: Lab) -> None:
    """Feature 0 reads the embedding of "w7" behind layer 0, which adds little to it, and writes what says "w9"."""
    model = copy.deepcopy(lab.model)
    with torch.no_grad():
        for quiet in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj):
            quiet.weight *= 0.01
    passages = make_passages(60, seed=11)
    token, says = WORDS.index(" w7"), WORDS.index(" w9")
    embedding = model.model.embed_tokens.weight.detach()
    W_enc = torch.randn(4, D_MODEL, generator=torch.Generator().manual_seed(0)) * 0.01
    W_enc[0] = embedding[token] - embedding.mean(dim=0)
    norm, unembedding = model.model.norm.weight.detach(), model.lm_head.weight.detach()
    W_dec = torch.randn(4, D_MODEL, generator=torch.Generator().manual_seed(1))
    W_dec[0] = (unembedding[says] - unembedding.mean(dim=0)) / norm
    with torch.inference_mode():
        stream = [
            model(input_ids=torch.tensor([list(p.tokens)]), output_hidden_states=True).hidden_states[1][0]
            for p in passages
        ]
    at_token = [
        float(h[i] @ W_enc[0])
        for h, p in zip(stream, passages, strict=True)
        for i, t in enumerate(p.tokens)
        if t == token and i
    ]
    elsewhere = [
        float(h[i] @ W_enc[0])
        for h, p in zip(stream, passages, strict=True)
        for i, t in enumerate(p.tokens)
        if t != token and i
    ]
    assert min(at_token) > max(elsewhere), "the planted direction does not single the token out"
    threshold = (min(at_token) + max(elsewhere)) / 2
    sae = SAE.from_tensors(
        architecture="jumprelu",
        hook=Hook("resid_post", 0),
        W_enc=W_enc,
        W_dec=W_dec,
        b_dec=torch.zeros(D_MODEL),
        gate={"b_enc": torch.zeros(4), "threshold": torch.full((4,), threshold)},
        metadata={"median_norm": 100.0},
    )
    (found,) = label(model, lab.tokenizer, [sae], passages)
    planted = next(iter(found.features()))
    assert planted.density == pytest.approx(len(at_token) / found.tokens, rel=1e-3)
    assert planted.max_activation == pytest.approx(max(at_token), rel=1e-4)
    assert planted.contexts
    assert all(c.tokens[c.peak] == " w7" for c in planted.contexts)
    assert planted.promoted[0][0] == " w9"
    assert planted.label is not None
    assert planted.label.startswith('"w7"')
    assert planted.words[0] == "w7"


def test_the_lens_is_its_formula(lab: Lab) -> None:
    directions = torch.randn(6, D_MODEL, generator=torch.Generator().manual_seed(2))
    gain, unembedding = lab.model.model.norm.weight.detach(), lab.model.lm_head.weight.detach()
    lens = logit_lens(lab.model, directions, 5)
    for j, direction in enumerate(directions):
        weights = unembedding @ (gain * direction / direction.norm())
        weights = weights - weights.mean()
        assert lens.promoted[j].tolist() == weights.topk(5).indices.tolist()
        torch.testing.assert_close(lens.promoted_weights[j], weights.topk(5).values, rtol=1e-4, atol=1e-5)
        assert lens.suppressed[j].tolist() == weights.topk(5, largest=False).indices.tolist()
        assert float(lens.spread[j]) == pytest.approx(float(weights.std()), rel=1e-3)


def test_a_norm_that_centres_is_followed(lab: Lab) -> None:
    """GPT-2's LayerNorm takes the mean away and adds a bias, which no direction may be credited with."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()
    norm = model.transformer.ln_f
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-3, 3)
    assert final_norm(model) is norm
    direction = torch.randn(1, 16, generator=torch.Generator().manual_seed(3))
    centred = direction[0] - direction[0].mean()
    weights = model.lm_head.weight.detach() @ (norm.weight.detach() * centred / centred.std(correction=0)) / 4
    weights = weights - weights.mean()
    lens = logit_lens(model, direction, 5)
    assert lens.promoted[0].tolist() == weights.topk(5).indices.tolist()
    torch.testing.assert_close(lens.promoted_weights[0], weights.topk(5).values, rtol=1e-3, atol=1e-5)


def test_neighbours_are_the_largest_cosines(lab: Lab) -> None:
    sae = lab.sae(1, seed=4, median_norm=8.0)
    (found,) = label(lab.model, lab.tokenizer, [sae], make_passages(5))
    unit = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)
    cosines = (unit @ unit.T).numpy().copy()
    np.fill_diagonal(cosines, -2)
    for feature in found.features():
        order = np.argsort(-cosines[feature.index])[:5]
        assert [i for i, _ in feature.neighbours] == order.tolist()
        assert feature.neighbours[0][1] == pytest.approx(float(cosines[feature.index].max()), abs=1e-4)


def test_the_model_is_left_as_it_was(lab: Lab) -> None:
    ids = torch.tensor([[5, 6, 7]])
    before = lab.model(ids).logits
    label(lab.model, lab.tokenizer, [lab.sae(0)], make_passages(3))
    torch.testing.assert_close(lab.model(ids).logits, before, rtol=0, atol=0)
    assert len(lab.model.model.layers) == LAYERS


@pytest.mark.parametrize(
    ("hook", "width", "message"),
    [
        (Hook("mlp", 1), D_MODEL, "only dictionaries of the residual stream"),
        (Hook("resid_post", 7), D_MODEL, r"layer 7; the model has 0\.\.2"),
        (Hook("resid_post", 1), 16, "16 values per token; the model has 32"),
    ],
)
def test_a_dictionary_of_elsewhere_is_refused(lab: Lab, hook: Hook, width: int, message: str) -> None:
    rows = torch.eye(width)
    sae = SAE.from_tensors(
        architecture="relu",
        hook=hook,
        W_enc=rows,
        W_dec=rows,
        b_dec=torch.zeros(width),
        gate={"b_enc": torch.zeros(width)},
    )
    with pytest.raises(ValueError, match=message):
        label(lab.model, lab.tokenizer, [sae], make_passages(3))


def test_an_empty_corpus_is_refused(lab: Lab) -> None:
    with pytest.raises(ValueError, match="no passage"):
        label(lab.model, lab.tokenizer, [lab.sae(0)], [])


def test_labels_by_hand_win() -> None:
    features = [Feature(0, "automatic one", "automatic"), Feature(1, "another", "automatic")]
    named = list(with_labels(features, {1: ("by\nhand", "hand")}))
    assert [(f.label, f.label_source) for f in named] == [("automatic one", "automatic"), ("by hand", "hand")]
