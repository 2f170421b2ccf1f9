"""Dose curves: steered answers are those of the reference executor, unsteered ones the model's own, and effect rises."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from editserver.demo.model import ensure_demo_model
from interventions.compile import compile_request
from interventions.fitting.dose import (
    PROMPTS,
    Answerer,
    DoseCurve,
    DosePoint,
    Trial,
    dose_curve,
    negative_log_likelihoods,
    recommend,
    repetition,
    stop_tokens,
)
from interventions.fitting.pairs import read_pairs
from interventions.fitting.plots import draw_dose_curve
from interventions.fitting.pooling import Reader
from interventions.fitting.vectors import fit_layer, split
from interventions.reference import ReferenceExecutor
from interventions.spec import parse_interventions

PAIRS = Path(__file__).parents[2] / "examples" / "pairs"
D, VOCAB = 32, 60
PROMPT_IDS = [[1, 7, 12, 5, 33, 20], [4, 9], [3, 3, 8, 14, 59, 2, 6, 31, 30]]
VECTOR = [0.2 * (i - 9) for i in range(D)]


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def test_steered_answers_are_those_of_the_reference_executor(tiny, make_server):
    server = make_server(d_model=D, n_layers=3, armed_layers=(0, 1, 2), vocab_size=VOCAB)
    executor = ReferenceExecutor(tiny)
    strengths = [0.0, 1.5, -0.7]
    expected = []
    for prompt, strength in zip(PROMPT_IDS, strengths, strict=True):
        steer = {
            "type": "steer",
            "layer": 1,
            "values": VECTOR,
            "strength": strength,
            "tokens": ["last_prompt_token", "generated"],
        }
        payload = compile_request(parse_interventions([steer]), [], server).payload()
        expected.append(executor.generate(prompt, payload, max_tokens=12).token_ids)
    answers = Answerer(tiny, 1, torch.tensor(VECTOR)).answer(PROMPT_IDS, strengths, 12)
    assert answers == expected
    plain = [executor.generate(prompt, max_tokens=12).token_ids for prompt in PROMPT_IDS]
    assert answers[0] == plain[0]
    assert answers[1:] != plain[1:]


def test_an_answer_ends_before_its_stop_token_and_does_not_disturb_the_others(tiny):
    vector = torch.tensor(VECTOR)
    strengths = [0.0, 0.5, -0.5]
    free = Answerer(tiny, 1, vector).answer(PROMPT_IDS, strengths, 12)
    stop = free[1][4]
    stopped = Answerer(tiny, 1, vector, [stop]).answer(PROMPT_IDS, strengths, 12)
    for whole, cut in zip(free, stopped, strict=True):
        assert cut == (whole[: whole.index(stop)] if stop in whole else whole)
    assert len(stopped[1]) <= 4


def test_drawn_answers_depend_on_their_seed_only(tiny):
    answerer = Answerer(tiny, 1, torch.tensor(VECTOR))
    prompts, strengths = [PROMPT_IDS[0]] * 3, [0.0] * 3
    one = answerer.answer(prompts, strengths, 12, 1.0, [5, 5, 6])
    assert one[0] == one[1] != one[2]
    assert answerer.answer(prompts[:1], [0.0], 12, 1.0, [5]) == one[:1]


def test_likelihoods_are_those_of_each_answer_alone(tiny):
    answers = [[2, 7, 1, 8], [], [5]]
    found = negative_log_likelihoods(tiny, PROMPT_IDS, answers, rows=2)
    for prompt, answer, nll in zip(PROMPT_IDS, answers, found, strict=True):
        with torch.no_grad():
            logprobs = tiny(torch.tensor([prompt + answer])).logits[0].log_softmax(dim=-1)
        expected = [-float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)]
        assert nll.tolist() == pytest.approx(expected, rel=1e-4)


def test_repetition_is_the_share_of_sequences_seen_before():
    assert repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([1, 2]) == 0
    assert repetition([1, 2, 3, 1, 2, 3]) == 1 / 4
    assert repetition([7] * 12) == 9 / 10


def point(dose: float, effect: float | None, coherent: bool = True) -> DosePoint:
    return DosePoint(dose, dose * 5, effect, 0.1, 3.0, 0.0, 40, coherent, "")


def test_the_recommended_strength_has_the_most_effect_before_coherence_is_first_lost():
    points = [point(0, 0.4), point(0.2, 0.6), point(0.4, 0.9), point(0.6, 0.8), point(0.8, 2, False), point(1, 3)]
    points = [point(-0.4, 0.1), point(-0.2, 0.5), *points]
    assert recommend(points, 1) == 2.0
    assert recommend(points, -1) == -2.0


def test_nothing_is_recommended_when_no_coherent_dose_has_an_effect():
    assert recommend([point(0, 0.4), point(0.2, 0.3), point(0.4, 0.9, False)], 1) is None
    assert recommend([point(-0.2, None), point(0, 0.4)], -1) is None


def curve_of(points: list[DosePoint]) -> DoseCurve:
    return DoseCurve(tuple(points), recommend(points, 1), recommend(points, -1), 4.5, 0.2)


def test_the_picture_is_a_small_png_and_nothing_draws_before_it_is_asked_to(tmp_path):
    points = [point(d / 10, math.tanh(d / 3), abs(d) < 8) for d in range(-15, 16)]
    points[0] = replace(points[0], effect=None, effect_error=None, perplexity=None)
    draw_dose_curve(curve_of(points), tmp_path / "dose.png", "a title")
    data = (tmp_path / "dose.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(data) < 80_000
    draw_dose_curve(curve_of(points), tmp_path / "again.png", "a title")
    assert (tmp_path / "again.png").read_bytes() == data
    code = "import sys, editserver.cli.main, interventions.fitting.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# the demo model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo():
    """The demo model in fp32 (so that a batch gives each row the bits of its own run) and its tokenizer."""
    path = ensure_demo_model(progress=False)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def formal(demo):
    """The example vector at layer 15."""
    examples = read_pairs(PAIRS / "formal.jsonl")
    reader = Reader(*demo, [15])
    medians = reader.median_norms(examples.positive)
    rows = [reader.pool(side, "mean", medians).values[15].numpy() for side in (examples.positive, examples.negative)]
    groups = examples.groups()
    return fit_layer(15, *rows, split(*groups), groups, median_norm=medians[15])


TRIAL = Trial(prompts=PROMPTS[:4], doses=(0.3, 0.6), max_tokens=16)


@pytest.fixture(scope="module")
def curve(demo, formal):
    return dose_curve(*demo, formal, trial=TRIAL)


def test_the_example_pairs_separate_on_held_out_texts(formal):
    assert formal.held_out.value > 0.95
    assert formal.accuracy > 0.9
    assert formal.cosine_halves > 0.8
    assert formal.cosine_methods > 0.9


def test_effect_rises_with_the_dose(curve):
    assert [p.dose for p in curve.points] == [-0.6, -0.3, 0.0, 0.3, 0.6]
    effects = [p.effect for p in curve.points]
    assert effects[0] < effects[2] < effects[4]
    assert effects[1] < effects[2] < effects[3]
    assert effects[4] - effects[0] > 0.5


def test_coherence_is_judged_against_the_unsteered_answers(curve):
    zero = curve.at(0.0)
    assert zero.coherent
    assert curve.max_perplexity == pytest.approx(1.5 * zero.perplexity)
    assert 1 < zero.perplexity < 30
    for p in curve.points:
        assert p.coherent == (p.perplexity <= curve.max_perplexity and p.repetition <= curve.max_repetition)


def test_dose_0_is_the_models_own_answer_exactly(demo, formal, curve):
    model, tokenizer = demo
    messages = [{"role": "user", "content": PROMPTS[0]}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=16)[0, inputs.input_ids.shape[1] :]
    assert curve.at(0.0).answer == tokenizer.decode(output, skip_special_tokens=True)
    answerer = Answerer(model, 15, torch.from_numpy(formal.vector), stop_tokens(model, tokenizer))
    assert answerer.answer([inputs.input_ids[0].tolist()], [0.0], 16)[0] == output.tolist()
