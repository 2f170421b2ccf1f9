"""The pieces of the unlearning study: answers, edits of whole sequences, metrics, gates under dilution."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from interventions.concepts.report import fit_probe
from interventions.maps import gates
from interventions.maps.gates import CusumGate, ShareGate, WindowGate
from interventions.maps.map import AllTokens, LatentMap, MentionTokens, SequenceGate, TriggerTokens
from interventions.maps.transfer import Unit, canonical, clamp_active, clamp_hit, interpolate
from reproduce.model import Runner, remap_edit
from reproduce.page import shown
from reproduce.unlearning import dilution, report, texts
from reproduce.unlearning.__main__ import PAGE, PICTURE, RESULTS
from reproduce.unlearning.cells import all_cells
from reproduce.unlearning.edits import Mapper, Runs
from reproduce.unlearning.entities import QUESTIONS, candidates, invented
from reproduce.unlearning.material import CLASSES
from reproduce.unlearning.measure import _perplexities, fresh_probe, knownness
from reproduce.unlearning.passes import Passes, batches
from reproduce.unlearning.recall import Question, ask, questions
from tests.interventions.conftest import make_sae

D, VOCAB, LAYERS = 32, 60, 4
TEXTS = [(1, 7, 12, 5, 33, 20), (9, 3), (41, 8, 8, 30, 2, 17, 55, 6, 21), (11, 12, 13, 14, 15, 16, 17)]


@pytest.fixture(scope="module")
def passes():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    words = models.WordLevel({f".{i}": i for i in range(VOCAB)}, unk_token=".0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token=".0")
    return Passes(Runner(LlamaForCausalLM(config)), tokenizer)


@pytest.fixture(scope="module")
def sae():
    return make_sae("jumprelu", d=D, seed=1, layer=1, input_norm="constant_norm_rescale")


@pytest.fixture(scope="module")
def runs(passes, sae):
    found = Runs(passes, {1: sae})
    assert found.next == {1: LAYERS - 1}
    return found


def made(sae, transfers, scope=None, gate=None):
    return LatentMap("m", sae.digest, 1, canonical(transfers), scope or AllTokens(), gate)


def active(runs, ids, least=1):
    """Latents that fire on at least ``least`` tokens of ``ids`` behind position 0, most often first."""
    fires = (runs.activations(1, [ids])[0][1:] != 0).sum(dim=0)
    order = fires.argsort(descending=True)
    return [int(i) for i in order if fires[i] >= least]


def test_a_pass_stopped_at_a_layer_and_gone_on_with_is_the_models_own(passes):
    stopped = passes.states(TEXTS, (1, 3))
    onward = passes.onward([s[1] for s in stopped], 1)
    for ids, state, last in zip(TEXTS, stopped, onward, strict=True):
        with torch.no_grad():
            expected = passes.model(input_ids=torch.tensor([ids])).logits[0]
        torch.testing.assert_close(passes.logits(last), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(state[3], last, rtol=1e-4, atol=1e-4)


def test_batches_hold_every_sequence_once_within_the_limit():
    lengths = [5, 1, 9, 3, 3, 40, 2]
    found = list(batches(lengths, 12))
    assert sorted(i for rows in found for i in rows) == list(range(len(lengths)))
    assert all(len(rows) == 1 or max(lengths[i] for i in rows) * len(rows) <= 12 for rows in found)


def test_an_answer_is_right_exactly_if_greedy_decoding_gives_it(passes, runs):
    said = passes.generate(TEXTS, 3)
    with torch.no_grad():
        for ids, words in zip(TEXTS, said, strict=True):
            line = list(ids)
            for word in words:
                line.append(int(passes.model(input_ids=torch.tensor([line])).logits[0, -1].argmax()))
                assert line[-1] == word
    wrong = [(*words[:2], (words[2] + 1) % VOCAB) for words in said]
    asked = [
        Question("e", "a", ids, answers, "")
        for ids, words, other in zip(TEXTS, said, wrong, strict=True)
        for answers in ([(*words,)], [other], [other, tuple(words[:1])], [((words[0] + 1) % VOCAB,)])
    ]
    found = ask(asked, runs.plain(), passes)
    assert [a.right for a in found] == [True, False, True, False] * len(TEXTS)
    for q, answer in zip(asked, found, strict=True):
        with torch.no_grad():
            chances = passes.model(input_ids=torch.tensor([q.prompt])).logits[0, -1].softmax(-1)
        first = {a[0] for a in q.answers}
        assert answer.probability == pytest.approx(float(chances[sorted(first)].sum()), abs=1e-5)


def test_a_word_that_goes_on_is_no_answer(passes, runs):
    ids = TEXTS[0]
    word = passes.generate([ids], 2)[0]
    asked = [Question("e", "a", ids, [(word[0],)], "")]
    assert ask(asked, runs.plain(), passes)[0].right
    passes.tokenizer.decode, kept = (lambda _ids: "letters"), passes.tokenizer.decode
    try:
        assert not ask(asked, runs.plain(), passes)[0].right
    finally:
        passes.tokenizer.decode = kept


@pytest.mark.parametrize("scope", ["all", "trigger", "last", "inside"])
def test_a_map_edits_as_the_batched_runner_does(passes, runs, sae, scope):
    latents = sorted(active(runs, TEXTS[2])[:4])
    transfers = [interpolate(latents[0], 3.0, 2.0), clamp_active(latents[1], 0.7, Unit.RESIDUAL_NORM)]
    transfers += clamp_hit(latents[2:], 0.2, Unit.RESIDUAL_NORM)
    where = {
        "all": AllTokens(),
        "trigger": TriggerTokens(tuple(latents[:2])),
        "last": MentionTokens(((8, 8), (8, 30)), "last"),
        "inside": MentionTokens(((8, 30),), "all"),
    }[scope]
    places = {"last": (2, 3), "inside": (2, 3)}

    def acts(a, tokens):
        if scope == "trigger":
            return (a != 0).any(dim=-1)
        found = torch.ones_like(tokens.mask)
        if scope in places:
            found[:] = False
            found[tokens.index.index(0), list(places[scope])] = True
        return found

    fitted = made(sae, transfers, where)
    last = runs.edited([Mapper(sae, fitted)])([TEXTS[2]], [len(TEXTS[2])])[0]
    edit = remap_edit(sae, fitted.transfers, acts, latents[:2])
    (started,) = passes.runner.start([TEXTS[2]], (1,))
    expected = passes.runner.edited(started, {1: edit})[0]
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(last, started.last[0], atol=1e-3)


def test_position_zero_and_sequences_without_a_mention_stay_as_they_are(runs, sae):
    fitted = made(sae, [interpolate(active(runs, TEXTS[0])[0], 5.0)], MentionTokens(((1,), (12, 5))))
    mapper = Mapper(sae, fitted)
    states = runs.passes.keep(TEXTS, runs.kept)
    edited = mapper([s[1] for s in states], TEXTS, [len(ids) for ids in TEXTS])
    assert [e.changed for e in edited] == [True, False, False, False]
    changed = (edited[0].h != states[0][1]).any(dim=-1)
    assert changed.nonzero().flatten().tolist() == [3]
    assert runs.edited([mapper])([TEXTS[1]], [2])[0] is states[1][LAYERS - 1]


def test_a_gate_over_the_prompt_acts_on_earlier_tokens_only_in_two_passes(runs, sae):
    ids, prompt_len = TEXTS[2], 6
    fires = runs.activations(1, [ids])[0] != 0
    latent = next(int(i) for i in range(sae.n_features) if fires[1:4, i].any() and fires[1:6, i].sum() >= 2)
    share = float(fires[1:prompt_len, latent].sum()) / (prompt_len - 1)

    def acts(threshold, whole):
        gate = SequenceGate(ShareGate(threshold), (latent,))
        mapper = Mapper(sae, made(sae, clamp_hit([latent], 1.0), TriggerTokens((latent,)), gate), whole)
        return mapper.acts(runs.activations(1, [ids])[0][:, [latent]], ids, prompt_len)

    hit = fires[:, latent].numpy() & (np.arange(len(ids)) > 0)
    assert acts(share - 0.01, True).tolist() == hit.tolist()
    assert acts(share - 0.01, False).tolist() == (hit & (np.arange(len(ids)) >= prompt_len - 1)).tolist()
    assert not acts(share, True).any()


@pytest.mark.parametrize("threshold", [0.05, 0.1, 0.25, 0.5, 0.99])
def test_the_share_gate_closes_where_the_bits_say(threshold):
    rng = np.random.default_rng(int(threshold * 100))
    gate = ShareGate(threshold)
    for _ in range(50):
        bits = rng.random(int(rng.integers(2, 30))) < 0.4
        found = dilution.predict(bits, gate, (0, 1, 5, 50, 800))
        hits, seen = int(bits[1:].sum()), len(bits) - 1
        assert found.opens == {n: hits / (seen + n) > threshold for n in (0, 1, 5, 50, 800)}
        if found.evaded is None:
            assert hits / seen <= threshold
        else:
            assert hits / (seen + found.evaded) <= threshold < hits / max(seen + found.evaded - 1, 1)
            behind = np.concatenate([bits[:1], np.zeros(found.evaded, np.bool_), bits[1:]])
            assert not gates.update(gate, gates.START, behind, len(behind))[0].any()


def test_padding_in_front_dilutes_a_share_but_neither_window_nor_cusum():
    bits = np.array([0, 0, 0, 0, 1, 1, 1, 0], np.bool_)
    behind = np.concatenate([np.zeros(800, np.bool_), bits])
    for gate, opens in (
        (ShareGate(0.2), False),
        (WindowGate(0.1, 16, 4, latch=True), True),
        (CusumGate(2.0, 0.05), True),
    ):
        assert gates.statistic(gate, bits) > gate.threshold
        assert (gates.statistic(gate, behind) > gate.threshold) is opens


def test_padded_questions_end_in_the_question():
    asked = Question("e", "a", (5, 6, 7), ((8,),), "")
    assert dilution.padded(asked, [1, 2, 3], 4, 1).prompt == (2, 3, 1, 2, 5, 6, 7)
    assert dilution.padded(asked, [1, 2, 3], 0, 1) == asked


def test_probes_find_a_planted_difference_and_none_where_there_is_none():
    torch.manual_seed(1)
    direction = torch.zeros(D)
    direction[3] = 3.0
    known, unknown = torch.randn(60, D) + direction, torch.randn(60, D) - direction
    probe = fit_probe(torch.cat([known, unknown]), torch.tensor([0] * 60 + [1] * 60), CLASSES)
    assert (knownness(probe, torch.randn(40, D) + direction) > 0).mean() > 0.9
    assert (knownness(probe, torch.randn(40, D) - direction) > 0).mean() < 0.1
    others = torch.randn(30, 4, D)
    assert fresh_probe(torch.randn(4, D) + direction, others) > 0.9
    chance = [fresh_probe(torch.randn(4, D), others) for _ in range(100)]
    assert sum(chance) / 100 == pytest.approx(0.5, abs=0.1)


def test_perplexity_is_the_models_and_zero_without_a_change(runs):
    plain = runs.plain()
    assert _perplexities(TEXTS, 2, plain, plain, runs) == [0.0, 0.0]

    def shuffled(sequences, lengths, owners=()):
        rolled = [i != 1 for i in owners] or [True] * len(sequences)
        return [h.roll(1, dims=1) if r else h for r, h in zip(rolled, plain(sequences, lengths), strict=True)]

    def nll(forward):
        lasts = forward(TEXTS, [len(t) for t in TEXTS])
        parts = [
            torch.nn.functional.cross_entropy(runs.passes.logits(h[:-1]), torch.tensor(t[1:]), reduction="sum")
            for t, h in zip(TEXTS, lasts, strict=True)
        ]
        return sum(map(float, parts)) / sum(len(t) - 1 for t in TEXTS)

    expected = np.exp(nll(shuffled) - nll(plain)) - 1
    assert _perplexities(TEXTS, 3, shuffled, plain, runs) == pytest.approx([expected, 0.0, expected], rel=1e-3)


def test_the_question_set_is_large_and_no_name_comes_first():
    real = candidates()
    assert len(real) >= 60
    assert {e.kind for e in real} == set(QUESTIONS) == {e.kind for e in invented()}
    assert not {e.name for e in real} & {e.name for e in invented()}
    for entity in real:
        assert set(entity.answers) == set(QUESTIONS[entity.kind])
        assert all(answers and all(answers) for answers in entity.answers.values())
    for prompt in (p for of in QUESTIONS.values() for p in of.values()):
        assert prompt.index("{}") > 0
    assert all(frame.endswith("{}") for frame in texts.FRAMES)
    mexico = next(e for e in real if e.name == "Mexico")
    assert "capital" not in {q.attribute for q in questions(mexico, lambda text: [ord(c) for c in text])}


def test_cells_have_names_of_their_own():
    cells = all_cells((10, 15, 20))
    assert len({c.name for c in cells}) == len(cells)
    assert {c.layer for c in cells} == {-1, 10, 15, 20}
    assert set(all_cells((10, 15, 20), quick=True)) < set(cells)


def test_the_page_shows_the_tables_of_the_kept_results():
    results = json.loads(RESULTS.read_text())
    assert shown(PAGE) == report.tables(results).strip()
    assert PICTURE.is_file()
    assert PICTURE.stat().st_size < 150_000
    assert results["knowledge"]["questions"]["targets"] == sum(results["knowledge"]["targets"].values())
    assert {c["cell"]["layer"] for c in results["cells"]} <= {-1, 10, 15, 20}
    for cell in results["cells"]:
        for mean, low, high, n in cell["metrics"].values():
            assert low <= mean <= high
            assert 1 <= n <= len(results["knowledge"]["targets"])
