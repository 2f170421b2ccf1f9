"""Promise 4: what the server computes is what plain ``transformers`` computes with the pure functions of ``interventions``.

All requests run on the real engine in one go (fp32, eager, ragged batches). The reference then reads the prompt and the
engine's own tokens: if every one of them is the reference's most likely token at its place, greedy decoding is the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from editserver.library import ConceptLibrary, MapLibrary
from interventions.errors import InterventionError
from interventions.maps.gates import Gate, statistic
from interventions.maps.map import LatentMap, Scope, SequenceGate
from interventions.maps.transfer import Transfer, hit
from interventions.reference import Forward, ReferenceExecutor
from tests.concepts.samples import made_concept
from tests.engine import oracle_cases, remap_cases, rule_cases, suppress_cases
from tests.engine.oracle_cases import Case
from tests.engine.support import Answer, Ask, Engine

pytestmark = pytest.mark.engine

CASES = [*oracle_cases.CASES, *suppress_cases.CASES, *remap_cases.CASES, *rule_cases.CASES]
TEXTS = (
    "The capital of France is Paris, and the river that runs through Paris is called the Seine. Tourists love",
    "Water boils at one hundred degrees, but on a high mountain it boils sooner because the air",
    "Once upon a time a small dragon lived in a cave by the sea and told nobody about",
)
N_NEW = 4
LOGPROB_TOLERANCE = 1e-3
READING_TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def prompts(engine: Engine) -> list[list[int]]:
    """Three texts of different lengths behind the attention sink."""
    return [[1, *engine.catalogue.encode_text(text)] for text in TEXTS]


@pytest.fixture(scope="module")
def reference(model: Path, engine: Engine) -> Iterator[ReferenceExecutor]:
    """``transformers`` in fp32 on one thread: a second one only waits where the machine is shared. Logits are of the last
    ``N_NEW`` tokens alone: those of the others, which nobody looks at, are a fifth of the work and gigabytes in all."""
    from transformers import AutoModelForCausalLM

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    saes = {served.sae.digest: served.sae for served in engine.catalogue.saes.values()}
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    plain.forward = partial(plain.forward, logits_to_keep=N_NEW)
    yield ReferenceExecutor(plain, saes)
    torch.set_num_threads(threads)


class MeasuredLab:
    """Facts about the unedited model on the test's prompts (``oracle_cases.Lab``)."""

    def __init__(self, engine: Engine, reference: ReferenceExecutor, prompts: list[list[int]]) -> None:
        self.catalogue = engine.catalogue
        self.streams: dict[int, list[torch.Tensor]] = {0: [], 15: [], 29: []}
        layers = reference.model.model.layers
        handles = [
            layers[at].register_forward_hook(lambda _m, _i, out, into=into: into.append(_first(out)[0]))
            for at, into in self.streams.items()
        ]
        for prompt in prompts:
            reference.forward(prompt, len(prompt))
        for handle in handles:
            handle.remove()

    def _activations(self, sae: str) -> list[torch.Tensor]:
        served = self.catalogue.sae(sae)
        return [served.sae.encode(h) for h in self.streams[served.layer]]

    def often(self, sae: str, n: int = 1) -> list[int]:
        ordinary = torch.cat([a[1:] for a in self._activations(sae)])
        return ordinary.abs().mean(dim=0).argsort(descending=True, stable=True)[:n].tolist()

    def sometimes(self, sae: str) -> int:
        share = torch.stack([(a[1:] != 0).float().mean(dim=0) for a in self._activations(sae)])
        found = int((share - 0.5).abs().amax(dim=0).argmin())
        assert 0.1 < share[:, found].min() <= share[:, found].max() < 0.9
        return found

    def never(self, sae: str) -> int:
        """Chosen with room to spare, so that generated tokens do not wake it either."""
        served = self.catalogue.sae(sae)
        pre = torch.cat([served.sae.pre_activations(h) for h in self.streams[served.layer]]).amax(dim=0)
        found = int(pre.argmin())
        assert pre[found] < 0
        return found

    def mean(self, layer: int) -> list[float]:
        return torch.cat([h[1:] for h in self.streams[layer]]).mean(dim=0).tolist()

    def along(self, layer: int) -> float:
        unit = torch.nn.functional.normalize(torch.tensor(self.mean(layer)), dim=0)
        return float((torch.cat([h[1:] for h in self.streams[layer]]) @ unit).mean())

    def random(self, seed: int) -> list[float]:
        v = torch.randn(self.catalogue.d_model, generator=torch.Generator().manual_seed(seed))
        return torch.nn.functional.normalize(v, dim=0).tolist()

    def _positive(self, sae: str, latent: int) -> torch.Tensor:
        values = torch.cat([a[1:, latent] for a in self._activations(sae)]).double()
        return values[values > 0]

    def moments(self, sae: str, latents: Sequence[int]) -> tuple[list[float], list[float]]:
        values = [self._positive(sae, latent) for latent in latents]
        mean = [float(v.mean()) if len(v) else 1.0 for v in values]
        return mean, [float(v.std(correction=0)) if len(v) else 1.0 for v in values]

    def concept(self, sae: str, n: int, seed: int = 0) -> str:
        """Smooth tables; no activation of the prompts lies where the last bit decides between two bins."""
        name = f"{sae.replace('/', '-')}-{n}-{seed}"
        served, latents, bins = self.catalogue.sae(sae), sorted(self.often(sae, n)), 40
        random = torch.Generator().manual_seed(seed)
        mean, std = self.moments(sae, latents)
        edges = torch.zeros(n, 2)
        for i, latent in enumerate(latents):
            values = self._positive(sae, latent)
            top = float(values.max()) if len(values) else 1.0
            for _ in range(1000):
                low = 0.3 * top * float(torch.rand((), generator=random))
                high = top * (0.7 + 0.2 * float(torch.rand((), generator=random)))
                place = (values - low) * bins / (high - low)
                if bool(((place - place.round()).abs() > 2e-3).all()):
                    break
            edges[i] = torch.tensor([low, high])
        made = made_concept(served.sae, served.layer, latents=latents, n_bins=bins, seed=seed)
        slope = torch.linspace(0.2, 1.0, bins).expand(n, -1)
        posterior = torch.where(torch.arange(n)[:, None] % 3 == 0, slope.flip(1), slope).contiguous()
        concept = replace(
            made,
            edges=edges,
            posterior=posterior,
            mean=torch.tensor(mean).expand(3, -1).contiguous(),
            std=torch.tensor(std).expand(3, -1).contiguous(),
        )
        self.catalogue.concepts.put(name, concept)
        return name

    def map(self, sae: str, transfers: Sequence[Transfer], scope: Scope, gate: SequenceGate | None) -> str:
        served = self.catalogue.sae(sae)
        found = LatentMap("demo", served.sae.digest, served.layer, tuple(transfers), scope, gate)
        self.catalogue.maps.put(found.digest[:20], found)
        return found.digest[:20]

    def tokens(self, text: str) -> list[int]:
        return list(self.catalogue.encode_text(text))

    def statistic(self, sae: str, evidence: Sequence[int], gate: Gate, prompt: int) -> float:
        return statistic(gate, hit(self._activations(sae)[prompt][:, list(evidence)]))


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@dataclass(frozen=True)
class Outcome:
    """One case on both sides; ``expected`` is the error where the reference refuses the dose."""

    prompt: list[int]
    answer: Answer
    plain: Answer
    expected: Forward | InterventionError

    @property
    def n_fed(self) -> int:
        return len(self.prompt) + N_NEW - 1


