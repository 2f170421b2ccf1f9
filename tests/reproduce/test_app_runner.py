"""The study's batched runner is the reference executor, which the engine is tested against."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from interventions.compile import compile_request
from interventions.concepts.gain import Range, Whole
from interventions.maps.transfer import Unit, clamp_active, interpolate
from interventions.reference import ReferenceExecutor
from interventions.spec import parse_interventions
from reproduce.model import Runner, Tokens, batches, remap_edit, suppress_edit
from tests.concepts.samples import made_concept
from tests.interventions.conftest import Offered, Server, make_sae

D, VOCAB, LAYERS = 32, 60, 4
TEXTS = [[1, 7, 12, 5, 33, 20], [9, 3], [41, 8, 8, 30, 2, 17, 55, 6, 21], [5], [11, 12, 13, 14, 15, 16, 17]]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def runner(model):
    return Runner(model)


@pytest.fixture(scope="module")
def sae():
    return make_sae("jumprelu", d=D, seed=1, layer=1, input_norm="constant_norm_rescale")


@pytest.fixture(scope="module")
def concept(sae):
    return made_concept(sae, 1, n_bins=9, seed=3)


@pytest.fixture(scope="module")
def reference(model, sae, concept):
    """``reference(ids, spec)``: logits of one text under a request's intervention."""
    catalogue = Server(d_model=D, n_layers=LAYERS, vocab_size=VOCAB, armed_layers=(1,))
    catalogue.saes = {"s": Offered("s", 1, sae)}
    catalogue.concepts = {"c": ("s", concept)}
    executor = ReferenceExecutor(model, {sae.digest: sae})

    def logits(ids, spec):
        payload = compile_request(parse_interventions([spec]), [], catalogue).payload()
        return executor.forward(ids, len(ids), payload).logits

    return logits


def outputs(runner, edits, layers=(1,), size=3):
    """Per text: logits ``[t, vocab]`` and log-probs of its tokens, under ``edits``."""
    found = [None] * len(TEXTS)
    for started in runner.start(TEXTS, layers, batch=size):
        last = runner.edited(started, edits)
        logits, chosen = runner.logits(last), runner.log_probs(last, started.tokens)
        for row, i in enumerate(started.tokens.index):
            n = len(TEXTS[i])
            found[i] = (logits[row, :n], chosen[row, : n - 1])
            assert not chosen[row, n - 1 :].any()
    return found


SPECS = [
    ({"method": "mask"}, lambda c: Whole(), 1.0),
    ({"method": "attenuate", "strength": 2.5}, lambda c: Whole(), 2.5),
    ({"method": "range", "tau": 0.7}, lambda c: c.transfer("range", 0.7), 1.0),
    ({"method": "app", "strength": 1.7}, lambda c: c.transfer("app"), 1.7),
]


@pytest.mark.parametrize(("fields", "transfer", "strength"), SPECS, ids=[spec[0]["method"] for spec in SPECS])
def test_a_suppression_is_that_of_the_reference_executor(runner, sae, concept, reference, fields, transfer, strength):
    edit = suppress_edit(sae, concept.features.tolist(), transfer(concept), strength)
    edited, plain = outputs(runner, {1: edit}), outputs(runner, {})
    moved = 0.0
    for ids, (logits, chosen), (untouched, _) in zip(TEXTS, edited, plain, strict=True):
        expected = reference(ids, {"type": "suppress", "concept": "c", **fields})
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        following = expected.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
        torch.testing.assert_close(chosen, following, atol=1e-4, rtol=1e-4)
        moved = max(moved, float((expected - untouched).abs().max()))
    assert moved > 0.01


