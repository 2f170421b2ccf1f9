"""Planted latents are found, the threshold keeps its rate on texts that it never saw, the report says what is wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from interventions.maps.calibration import calibrate
from interventions.maps.fit_topic import TopicSettings, check_formats, fit_topic, split_texts
from interventions.maps.gates import CusumGate, ShareGate, WindowGate, statistic
from interventions.maps.map import AllTokens, LatentMap, TriggerTokens
from interventions.maps.reading import OUTLIER, FitError, Reading, median_mass, statistics
from interventions.maps.transfer import Unit

S, PLANTED = 80, (7, 21, 33, 64)


def texts(n: int, seed: int, topic: float, tokens: int = 60) -> list[Reading]:
    """``n`` texts in which every planted latent fires on a share ``topic`` of the tokens, the others on 5 %."""
    g = torch.Generator().manual_seed(seed)
    rates = torch.full((S,), 0.05)
    rates[0] = 0.9  # dense on everything
    rates[list(PLANTED)] = topic
    found = []
    for _ in range(n):
        active = torch.rand(tokens, S, generator=g) < rates
        found.append(Reading.of(active * (0.5 + torch.rand(tokens, S, generator=g)), range(tokens)))
    return found


FORGET, RETAIN = texts(40, 1, 0.3), texts(120, 2, 0.004)


@pytest.mark.parametrize("select", ["difference", "ratio", "frequency"])
def test_planted_latents_are_recovered_by_each_selection(select) -> None:
    fit = fit_topic(FORGET, RETAIN, S, TopicSettings(select=select, latents=4))
    assert sorted(fit.selected.latents) == list(PLANTED)
    assert fit.detection.hit_rate_forget > 0.7 > 0.05 > fit.detection.hit_rate_retain
    assert fit.detection.auroc.value == 1.0
    assert fit.detection.opened_forget.value == 1.0


@pytest.mark.parametrize("gate", ["share", "window", "cusum"])
def test_the_threshold_keeps_its_rate_on_texts_of_another_draw(gate) -> None:
    noisy = texts(450, 3, 0.05)
    fit = fit_topic(FORGET, noisy, S, TopicSettings(latents=4, gate=gate, false_positive_rate=0.1))
    facts = fit.gate.calibration
    assert facts.n == 150
    assert fit.gate.gate.threshold == facts.threshold > 0
    assert set(fit.gate.evidence) == set(PLANTED)
    apart = [statistic(fit.gate.gate, noisy[i].hits(PLANTED)) for i in fit.retain_parts.calibrate]
    assert facts == calibrate(apart, 0.1)  # of texts that selected nothing
    fresh = [statistic(fit.gate.gate, reading.hits(PLANTED)) > facts.threshold for reading in texts(600, 4, 0.05)]
    assert facts.low - 0.03 <= np.mean(fresh) <= facts.high + 0.03
    assert fit.detection.opened_retain.n == 150


def test_the_kinds_of_gate_are_what_was_asked_for() -> None:
    def gate(**asked):
        return fit_topic(FORGET, RETAIN, S, TopicSettings(latents=4, **asked)).gate

    share = gate(gate="share").gate
    assert isinstance(share, ShareGate)
    assert (share.over, share.least, share.latch) == ("seen", 8, True)
    assert gate(gate="window", window=20, least=30).gate.least == 20
    assert isinstance(gate(gate="window").gate, WindowGate)
    drift = gate().gate
    assert isinstance(drift, CusumGate)
    assert 0.3 < drift.k < 0.5  # half way between hit rates of about 0.76 and 0.016
    assert gate(gate="cusum", drift=0.2).gate.k == 0.2
    assert gate(gate="none") is None


def test_dilution_shows_in_the_report_and_only_for_the_share() -> None:
    share = fit_topic(FORGET, RETAIN, S, TopicSettings(latents=4, gate="share"))
    cusum = fit_topic(FORGET, RETAIN, S, TopicSettings(latents=4))
    assert share.detection.diluted[0] == cusum.detection.diluted[0] == 1.0
    assert share.detection.diluted[1600] == 0.0
    assert cusum.detection.diluted[1600] == 1.0


def test_clamps_are_relative_to_the_residual_norm_on_hit_tokens_or_on_active_latents() -> None:
    hit = fit_topic(FORGET, RETAIN, S, TopicSettings(latents=4, clamp=0.5))
    assert hit.scope == TriggerTokens(PLANTED)
    assert {(t.latent, t.alpha, t.beta, t.unit, t.only_if_active) for t in hit.transfers} == {
        (latent, 0.0, -0.5, Unit.RESIDUAL_NORM, False) for latent in PLANTED
    }
    active = fit_topic(FORGET, RETAIN, S, TopicSettings(latents=4, tokens="active"))
    assert active.scope == AllTokens()
    assert all(t.only_if_active and t.beta == -1.0 for t in active.transfers)
    made = LatentMap("m", "0" * 64, 3, hit.transfers, hit.scope, hit.gate)
    assert made.latents == PLANTED


def test_selection_calibration_and_judgement_share_no_text() -> None:
    formats = ["chat"] * 30 + ["text"] * 60
    parts = split_texts(formats, calibrated=True, seed=0)
    everything = [*parts.select, *parts.calibrate, *parts.judge]
    assert sorted(everything) == list(range(90))
    for part in (parts.select, parts.calibrate, parts.judge):
        assert sum(formats[i] == "chat" for i in part) == 10
    assert split_texts(formats, calibrated=True, seed=0) == parts != split_texts(formats, calibrated=True, seed=1)


def test_false_positives_are_counted_for_each_format() -> None:
    chats = texts(60, 5, 0.1)  # nearer to the topic than the other texts
    fit = fit_topic(FORGET, [*RETAIN, *chats], S, TopicSettings(latents=4), None, ["text"] * 120 + ["chat"] * 60)
    rates = fit.detection.opened_by_format
    assert (rates["text"].n, rates["chat"].n) == (40, 20)
    assert rates["chat"].value > rates["text"].value


def test_formats_that_differ_are_warned_about() -> None:
    assert check_formats(["text", "chat"], ["text", "chat"]) == []
    (only,) = check_formats(["text"], ["text"])
    assert "no retain text is a chat" in only
    confused, _ = check_formats(["chat"], ["text"])
    assert "formatted as chat" in confused


def test_a_threshold_of_zero_is_warned_about() -> None:
    fit = fit_topic(FORGET, texts(60, 6, 0.0), S, TopicSettings(latents=4))
    assert fit.gate.gate.threshold == 0.0
    assert any("one hit anywhere opens the gate" in warning for warning in fit.warnings)


def test_what_cannot_be_fitted_says_why() -> None:
    with pytest.raises(FitError, match=r"no latent tells .*fires on forget"):
        fit_topic(texts(12, 7, 0.05), texts(60, 8, 0.05), S, TopicSettings(select="frequency"))
    with pytest.raises(FitError, match="8 texts are too few"):
        fit_topic(FORGET[:8], RETAIN, S)
    with pytest.raises(FitError, match=r"a rate of 0.01 needs at least 99"):
        fit_topic(FORGET, RETAIN, S, TopicSettings(false_positive_rate=0.01))


def test_a_reading_is_its_dense_form_without_position_zero() -> None:
    g = torch.Generator().manual_seed(0)
    dense = (torch.rand(9, S, generator=g) < 0.1) * torch.randn(9, S, generator=g)
    reading = Reading.of(dense, range(100, 109))
    assert torch.equal(reading.dense(S)[1:], dense[1:].float())
    assert not reading.dense(S)[0].any()
    assert np.array_equal(reading.at(4, S), dense[4].numpy())
    assert np.array_equal(reading.hits([3, 5]), (reading.dense(S)[:, [3, 5]] != 0).any(1).numpy())
    assert reading.mass() == pytest.approx(reading.dense(S).abs().sum(1).numpy(), rel=1e-6)
    with pytest.raises(ValueError, match=r"outside 1..8"):
        Reading(tuple(range(9)), np.array([9]), np.array([0]), np.ones(1, np.float32))
    with pytest.raises(ValueError, match="finite"):
        Reading(tuple(range(9)), np.array([1]), np.array([0]), np.array([np.nan], np.float32))


def test_outlier_tokens_stay_out_of_statistics() -> None:
    rows = torch.ones(50, S)
    rows[20] *= 2 * OUTLIER
    found, left_out = statistics([Reading.of(rows, range(50))], S, median_mass([Reading.of(rows, range(50))]))
    assert (found.tokens, left_out) == (48, 1)
    assert (found.mean == 1.0).all()