def _ask(case: Case, lab: MeasuredLab, prompts: list[list[int]]) -> Ask:
    return Ask(prompts[case.prompt], case.interventions(lab), case.inspect(lab), max_tokens=N_NEW)


@pytest.fixture(scope="module")
def outcomes(
    engine: Engine, reference: ReferenceExecutor, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Outcome]:
    """Every case on the engine, by name; the engine's requests run together, those of one dose policy per call."""
    library = tmp_path_factory.mktemp("library")
    engine.catalogue.concepts, engine.catalogue.maps = ConceptLibrary(library), MapLibrary(library)
    lab = MeasuredLab(engine, reference, prompts)
    asks = {case.name: _ask(case, lab, prompts) for case in CASES}
    assert len(asks) == len(CASES)
    plain = engine.run([Ask(prompt, max_tokens=N_NEW) for prompt in prompts], cold=True)
    answers: dict[str, Answer] = {}
    for policy in sorted({(case.max_dose or math.inf, case.refuses) for case in CASES}):
        bound = replace(engine.catalogue, max_dose=policy[0], refuse_over_dose=policy[1])
        names = [case.name for case in CASES if (case.max_dose or math.inf, case.refuses) == policy]
        answers |= zip(names, Engine(engine.llm, bound).run([asks[n] for n in names]), strict=True)
    found = {}
    for case in CASES:
        answer, prompt = answers[case.name], prompts[case.prompt]
        expected: Forward | InterventionError
        try:
            tokens = prompt + answer.token_ids[: N_NEW - 1]
            expected = reference.forward(tokens, len(prompt), answer.compiled.payload())
        except InterventionError as error:
            expected = error
        found[case.name] = Outcome(prompt, answer, plain[case.prompt], expected)
    return found


