"""Rules at work: on planted concepts, where the truth is known, and in a real forward pass, against its definition."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
import torch

from interventions.compile import Compiled, compile_request
from interventions.oracle import edit_layer, listen, row_source, score_rules, select
from interventions.reference import ReferenceExecutor
from interventions.rules.machine import Machine, decided
from interventions.rules.reading import parse_ruleset
from interventions.rules.reference import evaluate
from interventions.spec import parse_interventions
from sae_weights.sae import SAE, Hook
from tests.interventions.conftest import Offered, Server, make_sae
from tests.interventions.test_reference import PROMPT, RAMP, VOCAB, plain_logits, tiny_llama
from tests.interventions.test_reference import D as WIDTH

# planted concepts ----------------------------------------------------------------------------------------------------

D, N, T, CONCEPTS = 512, 1024, 200, 8
AMPLITUDE, SNR, THRESHOLD = 4.0, 10.0, 2.2


def planted() -> tuple[Server, torch.Tensor, np.ndarray]:
    """A server whose SAE knows the concepts, h ``[T, D]`` = Σ planted a·W_dec + noise, and where they are planted."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(N, D, generator=random)
    rows /= rows.norm(dim=1, keepdim=True)
    gate = {"b_enc": torch.zeros(N)}
    sae = SAE.from_tensors(
        architecture="relu", hook=Hook("resid_post", 1), W_enc=rows, W_dec=rows, b_dec=torch.zeros(D), gate=gate
    )
    truth = torch.zeros(T, CONCEPTS, dtype=torch.bool)
    truth.scatter_(1, torch.randint(CONCEPTS, (T, 2), generator=random), True)
    amplitude = AMPLITUDE * (1 - 0.1 * torch.rand(T, CONCEPTS, generator=random)) * truth
    h = amplitude @ rows[:CONCEPTS]
    noise = torch.randn(T, D, generator=random)
    h += noise / noise.norm(dim=1, keepdim=True) * h.norm(dim=1, keepdim=True) / SNR
    truth[0] = False  # position 0 is never evidence
    return Server(d_model=D, saes={"planted": Offered("planted", 1, sae)}), h, truth.numpy()


def declared() -> str:
    return "".join(f"proposition c{i} = feature(planted, {i}) >= {THRESHOLD}\n" for i in range(CONCEPTS))


def carried_out(server: Server, h: torch.Tensor, text: str, prompt_len: int = T):
    """The request's rules and edits at layer 1 on h: what was compiled, the trace, and the result of the layer."""
    compiled = compile_request(parse_interventions([{"type": "rules", "text": text}]), [], server)
    program = compiled.program
    saes = {offered.sae.digest: offered.sae for offered in server.saes.values()}
    rows = cache(row_source(program.vectors, saes))
    score = score_rules(h, 1, program.rules, rows)
    trace = Machine(program.rules, prompt_len).run(decided(program.rules, score), score)
    result = None
    for layer in program.layers:
        opened, _ = listen(h, layer, rows, None, prompt_len, trace.active)
        selected = select(program.selectors, torch.arange(len(h)), torch.zeros(len(h), dtype=torch.int64), prompt_len)
        result = edit_layer(h, layer, selected, rows, opened=opened)
    return compiled, trace, result


def test_planted_concepts_are_found_with_precision_and_recall_1() -> None:
    server, h, truth = planted()
    rules = "".join(f"rule r{i}: c{i} and c{(i + 1) % CONCEPTS} -> both{i}\n" for i in range(CONCEPTS))
    compiled, trace, _ = carried_out(
        server, h, declared() + rules + "rule s: seen(both0) -> late\n".replace("both0", "c0")
    )
    part = compiled.rules.part(0)
    assert truth.sum() > T
    for i in range(CONCEPTS):
        assert trace.held[:, part.propositions[f"c{i}"]].tolist() == truth[:, i].tolist()
        both = truth[:, i] & truth[:, (i + 1) % CONCEPTS]
        assert trace.concluded[:, part.conclusions[f"both{i}"]].tolist() == both.tolist()
    assert trace.concluded[:, part.conclusions["late"]].tolist() == np.logical_or.accumulate(truth[:, 0]).tolist()
    held = trace.held[:, part.propositions["c0"]]
    scores = trace.scores[:, part.propositions["c0"]]
    assert (np.isnan(scores) == ~held).all()
    assert (np.abs(scores[held] - AMPLITUDE) < 0.5 * AMPLITUDE).all()