def test_without_an_edit_it_is_the_model(runner, model):
    for ids, (logits, _) in zip(TEXTS, outputs(runner, {}), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(logits, model(torch.tensor([ids])).logits[0], atol=1e-5, rtol=1e-5)


def test_continuing_from_a_kept_layer_is_the_whole_pass(runner):
    nothing = outputs(runner, {1: lambda h, tokens: torch.zeros_like(h)})
    for (continued, _), (whole, _) in zip(nothing, outputs(runner, {}), strict=True):
        assert torch.equal(continued, whole)


def test_position_0_is_never_written(runner):
    moved = outputs(runner, {1: lambda h, tokens: torch.ones_like(h)})
    for (edited, _), (plain, _) in zip(moved, outputs(runner, {}), strict=True):
        assert torch.equal(edited[0], plain[0])
        if len(edited) > 1:
            assert not torch.equal(edited[1:], plain[1:])


def test_edits_at_two_layers_act_one_after_the_other(runner):
    """The second edit reads what the first one wrote."""
    seen = {}

    def first(h, tokens):
        return torch.ones_like(h)

    def second(h, tokens):
        seen[tokens.index] = h.clone()
        return -0.5 * h

    both, only = outputs(runner, {1: first, 2: second}), outputs(runner, {1: first})
    assert not torch.allclose(both[2][0], only[2][0])
    alone = {}
    outputs(runner, {2: lambda h, tokens: alone.update({tokens.index: h.clone()}) or torch.zeros_like(h)}, layers=(2,))
    assert all(not torch.allclose(seen[index], alone[index]) for index in seen)


def test_an_edit_below_what_was_kept_is_refused(runner):
    (started,) = runner.start([[1, 2, 3]], [2])
    with pytest.raises(ValueError, match=r"layer 1 was not kept; kept are \[2\]"):
        runner.edited(started, {1: lambda h, tokens: h})


def test_words_are_columns_of_the_logits(runner):
    (started,) = runner.start([[1, 2, 3]], [1])
    whole = runner.logits(started.last)
    torch.testing.assert_close(runner.logits(started.last, [4, 9]), whole[..., [4, 9]])


def test_batches_hold_every_text_once():
    seen = []
    for tokens in batches(TEXTS, 2):
        for row, i in enumerate(tokens.index):
            assert tokens.ids[row][tokens.mask[row]].tolist() == TEXTS[i]
            assert not tokens.evidence[row, 0]
            assert int(tokens.evidence[row].sum()) == len(TEXTS[i]) - 1
            seen.append(i)
    assert sorted(seen) == list(range(len(TEXTS)))


def test_an_interpolating_remap_at_zero_is_the_mask(runner, sae):
    features = [2, 5, 9, 30]
    masked = outputs(runner, {1: suppress_edit(sae, features, Whole())})
    mapped = outputs(runner, {1: remap_edit(sae, [interpolate(j, 0.0) for j in features])})
    for (a, _), (b, _) in zip(masked, mapped, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_remap_acts_where_it_is_told(runner, sae):
    transfers = [clamp_active(j, 0.5, Unit.RESIDUAL_NORM) for j in range(20)]

    def late(a: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        assert a.shape == (*tokens.ids.shape, 2)
        return torch.arange(tokens.ids.shape[1])[None].expand_as(tokens.ids) >= 4

    mapped = outputs(runner, {1: remap_edit(sae, transfers, late, listens=[3, 4])})
    for ids, (edited, _), (plain, _) in zip(TEXTS, mapped, outputs(runner, {}), strict=True):
        assert torch.equal(edited[:4], plain[:4])
        assert len(ids) <= 4 or not torch.equal(edited[4:], plain[4:])


def test_the_range_of_a_latent_that_never_fires_leaves_everything_alone(runner, sae):
    nothing = Range(torch.full((3,), -5.0), torch.zeros(3), 1.0)
    edited = outputs(runner, {1: suppress_edit(sae, [0, 1, 2], nothing)})
    for (a, _), (b, _) in zip(edited, outputs(runner, {}), strict=True):
        assert torch.equal(a, b)


def test_units_of_the_mean_pre_activation_are_refused(sae):
    with pytest.raises(ValueError, match="mean pre-activation"):
        remap_edit(sae, [clamp_active(1, 2.0, Unit.PREACT_MEAN)])