def cases(*, refusing: bool = False) -> Any:
    """Parametrise over the cases that answer, or over those that the dose bound refuses."""
    chosen = [case for case in CASES if case.refuses == refusing]
    return pytest.mark.parametrize("case", chosen, ids=[case.name for case in chosen])


@cases()
def test_the_answer_is_the_reference_executors(outcomes: dict[str, Outcome], case: Case) -> None:
    outcome = outcomes[case.name]
    answer, expected = outcome.answer, outcome.expected
    assert isinstance(expected, Forward)
    assert len(answer.token_ids) == N_NEW
    logprobs = expected.logits.log_softmax(dim=-1)
    chosen = logprobs[range(N_NEW), answer.token_ids]  # of two tokens that are equally likely, the last bit chooses
    assert (logprobs.amax(dim=-1) - chosen).max() < 2 * LOGPROB_TOLERANCE
    for step, top in zip(logprobs, answer.top, strict=True):
        worst = max(abs(float(step[token]) - value) for token, value in top.items())
        assert worst < LOGPROB_TOLERANCE
    difference = answer.differs(outcome.plain)
    if case.changes:
        assert difference >= 0.1
    else:
        assert difference < LOGPROB_TOLERANCE


@pytest.mark.parametrize("case", remap_cases.CASES, ids=[case.name for case in remap_cases.CASES])
def test_the_gates_are_the_reference_executors(outcomes: dict[str, Outcome], case: Case) -> None:
    """The same statistic to the last bit, open from the same token on; and those that are meant to open do, but not at once."""
    outcome = outcomes[case.name]
    journal, program = outcome.answer.journal, outcome.answer.compiled.program
    if journal is None or program is None:
        return
    assert isinstance(outcome.expected, Forward)
    for layer in program.layers:
        facts = outcome.expected.gates[layer.layer]
        for number, gate in enumerate(layer.gates):
            if gate.over_sequence:
                assert journal.gate(layer.layer, number) == (facts[number].open_from, facts[number].statistic)
                assert (facts[number].open_from is not None) == case.changes


@pytest.mark.parametrize("case", rule_cases.CASES, ids=[case.name for case in rule_cases.CASES])
def test_the_rules_are_the_reference_executors(outcomes: dict[str, Outcome], case: Case) -> None:
    """The same propositions, conclusions and actions at every token; and those that are meant to act do, but not everywhere."""
    outcome = outcomes[case.name]
    assert outcome.answer.journal is not None
    assert isinstance(outcome.expected, Forward)
    mine, theirs = outcome.answer.journal.rules, outcome.expected.rules
    assert mine is not None
    assert theirs is not None
    assert mine.n == outcome.n_fed
    for part in ("held", "concluded", "active"):
        assert np.array_equal(getattr(mine, part), getattr(theirs, part)), part
    assert np.allclose(mine.scores, theirs.scores, rtol=READING_TOLERANCE, atol=READING_TOLERANCE, equal_nan=True)
    if case.changes:
        assert mine.active[1:].any(axis=0).all()
        assert not mine.active[1:].all(axis=0).any()
    else:
        assert not mine.active.any()