def test_normalized_steering_by_a_rule_moves_h_by_exactly_the_asked_factor() -> None:
    server, h, truth = planted()
    steer = {"type": "steer", "sae": "planted", "feature": 700, "strength": 0.37, "mode": "normalized"}
    text = f"{declared()}rule r: c0 or c3 -> x\non x: do {json.dumps(steer)}\n"
    compiled, trace, result = carried_out(server, h, text)
    where = truth[:, 0] | truth[:, 3]
    assert result.written.tolist() == where.tolist()
    ratio = result.delta.double().norm(dim=1) / h.double().norm(dim=1)
    np.testing.assert_allclose(ratio[where], 0.37, rtol=0, atol=1e-6)
    assert (result.fired != 0).tolist() == where.tolist() == trace.active[:, compiled.rules.at(0)[0].number].tolist()
    # the head latent's pre-activation rises by strength·‖h‖·cos(direction, its encoder row)
    sae = server.saes["planted"].sae
    rise = (sae.pre_activations(h + result.delta) - sae.pre_activations(h))[:, 700]
    np.testing.assert_allclose(rise[where], 0.37 * h.norm(dim=1)[where], rtol=1e-4)


@pytest.mark.parametrize("mode", ["add", "normalized"])
def test_opposed_actions_whose_sum_vanishes_write_nothing(mode: str) -> None:
    """However many there are, and in whatever order they are added up."""
    server, h, _ = planted()
    random = np.random.default_rng(0)
    deeds = []
    for name in ("x", "y"):
        for _ in range(3):
            v = random.normal(size=D).astype(np.float32)
            for sign in (1, -1):
                values = [float(sign * x) for x in v]
                steer = {"type": "steer", "layer": 1, "values": values, "strength": 0.7, "mode": mode}
                deeds.append(f"on {name}: do {json.dumps(steer)}\n")
    random.shuffle(deeds)
    rules = "rule r: c0 -> x\nrule s: c1 or c2 -> y\n"
    _, trace, result = carried_out(server, h, declared() + rules + "".join(deeds))
    assert trace.active.any()
    assert not result.delta.any()
    assert not result.fired.any()
    assert torch.equal(result.apply(h.bfloat16()), h.bfloat16())
    # one of each pair alone does act
    half = declared() + rules + "".join(deeds[::2])
    assert carried_out(server, h, half)[2].written.any()


# in a forward pass ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture
def small() -> Server:
    """An SAE after each layer."""
    saes = {
        f"l{layer}": Offered(f"l{layer}", layer, make_sae(kind, d=WIDTH, seed=40 + layer, layer=layer))
        for layer, kind in ((0, "jumprelu"), (1, "topk"), (2, "relu"))
    }
    return Server(d_model=WIDTH, n_layers=3, armed_layers=(0, 1, 2), vocab_size=VOCAB, saes=saes)


@pytest.fixture
def executor(model, small) -> ReferenceExecutor:
    return ReferenceExecutor(model, {offered.sae.digest: offered.sae for offered in small.saes.values()})


def request(small: Server, *interventions: dict) -> Compiled:
    return compile_request(parse_interventions(list(interventions)), [], small)


def residuals(
    model, ids: list[int], hooks: dict[int, object] | None = None
) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """h ``[t, d]`` after each layer, before what ``hooks`` (layer → h → h') make of it; and the logits."""
    found: dict[int, torch.Tensor] = {}

    def hook(layer):
        def run(_module, _inputs, output):
            hidden = output[0] if isinstance(output, tuple) else output
            found[layer] = hidden[0].clone()
            changed = (hooks or {}).get(layer, lambda h: h)(hidden[0])[None]
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return run

    handles = [module.register_forward_hook(hook(i)) for i, module in enumerate(model.model.layers)]
    try:
        return found, plain_logits(model, ids)
    finally:
        for handle in handles:
            handle.remove()


IDS = [*PROMPT, 9, 41, 3, 17, 28, 5, 50]
RULES = f"""
rule one: feature(l0, 6) > 0 -> first
rule two: seen(feature(l1, 7) > 0) and first -> second
rule three: second and at least 2 of seen(feature(l2, 9) + 0.5 * feature(l2, 11) > 0.2) -> third
on first: do {{"type": "steer", "layer": 1, "values": {json.dumps(RAMP)}}} for 2 tokens
on third: do {{"type": "steer", "layer": 2, "values": {json.dumps(RAMP[::-1])}, "strength": 0.5}} from now on
"""


