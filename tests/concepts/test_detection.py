"""Detectors of planted concepts, and the figures by which they are judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from interventions.concepts.agreement import Outcomes, agreement, difference, wilson
from interventions.concepts.dense import DenseText, dense_judge, dense_probe, dense_trial
from interventions.concepts.detection import Recipe, fit_detector, judge
from interventions.concepts.detector import Kind, Peak, Share
from interventions.concepts.labelled import IGNORED, LabelledText, contrast, folds
from interventions.rules.proposition import Sum

N = 40
Tokens = npt.NDArray[np.float32]
Plant = Callable[[np.random.Generator, Tokens, npt.NDArray[np.bool_]], None]


def made(activations: Tokens, labels: npt.NDArray[np.int8], positive: bool) -> LabelledText:
    tokens, features = activations.nonzero()
    return LabelledText(tokens, features, activations[tokens, features], labels, positive)


def corpus(seed: int, plant: Plant, texts: int = 24, by_token: bool = False) -> list[LabelledText]:
    """Texts of 20 tokens over sparse noise, every other one positive; latent 0 fires everywhere."""
    rng, found = np.random.default_rng(seed), []
    for i in range(texts):
        positive = i % 2 == 0
        x = np.where(rng.random((20, N)) < 0.05, rng.random((20, N)), 0).astype(np.float32)
        x[:, 0] = 50 + rng.random(20) + positive
        here = (rng.random(20) < 0.3) if by_token else np.full(20, positive)
        here[3] = positive
        here &= positive
        plant(rng, x, here)
        found.append(made(x, here.astype(np.int8), positive))
    return found


def one_latent(rng: np.random.Generator, x: Tokens, here: npt.NDArray[np.bool_]) -> None:
    x[here, 7] = 5 + rng.random(int(here.sum()))


def spread(rng: np.random.Generator, x: Tokens, here: npt.NDArray[np.bool_]) -> None:
    """Each of twelve latents is weak and noisy; only their sum tells."""
    x[:, 10:22] = np.maximum(0, rng.normal(size=(len(x), 12)) + 0.8 * here[:, None])


def related(rng: np.random.Generator, x: Tokens, here: npt.NDArray[np.bool_]) -> None:
    """Latent 20 fires with the concept; without it, it fires together with 21."""
    other = ~here & (rng.random(len(x)) < 0.5)
    x[:, 20] = np.where(here | other, 3 + rng.random(len(x)), 0)
    x[:, 21] = np.where(other, 1 + rng.random(len(x)), 0)


@pytest.mark.parametrize(
    ("plant", "kind", "feature"),
    [(one_latent, "single", {7}), (spread, "multi", set(range(10, 22))), (related, "relation", {20, 21})],
)
def test_a_planted_concept_is_recovered_and_holds_on_other_texts(plant: Plant, kind: Kind, feature: set[int]) -> None:
    recipe = Recipe(kind, "token", max_rate=0.6)
    found = fit_detector(corpus(1, plant, by_token=True), N, recipe)
    assert feature <= set(found.detector.features())
    assert 0 not in found.detector.features()  # dense, however different
    token, text = judge(found.detector, corpus(2, plant, by_token=True))
    least = {"single": 1.0, "multi": 0.85, "relation": 1.0}[kind]
    assert token.balanced_accuracy >= least
    assert text is not None
    assert text.balanced_accuracy >= 0.9
    crossed = found.trials[kind].token.balanced_accuracy
    assert crossed == pytest.approx(token.balanced_accuracy, abs=0.08)


@pytest.mark.parametrize(("plant", "kind"), [(one_latent, "single"), (spread, "multi"), (related, "relation")])
def test_auto_takes_the_kind_that_does_best_on_held_out_folds(plant: Plant, kind: Kind) -> None:
    found = fit_detector(corpus(3, plant, by_token=True), N, Recipe(level="token", max_rate=0.6))
    assert found.detector.kind == kind
    best = found.trials[kind].token.balanced_accuracy
    assert best == max(trial.token.balanced_accuracy for trial in found.trials.values())


def test_dense_latents_are_candidates_only_when_asked_for() -> None:
    texts = corpus(1, one_latent)
    assert 0 in fit_detector(texts, N, Recipe("multi", max_rate=None)).detector.features()
    assert 0 not in fit_detector(texts, N, Recipe("multi")).detector.features()


def test_texts_are_decided_by_their_peak_or_by_the_share_of_their_tokens() -> None:
    """Where single tokens are on in both kinds of texts, only how many are tells."""

    def often(rng: np.random.Generator, x: Tokens, here: npt.NDArray[np.bool_]) -> None:
        rate = 0.5 if here.any() else 0.1
        x[:, 7] = np.where(rng.random(len(x)) < rate, 5 + rng.random(len(x)), 0)

    by_share = fit_detector(corpus(4, often, 60), N, Recipe("single", max_rate=0.2))
    assert isinstance(by_share.detector.text, Share)
    by_peak = fit_detector(corpus(4, one_latent), N, Recipe("single"))
    assert isinstance(by_peak.detector.text, Peak)
    for found, plant in ((by_share, often), (by_peak, one_latent)):
        _, text = judge(found.detector, corpus(5, plant, 60))
        assert text is not None
        assert text.balanced_accuracy > 0.9


def test_weights_are_effect_sizes_or_log_decay_once() -> None:
    texts = corpus(1, spread, by_token=True)
    seen = contrast(texts, N)
    multi = fit_detector(texts, N, Recipe("multi", "token", top=6, max_rate=0.6)).detector
    assert isinstance(multi.score, Sum)
    effect = {f: seen.difference[f] / seen.deviation[f] ** 2 for f in multi.features()}
    for feature, weight in multi.score.terms:
        assert weight == pytest.approx(effect[feature] / max(effect.values()), rel=1e-3)
    decayed = fit_detector(texts, N, Recipe("multi", "token", 6, "log_decay", max_rate=0.6)).detector
    assert isinstance(decayed.score, Sum)
    ranked = sorted(decayed.score.terms, key=lambda term: -term[1])
    np.testing.assert_allclose([w for _, w in ranked], 1 - np.log(np.arange(1, 7)) / np.log(7), rtol=1e-3)
    gaps = [seen.difference[f] for f, _ in ranked]
    assert gaps == sorted(gaps, reverse=True)


def test_a_token_on_which_no_latent_fires_never_counts() -> None:
    """The other texts are full of latent 21, so that its absence alone would tell best of single tokens."""

    def absent(rng: np.random.Generator, x: Tokens, here: npt.NDArray[np.bool_]) -> None:
        x[:, 21] = np.where(~here & (rng.random(len(x)) < 0.5), 1 + rng.random(len(x)), 0)
        x[:, 20] = np.where(here & (rng.random(len(x)) < 0.3), 3 + rng.random(len(x)), 0)

    found = fit_detector(corpus(7, absent, 40), N, Recipe("relation", max_rate=0.9))
    assert {20, 21} <= set(found.detector.features())
    silence = made(np.zeros((20, N), np.float32), np.zeros(20, np.int8), False)
    token, text = judge(found.detector, [silence])
    assert token.right.tolist() == [[0, 20]]
    assert text is not None
    assert text.right.tolist() == [[0, 1]]
    token, text = judge(found.detector, corpus(8, absent, 40))
    assert text is not None
    assert text.balanced_accuracy >= 0.9


def test_ignored_tokens_are_no_evidence_but_are_tokens_of_their_text() -> None:
    texts = corpus(1, one_latent)
    loud = np.zeros((20, N), np.float32)
    loud[4, 7] = 1000.0
    labels = np.zeros(20, np.int8)
    labels[4] = IGNORED
    ignoring = fit_detector([*texts, made(loud, labels, False)], N, Recipe("single"))
    assert ignoring.detector.threshold == fit_detector(texts, N, Recipe("single")).detector.threshold
    peak = replace(ignoring.detector, text=Peak(ignoring.detector.threshold))
    token, text = judge(peak, [made(loud, labels, False)])
    assert token.all.tolist() == [[0, 19]]
    assert text is not None
    assert text.right.tolist() == [[0, 0]]  # rules look at it, so the text counts


def test_equal_texts_give_an_equal_detector_and_no_text_is_in_two_folds() -> None:
    texts = corpus(1, related, by_token=True)
    one, other = (fit_detector(texts, N, Recipe(level="token", max_rate=0.6)) for _ in range(2))
    assert one.detector == other.detector
    held = np.concatenate(one.folds)
    assert sorted(held.tolist()) == list(range(len(texts)))
    for fold in one.folds:
        assert len({texts[i].positive for i in fold}) == 2
    assert folds([True, False, False]) == []


def test_a_detector_of_noise_is_no_better_than_chance_on_held_out_folds() -> None:
    """On its own texts it would be: candidates and thresholds are chosen by them."""
    found = fit_detector(corpus(6, lambda rng, x, here: None, 40), N, Recipe("multi"))
    _, fitted = judge(found.detector, corpus(6, lambda rng, x, here: None, 40))
    crossed = found.trials["multi"]
    assert fitted is not None
    assert fitted.balanced_accuracy > 0.65
    assert crossed.text[crossed.decision or "peak"].balanced_accuracy < 0.65


def test_what_cannot_be_fitted_says_why() -> None:
    texts = corpus(1, one_latent)
    with pytest.raises(ValueError, match="tokens are labelled"):
        fit_detector(texts[::2], N, Recipe("single"))
    with pytest.raises(ValueError, match=r"no latent is more active .* left out \(max_rate 0\.0\)"):
        fit_detector(texts, N, Recipe("single", max_rate=0.0))
    with pytest.raises(ValueError, match="top"):
        fit_detector(texts, N, Recipe(top=257))


def test_texts_of_one_class_with_labelled_tokens_make_a_detector_of_tokens_only() -> None:
    texts = [text for text in corpus(1, one_latent, by_token=True) if text.positive]
    found = fit_detector(texts, N, Recipe("auto", "token", max_rate=0.6))
    assert found.detector.text is None
    assert found.trials["single"].token.balanced_accuracy == 1.0
    assert found.trials["single"].text == {}


# figures -------------------------------------------------------------------------------------------------------------


def test_balanced_accuracy_weighs_both_classes_alike() -> None:
    labels = [np.array([1, 1, 0, 0, 0, 0, -1], np.int8)]
    decided = [np.array([1, 0, 0, 0, 0, 1, 1], np.bool_)]
    assert Outcomes.of_tokens(decided, labels).balanced_accuracy == pytest.approx((1 / 2 + 3 / 4) / 2)
    with pytest.raises(ValueError, match="two classes"):
        _ = Outcomes.of_texts([True], [True]).balanced_accuracy


def test_few_texts_all_right_are_no_certainty() -> None:
    found = agreement(Outcomes.of_texts([True] * 5 + [False] * 5, [True] * 5 + [False] * 5), of_texts=True)
    assert (found.balanced_accuracy, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(1 - np.sqrt(2) / 2 * (1 - wilson(5, 5)[0]))
    assert 0.6 < found.low < 0.75


@pytest.mark.parametrize(
    ("right", "n", "ends"), [(0, 10, (0.0, 0.2775)), (8, 10, (0.4902, 0.9433)), (50, 100, (0.4038, 0.5962))]
)
def test_wilsons_interval_is_the_published_one(right: int, n: int, ends: tuple[float, float]) -> None:
    assert wilson(right, n) == pytest.approx(ends, abs=1e-4)


def test_the_interval_of_tokens_takes_texts_for_what_was_drawn() -> None:
    """Ten times the same tokens in each text say nothing new; an interval over tokens would be three times narrower."""
    rng = np.random.default_rng(0)
    kinds = np.arange(40) % 2
    right = rng.random(40) < 0.7
    once = [np.array([bool(r) == bool(k)]) for r, k in zip(right, kinds, strict=True)]
    labels = [np.array([k], np.int8) for k in kinds]
    many = agreement(
        Outcomes.of_tokens([np.repeat(one, 10) for one in once], [np.repeat(one, 10) for one in labels]), of_texts=False
    )
    single = agreement(Outcomes.of_tokens(once, labels), of_texts=False)
    assert (many.low, many.high) == pytest.approx((single.low, single.high))
    assert single.high - single.low > 0.2


def test_a_difference_is_paired() -> None:
    """Both fail on the same texts: alone each is uncertain, their difference is not."""
    kinds = [i % 2 == 0 for i in range(60)]
    decided = [k if i % 5 else not k for i, k in enumerate(kinds)]
    better = [*decided]
    better[0], better[5] = kinds[0], kinds[5]
    gap, low, high = difference(Outcomes.of_texts(decided, kinds), Outcomes.of_texts(decided, kinds))
    assert (gap, low, high) == (0, 0, 0)
    gap, low, high = difference(Outcomes.of_texts(better, kinds), Outcomes.of_texts(decided, kinds))
    assert gap == pytest.approx(2 / 60)
    assert 0 <= low < gap < high < 0.1


def test_the_dense_probe_sees_what_no_latent_does() -> None:
    """A direction that the dictionary has no latent for."""
    rng = np.random.default_rng(0)
    direction = rng.normal(size=32)

    def texts(n: int) -> list[DenseText]:
        found = []
        for i in range(n):
            positive = i % 2 == 0
            rows = (rng.normal(size=(20, 32)) + positive * direction * 0.4).astype(np.float32)
            found.append(DenseText(rows.mean(axis=0), rows, np.full(20, positive, np.int8), positive))
        return found

    train, held = texts(60), texts(40)
    held_out = folds([text.positive for text in train])
    for level, least in (("token", 0.75), ("text", 0.95)):
        trial = dense_trial(train, held_out, level)
        assert trial is not None
        assert trial.outcomes.balanced_accuracy > least
        probe = dense_probe(train, level, trial.ridge)
        assert dense_judge(probe, held, level).balanced_accuracy > least
    assert dense_trial(train[::2], held_out, "text") is None
    assert dense_trial(train, [], "token") is None
