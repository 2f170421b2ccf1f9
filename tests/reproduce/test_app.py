"""The pieces of ``make reproduce-app``: its data, one cell on a small model, and what it concludes from cells."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import reproduce.app.cell as cell_module
from reproduce.app import analysis, data
from reproduce.app.__main__ import COMMAND
from reproduce.app.analysis import Point, at_level, compare, curve, point, removable
from reproduce.app.cell import Readout, draw, final, pool, run_cell
from reproduce.app.run import cells, fingerprint
from reproduce.app.settings import BY_MEAN, FULL, MAIN, QUICK, SIDE, Settings, Trial
from reproduce.app.tables import tables
from reproduce.model import Runner
from reproduce.page import shown
from reproduce.wheel import DataError
from sae_weights.sae import SAE, Hook
from tests.interventions.conftest import make_sae

# equal removal -------------------------------------------------------------------------------------------------------


def test_the_cost_at_a_level_is_read_between_the_settings_around_it():
    points = [Point(0, 0), Point(0.4, 0.1), Point(0.8, 0.5)]
    assert at_level(points, 0.4) == pytest.approx(0.1)
    assert at_level(points, 0.8) == pytest.approx(0.5)
    # Halfway in what is removed is halfway in nats: the geometric mean of the perplexities.
    assert at_level(points, 0.6) == pytest.approx(math.sqrt(1.1 * 1.5) - 1)
    assert at_level(points, 0.2) == pytest.approx(math.sqrt(1.1) - 1)


def test_a_level_that_is_never_reached_has_no_cost():
    assert at_level([Point(0, 0), Point(0.4, 0.1)], 0.5) is None
    assert at_level([Point(0, 0), Point(-0.2, 0.1)], 0.25) is None


def test_of_several_crossings_the_first_counts():
    points = [Point(0, 0), Point(0.5, 0.2), Point(0.1, 0.3), Point(0.6, 0.9)]
    assert at_level(points, 0.5) == pytest.approx(0.2)


def test_a_jump_over_a_level_is_between_its_ends():
    assert 0 < at_level([Point(0, 0), Point(1.2, 1.0)], 0.25) < 1.0


def made_cell(name="news", seed=0, before=0.75, app=0.05, rest=0.2, reach=1.0, k=4):
    """A cell in which every curve is straight: a setting of place i of m removes i/m·reach at i/m of the cost."""
    found = []
    for trial in dict.fromkeys((*MAIN, *BY_MEAN)):
        dear = app if trial.method == "app" else rest
        methods = [m for m in analysis.METHODS if trial in analysis.settings(m)]
        order = analysis.settings(methods[0]) if methods else (trial,)
        share = (order.index(trial) + 1) / len(order)
        if trial == Trial("mask"):
            share = 1.0
        target = before - share * reach * (before - 1 / k)
        reading = {"target": target, "others": 0.7}
        perplexity = dict.fromkeys(analysis.TEXTS, 50 * (1 + dear) ** share)
        found.append(
            {"layer": 15, "label": trial.label, "by": trial.by, "probe": reading, "readout": reading}
            | {"perplexity": perplexity}
        )
    reading = {"target": before, "others": 0.8}
    plain = {"probe": reading, "readout": reading, "perplexity": dict.fromkeys(analysis.TEXTS, 50.0)}
    separability = {"15": {"all": 0.05, "active": 0.06, "difference, top 50": 0.1 + seed / 100, "mean, top 50": 0.1}}
    return {
        "set": name,
        "seed": seed,
        "target": "a",
        "classes": list("abcd")[:k],
        "before": plain,
        "separability": separability,
        "points": found,
    }


def test_removal_counts_from_the_accuracy_to_chance():
    cell = made_cell(before=0.75)
    assert removable(cell, "probe") == pytest.approx(0.5)
    assert point(cell, Trial("mask"), "probe", "others") == Point(pytest.approx(1.0), pytest.approx(0.2))
    with pytest.raises(KeyError, match="no app λ=9 by difference at layer 15"):
        point(cell, Trial("app", 9.0), "probe", "others")


def test_range_ends_in_the_mask_and_attenuation_passes_through_it():
    cell = made_cell()
    mask = point(cell, Trial("mask"), "probe", "others")
    assert curve(cell, "range", "probe", "others")[-1] == mask
    assert curve(cell, "attenuate", "probe", "others")[3] == mask
    assert curve(cell, "mask", "probe", "others")[-1] == mask
    assert all(curve(cell, method, "probe", "others")[0] == Point(0.0, 0.0) for method in analysis.METHODS)


def test_every_setting_of_a_curve_is_run():
    assert {trial for method in analysis.METHODS for trial in analysis.settings(method)} == set(MAIN)
    assert set(SIDE) <= set(MAIN)


@pytest.mark.parametrize(("app", "verdict"), [(0.05, "holds"), (0.8, "reversed")])
def test_a_planted_order_is_found_with_its_size(app, verdict):
    made = [made_cell(seed=s, app=app + 0.004 * s, rest=0.2) for s in range(5)]
    found = compare(made, "mask", "probe", "others", 0.5)
    assert (found.verdict, found.pairs, found.app_only, found.other_only) == (verdict, 5, 0, 0)
    expected = sum(math.sqrt(1.2) - math.sqrt(1 + app + 0.004 * s) for s in range(5)) / 5
    assert found.difference.mean == pytest.approx(expected, abs=1e-9)


def test_seeds_that_disagree_leave_the_order_open():
    made = [made_cell(seed=s, app=0.2 + 0.1 * (-1) ** s) for s in range(4)]
    assert compare(made, "mask", "probe", "others", 0.5).verdict == "open"
    assert compare(made[:1], "mask", "probe", "others", 0.5).verdict == "open"


def test_a_cell_with_nothing_to_remove_is_left_out():
    blind = made_cell(seed=1, before=0.3)
    found = compare([made_cell(), blind], "mask", "probe", "others", 0.5)
    assert found.pairs == 1
    assert analysis.removal([blind], Trial("mask"), "probe") is None


def test_tables_name_what_does_not_reach_a_level():
    short = [made_cell(seed=s, reach=0.4) for s in range(2)]
    full = [made_cell("medicine", seed=s) for s in range(2)]
    printed = tables({"cells": short + full})
    rows = [line for line in printed.splitlines() if line.startswith("| news | app")]
    assert "– (0/2)" in rows[0]
    assert any(line.startswith("| all | mask | holds") for line in printed.splitlines())
    assert "inf" not in printed
    assert "nan" not in printed


# readings ------------------------------------------------------------------------------------------------------------


def test_the_next_token_is_read_against_each_words_own_mean():
    readout = Readout((5, 6), torch.tensor([10.0, 0.0]))
    assert readout.predict(torch.tensor([[9.0, 0.5], [12.0, 1.0]])).tolist() == [1, 0]


# data ----------------------------------------------------------------------------------------------------------------


def test_remains_of_markup_are_taken_out():
    raw = "China #39;s Hu\\takes  quot;over quot; A amp;M\tforces\n"
    assert data.tidy(raw) == 'China\'s Hu takes "over" A&M forces'


def test_another_file_than_the_pinned_wheel_is_refused(tmp_path):
    folder = data.WHEEL.folder(tmp_path)
    folder.mkdir()
    (folder / data.WHEEL.file).write_bytes(b"not the wheel")
    with pytest.raises(DataError, match=r"sha256 [0-9a-f]{64}; expected 245700c8"):
        data.load(data.NEWS, tmp_path)


@pytest.mark.skipif(not data.cached(), reason="the labelled texts are fetched by `make reproduce-app`")
@pytest.mark.parametrize("labelled", data.SETS, ids=[labelled.name for labelled in data.SETS])
def test_every_class_has_enough_texts_and_none_is_in_two(labelled):
    texts = data.load(labelled)
    assert tuple(texts) == labelled.classes == tuple(labelled.words)
    assert all(len(found) >= FULL.fit + FULL.target for found in texts.values())
    everything = [text for found in texts.values() for text in found]
    assert len(set(everything)) == len(everything)


class Letters:
    """A tokenizer: one token per character."""

    def encode(self, text):
        return [ord(c) % 50 + 3 for c in text]


SIZES = Settings(fit=6, target=4, others=3, tokens=9, background=3, neutral=2, dtype="float32")
SMALL = data.Labelled("small", "", tuple((f, f, f) for f in "abc"), {f: f" {f}" for f in "abc"})


def small_texts():
    chance = random.Random(0)
    return {name: ["".join(chance.choices("abcdefghij" + 20 * name, k=14)) for _ in range(20)] for name in "abc"}


def test_a_draw_keeps_fitted_and_held_out_texts_apart_and_repeats():
    texts = small_texts()
    drawn = draw(SMALL, texts, 1, Letters(), SIZES)
    assert drawn == draw(SMALL, texts, 1, Letters(), SIZES)
    assert drawn != draw(SMALL, texts, 4, Letters(), SIZES)
    assert [name for name, _ in drawn.held_out] == 4 * ["b"] + 3 * ["a"] + 3 * ["c"]
    fitted = {tuple(ids) for found in drawn.fit.values() for ids in found}
    assert not fitted & {tuple(ids) for _, ids in drawn.held_out}
    assert not {tuple(ids) for ids in drawn.background} & {tuple(ids) for ids in drawn.neutral}
    assert {len(ids) for ids in fitted} == {9}
    with pytest.raises(ValueError, match=r"small: 20 texts of 'b'; 34 are needed"):
        draw(SMALL, texts, 1, Letters(), replace(SIZES, fit=30))


def test_a_text_may_be_taken_from_its_end():
    texts = small_texts()
    (first, *_), (last, *_) = (
        draw(replace(SMALL, end=end), texts, 0, Letters(), SIZES).fit["a"] for end in (False, True)
    )
    whole = next(ids for ids in map(Letters().encode, texts["a"]) if ids[:9] == first)
    assert last == whole[-9:] != first


# one cell ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runner():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    return Runner(LlamaForCausalLM(config).eval())


def test_pooling_leaves_out_position_0_and_what_follows_the_text(runner):
    sequences = [[5, 6, 7, 8, 9, 2], [5, 6, 7, 2]]
    for started in runner.start(sequences, [1]):
        pooled, ends = pool(started.last, started, 1), final(started.last, started)
        for row, i in enumerate(started.tokens.index):
            n = len(sequences[i])
            torch.testing.assert_close(pooled[row], started.last[row, 1 : n - 1].mean(dim=0))
            assert torch.equal(ends[row], started.last[row, n - 1])


def sparse_sae():
    """A dictionary whose latents fire on few tokens, so that they are not dense."""
    random_ = torch.Generator().manual_seed(3)
    write = torch.nn.functional.normalize(torch.randn(200, 32, generator=random_), dim=1)
    return SAE.from_tensors(
        architecture="jumprelu",
        hook=Hook("resid_post", 1),
        W_enc=write,
        W_dec=write,
        b_dec=torch.zeros(32),
        gate={"b_enc": torch.zeros(200), "threshold": torch.full((200,), 0.4)},
        input_norm="unit_norm",
    )


@pytest.fixture
def small_neutral(tmp_path, monkeypatch):
    chance = random.Random(1)
    windows = [[chance.randrange(3, 60) for _ in range(70)] for _ in range(8)]
    path = tmp_path / "neutral.json"
    path.write_text(json.dumps({"prose": windows}))
    monkeypatch.setattr(cell_module, "NEUTRAL", path)


def test_a_cell_measures_the_model_and_repeats(runner, small_neutral):
    sae = sparse_sae()
    steps = []
    made = [run_cell(runner, Letters(), {1: sae}, SMALL, small_texts(), 0, SIZES, steps.append) for _ in range(2)]
    assert made[0] == made[1]
    cell = json.loads(json.dumps(made[0]))
    assert [p["label"] for p in cell["points"]] == [trial.label for trial in SIDE]
    assert steps[:2] == ["fitting", "layer 1, mask"]
    texts = draw(SMALL, small_texts(), 0, Letters(), SIZES)
    surprise = []
    for ids in texts.neutral:
        with torch.no_grad():
            logits = runner.model(torch.tensor([ids])).logits[0]
        surprise.append(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:])))
    expected = math.exp(float(torch.stack(surprise).mean()))
    assert cell["before"]["perplexity"]["neutral"] == pytest.approx(expected, rel=1e-5)
    perplexities = {p["perplexity"]["others"] for p in cell["points"]} | {cell["before"]["perplexity"]["others"]}
    assert len(perplexities) == 1 + len(SIDE)
    assert 0 < cell["separability"]["1"]["difference, top 50"] <= 1


def test_cells_run_seed_by_seed_and_are_named_by_what_they_depend_on():
    assert [(labelled.name, seed) for labelled, seed in cells(replace(FULL, seeds=2))] == [
        (name, seed) for seed in range(2) for name in ("news", "medicine", "occupation")
    ]
    sae = make_sae("jumprelu", layer=15)
    assert fingerprint(FULL, {15: sae}) == fingerprint(replace(FULL, seeds=9), {15: sae})
    assert fingerprint(FULL, {15: sae}) != fingerprint(QUICK, {15: sae})
    assert fingerprint(FULL, {15: sae}) != fingerprint(FULL, {15: make_sae("jumprelu", layer=15, seed=5)})


# what is published here ----------------------------------------------------------------------------------------------


def test_the_page_shows_the_tables_of_the_recorded_results():
    assert shown(COMMAND.page) == tables(json.loads(COMMAND.results.read_text())).strip()


def test_the_recorded_results_are_of_the_full_run():
    results = json.loads(COMMAND.results.read_text())
    assert results["settings"] == FULL.as_dict()
    assert [(c["set"], c["seed"]) for c in results["cells"]] == [(s.name, n) for s, n in cells(FULL)]