@cases()
def test_the_receipt_is_the_reference_executors(outcomes: dict[str, Outcome], case: Case) -> None:
    outcome = outcomes[case.name]
    answer, expected = outcome.answer, outcome.expected
    assert isinstance(expected, Forward)
    if not answer.compiled.entries:
        return
    if answer.compiled.program is None:  # nothing to run: nothing travels, and nothing fired
        assert answer.journal is None
        assert set(case.inert) == set(range(len(answer.compiled.entries)))
        return
    journal = answer.journal
    assert journal is not None
    assert journal.computed_from == 0
    assert journal.covers(0, outcome.n_fed)
    fired_anywhere, clamped = set(), 0
    for i, entry in enumerate(answer.compiled.entries):
        for layer in entry.layers:
            mine, theirs = journal.stats(i, layer, outcome.n_fed), expected.stats(i, layer)
            assert (mine.fired, mine.clamped) == (theirs.fired, theirs.clamped)
            assert mine.dose_mean == pytest.approx(theirs.dose_mean, rel=1e-3)
            assert mine.dose_max == pytest.approx(theirs.dose_max, rel=1e-3)
            clamped += mine.clamped
            if mine.fired:
                fired_anywhere.add(i)
                selected, _ = entry.selector.count(outcome.prompt + answer.token_ids[: N_NEW - 1], len(outcome.prompt))
                assert 0 < mine.fired <= selected
                assert case.max_dose is None or mine.dose_max <= case.max_dose * 1.0001
    assert fired_anywhere == set(range(len(answer.compiled.entries))) - set(case.inert)
    assert (clamped > 0) == case.clamps


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.name.startswith(("inspect/", "composed/three")) or c.name.endswith("/edited_and_inspected")],
    ids=lambda c: c.name,
)
def test_the_readings_are_the_reference_executors(outcomes: dict[str, Outcome], case: Case) -> None:
    outcome = outcomes[case.name]
    journal, expected = outcome.answer.journal, outcome.expected
    assert isinstance(expected, Forward)
    assert journal is not None
    assert len(expected.readings) == len(outcome.answer.compiled.reads) > 0
    nonzero = 0
    for number, theirs in enumerate(expected.readings):
        mine = journal.readings(number, 0, outcome.n_fed)
        assert [position for position, _ in mine] == [position for position, _ in theirs]
        assert mine, "the inspection selects something"
        for (_, have), (_, want) in zip(mine, theirs, strict=True):
            listed = len(outcome.answer.compiled.reads[number].features)
            assert [i for i, _ in have[:listed]] == [i for i, _ in want[:listed]]
            assert {i for i, _ in have} == {i for i, _ in want}
            values = dict(want)
            assert all(v == pytest.approx(values[i], rel=READING_TOLERANCE, abs=READING_TOLERANCE) for i, v in have)
            magnitudes = [abs(v) for _, v in have[listed:]]
            assert magnitudes == sorted(magnitudes, reverse=True)
            nonzero += sum(v != 0 for _, v in have)
    assert nonzero > 0


def test_a_latent_that_is_off_everywhere_is_listed_with_zeros(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["inspect/jumprelu/l15"]
    assert outcome.answer.journal is not None
    readings = outcome.answer.journal.readings(0, 0, outcome.n_fed)
    sometimes, never = (
        [dict(pairs)[f] for _, pairs in readings] for f in outcome.answer.compiled.reads[0].features[:2]
    )
    assert set(never) == {0.0}
    assert min(sometimes) == 0.0 < max(sometimes)


def test_the_edited_stream_reads_differently_after_the_edit_only(outcomes: dict[str, Outcome]) -> None:
    for name in ("standard", "topk", "layer_norm"):
        both = [outcomes[f"inspect/{name}/edited/after_{after}/l15"] for after in ("false", "true")]
        before, after = (o.answer.journal.readings(0, 0, o.n_fed) for o in both if o.answer.journal)
        assert [p for p, _ in before] == [p for p, _ in after]
        assert before != after


@cases(refusing=True)
def test_a_refused_dose_ends_the_request_with_the_reference_executors_error(
    outcomes: dict[str, Outcome], case: Case
) -> None:
    outcome = outcomes[case.name]
    assert isinstance(outcome.expected, InterventionError)
    assert outcome.answer.journal is not None
    error = outcome.answer.journal.error
    assert error is not None
    assert (
        (error.code, error.param)
        == (outcome.expected.code, outcome.expected.param)
        == ("dose_exceeded", "interventions")
    )
    assert error.message.split(";")[0] == outcome.expected.message.split(";")[0]
    assert len(outcome.answer.token_ids) < N_NEW


@pytest.mark.parametrize("prompt", range(len(TEXTS)))
def test_the_armed_server_answers_plain_requests_as_transformers_does(
    outcomes: dict[str, Outcome], reference: ReferenceExecutor, prompts: list[list[int]], prompt: int
) -> None:
    plain = next(o.plain for o in outcomes.values() if o.prompt == prompts[prompt])
    assert plain.journal is None
    expected = reference.generate(prompts[prompt], max_tokens=N_NEW)
    assert plain.token_ids == expected.token_ids
    for step, top in zip(expected.logprobs, plain.top, strict=True):
        assert max(abs(float(step[token]) - value) for token, value in top.items()) < LOGPROB_TOLERANCE