def test_rules_in_a_forward_pass_are_their_definition_on_what_the_model_produced(executor, model, small) -> None:
    """Evidence at a layer is its pre-edit h, given the edits at earlier layers and tokens; effects come in the same pass."""
    compiled = request(small, {"type": "rules", "text": RULES})
    got = executor.forward(IDS, len(PROMPT), compiled.payload())
    ruleset = parse_ruleset(RULES)
    edits: dict[int, object] = {}
    for _ in range(3):  # layer by layer: what an earlier layer did is known when the next one is read
        h, _ = residuals(model, IDS, edits)
        encoded = {name: offered.sae.encode(h[offered.layer]).numpy() for name, offered in small.saes.items()}
        readings = {read: encoded[read[0]][:, read[1]] for read in ruleset.reads()}
        steps = evaluate(ruleset, readings, len(PROMPT), len(IDS))
        acts = torch.tensor([[k in step.active for k in range(2)] for step in steps], dtype=torch.float32)
        edits = {
            1: lambda h, acts=acts: h + acts[:, :1] * torch.tensor(RAMP),
            2: lambda h, acts=acts: h + acts[:, 1:] * 0.5 * torch.tensor(RAMP[::-1]),
        }
    part = compiled.rules.part(0)
    concluded = {name: got.rules.concluded[:, number].tolist() for name, number in part.conclusions.items()}
    assert concluded == {name: [name in step.conclusions for step in steps] for name in concluded}
    assert all(any(where) and not all(where[1:]) for where in concluded.values())
    assert got.rules.active[:, list(part.actions)].tolist() == acts.bool().tolist()
    for layer, number in ((1, 0), (2, 1)):
        assert got.layers[layer].written.tolist() == acts[:, number].bool().tolist()
    _, expected = residuals(model, IDS, edits)
    torch.testing.assert_close(got.logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got.logits, plain_logits(model, IDS), atol=1e-2)


def test_a_gate_on_an_intervention_opens_at_the_tokens_where_its_when_holds(executor, model, small) -> None:
    steer = {"type": "steer", "layer": 2, "values": RAMP}
    gated = request(small, {**steer, "when": "feature(l0, 3) > 0.1"})
    h = residuals(model, IDS)[0][0]
    where = (small.saes["l0"].sae.encode(h)[:, 3] > 0.1).tolist()
    where[0] = False
    got = executor.forward(IDS, len(PROMPT), gated.payload())
    assert got.layers[2].written.tolist() == where
    assert got.rules.active[:, gated.entries[0].when].tolist() == where
    assert got.stats(0, 2).fired == sum(where)


def first_above(executor, small, ids: list[int]) -> tuple[float, int]:
    """A threshold of latent 7 after the last layer that exactly one of the positions 1 … reaches, and that position."""
    read = request(small, {"type": "rules", "text": "rule r: feature(l2, 7) >= 0 -> c on c: flag"})
    scores = executor.forward(ids, len(PROMPT), read.payload()).rules.scores[:, 0]
    scores[0] = -1
    return float(scores.max()), int(scores.argmax())


def test_a_refusal_in_the_prompt_lets_no_token_out(executor, small) -> None:
    threshold, position = first_above(executor, small, PROMPT)
    text = f'rule r: feature(l2, 7) >= {threshold:.9g} -> c on c: refuse "No."'
    compiled = request(small, {"type": "rules", "text": text})
    found = executor.generate(PROMPT, compiled.payload(), max_tokens=4)
    action = compiled.rules.refusal(found.forward.rules.active[position])
    assert (found.refused, action.message) == ((action.number, position), "No.")
    assert found.token_ids == []
    assert found.logprobs.shape == (0, VOCAB)


def test_a_refusal_later_withholds_what_comes_from_there(executor, small) -> None:
    plain = executor.generate(PROMPT, max_tokens=8)
    ids = [*PROMPT, *plain.token_ids]
    read = request(
        small, {"type": "rules", "text": "rule r: feature(l2, 7) + feature(l2, 8) + feature(l2, 9) >= 0 -> c"}
    )
    scores = executor.forward(ids, len(PROMPT), read.payload()).rules.scores[:, 0]
    scores[0] = -1
    later = range(len(PROMPT) + 1, len(ids) - 1)
    position = next(p for p in later if scores[p] > scores[:p].max() + 1e-4)
    threshold = (float(scores[position]) + float(scores[:position].max())) / 2
    text = f'rule r: feature(l2, 7) + feature(l2, 8) + feature(l2, 9) >= {threshold:.9g} -> c on c: refuse "No."'
    compiled = request(small, {"type": "rules", "text": text})
    found = executor.generate(PROMPT, compiled.payload(), max_tokens=8)
    assert found.refused is not None
    assert found.refused[1] == position
    assert found.token_ids == plain.token_ids[: position - len(PROMPT)]
    assert torch.equal(found.logprobs, plain.logprobs[: len(found.token_ids)])
    # the last sampled token is never fed: it is not judged
    short = executor.generate(PROMPT, compiled.payload(), max_tokens=position - len(PROMPT) + 1)
    assert (short.refused, len(short.token_ids)) == (None, position - len(PROMPT) + 1)
