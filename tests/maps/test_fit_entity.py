"""Planted known and unknown latents are found among matched entities; length alone does not pass for knowledge."""

from __future__ import annotations

import numpy as np
import pytest

from interventions.maps.fit_entity import EntitySettings, KnownProbe, Mentions, fit_entities
from interventions.maps.reading import FitError

S, K, U, LONG = 120, [5, 6, 7], [50, 51], 90


def mentions(
    kind: str, n: int, side: str, lengths: list[int], seed: int, contexts: int = 2, planted: bool = True
) -> Mentions:
    """Entities of ``side``: K fires on known ones, U on unknown ones, LONG on names of more than two tokens."""
    draws = np.random.default_rng(seed)
    names, counts, rows = [], [], []
    for i in range(n):
        for _ in range(contexts):
            z = (draws.random(S) < 0.05) * draws.gamma(4, 0.5, S)
            for latents, mine in ((K, "known"), (U, "unknown")):
                on = draws.random(len(latents)) < (0.9 if side == mine else 0.05)
                z[latents] = on * draws.gamma(8, 0.5, len(latents)) if planted else 0.0
            z[LONG] = draws.gamma(8, 0.5) if lengths[i % len(lengths)] > 2 else 0.0
            names.append(f"{side}-{kind}-{i}")
            counts.append(lengths[i % len(lengths)])
            rows.append(z)
    return Mentions(tuple(names), (kind,) * len(names), tuple(counts), np.array(rows, np.float32))


def joined(*parts: Mentions) -> Mentions:
    return Mentions(
        tuple(n for p in parts for n in p.entities),
        tuple(k for p in parts for k in p.kinds),
        tuple(c for p in parts for c in p.lengths),
        np.concatenate([p.z for p in parts]),
    )


KNOWN, UNKNOWN = mentions("city", 60, "known", [1, 2, 3], 1), mentions("city", 60, "unknown", [2, 3, 4], 2)


def test_planted_latents_are_recovered_and_mapped_to_their_unknown_mean() -> None:
    fit = fit_entities(KNOWN, UNKNOWN, EntitySettings(3, 2))
    assert (sorted(fit.latents.known), sorted(fit.latents.unknown)) == (K, U)
    expected = UNKNOWN.of(fit.fitted.unknown).z[:, K + U].mean(axis=0)
    assert fit.mean_unknown == pytest.approx(expected.tolist(), rel=1e-6)
    assert [(t.latent, t.alpha, t.beta) for t in fit.transfers] == [
        (latent, 0.0, pytest.approx(mean)) for latent, mean in zip(K + U, fit.mean_unknown, strict=True)
    ]
    assert fit.separation.value > 0.95


def test_halves_share_no_entity_and_have_equal_lengths() -> None:
    fit = fit_entities(KNOWN, UNKNOWN)
    for mine, side in ((KNOWN, "known"), (UNKNOWN, "unknown")):
        fitted, judged = (set(getattr(half, side)) for half in (fit.fitted, fit.judged))
        assert not fitted & judged
        assert len(fitted) == len(judged) == 20
        assert set(mine.entities) - fitted - judged == set(getattr(fit, f"dropped_{side}"))
    for half in (fit.fitted, fit.judged):
        lengths = [sorted(side.of(names).lengths) for side, names in ((KNOWN, half.known), (UNKNOWN, half.unknown))]
        assert lengths[0] == lengths[1]


def test_matching_lengths_removes_what_only_length_tells() -> None:
    """Without any planted latent the entities differ by length alone, and that passes for knowledge unless matched."""
    known = mentions("city", 160, "known", [1, 1, 2, 2, 3], 3, planted=False)
    unknown = mentions("city", 160, "unknown", [2, 3, 3, 3, 4], 4, planted=False)
    naive = fit_entities(known, unknown, EntitySettings(4, 4, match=False))
    assert naive.length_after.value == naive.length_before.value > 0.7
    assert LONG in naive.latents.unknown
    assert naive.separation.value > 0.65
    assert any("token count alone" in warning for warning in naive.warnings)
    matched = fit_entities(known, unknown, EntitySettings(4, 4))
    assert matched.length_after.value == 0.5
    assert LONG not in matched.latents.all
    assert abs(matched.separation.value - 0.5) < 0.15
    assert any("does not tell held-out known from unknown" in warning for warning in matched.warnings)
    assert not any("token count" in warning for warning in matched.warnings)


def test_a_latent_must_tell_known_from_unknown_in_every_type() -> None:
    def film(side: str, seed: int) -> Mentions:
        found = mentions("film", 30, side, [2], seed)
        found.z[:, [6, 51]] = 0.0  # these two mean nothing among films
        return found

    fit = fit_entities(joined(KNOWN, film("known", 5)), joined(UNKNOWN, film("unknown", 6)), EntitySettings(3, 2))
    assert {5, 7} <= set(fit.latents.known)
    assert 6 not in fit.latents.known
    assert 50 in fit.latents.unknown
    assert 51 not in fit.latents.unknown


def test_a_target_with_the_latents_of_unknown_entities_is_not_told_apart() -> None:
    fit = fit_entities(KNOWN, UNKNOWN, EntitySettings(3, 2))
    target = mentions("target", 20, "known", [2], 9).z
    edited = target.copy()
    edited[:, K + U] = fit.mean_unknown
    found = fit.judge(target, edited, UNKNOWN)
    assert found.before.value > 0.95
    assert found.after.value < 0.75
    narrow = fit.judge(target, edited, UNKNOWN, fit.narrow_probe)
    assert narrow.before.value > 0.95
    assert abs(narrow.after.value - 0.5) < 0.5  # the mean itself lies between the unknown ones
    assert fit.judge(target, target, UNKNOWN).after == found.before


def test_dense_latents_are_left_out_by_ordinary_text() -> None:
    background = np.zeros(S)
    background[5] = 0.5
    fit = fit_entities(KNOWN, UNKNOWN, EntitySettings(3, 2), background)
    assert 5 not in fit.latents.known
    assert fit.latents.dense == 1
    assert any("no ordinary text" in warning for warning in fit_entities(KNOWN, UNKNOWN).warnings)


def test_a_probe_counts_only_its_latents() -> None:
    probe = KnownProbe.fit(KNOWN.z, UNKNOWN.z, K)
    other = KNOWN.z.copy()
    other[:, U] += 100
    assert np.array_equal(probe.score(KNOWN.z), probe.score(other))
    assert KnownProbe.fit(KNOWN.z, UNKNOWN.z).score(KNOWN.z).mean() > 0.5


def test_entities_that_give_nothing_are_refused() -> None:
    with pytest.raises(FitError, match="known entities have the types city, unknown film"):
        fit_entities(KNOWN, mentions("film", 8, "unknown", [2], 0))
    with pytest.raises(FitError, match=r"make 0 pairs of equal token count.*unknown names of those lengths"):
        fit_entities(mentions("city", 8, "known", [1], 0), mentions("city", 8, "unknown", [3], 0))
    with pytest.raises(FitError, match="3 known and 8 unknown entities of type city"):
        fit_entities(mentions("city", 3, "known", [1], 0), mentions("city", 8, "unknown", [1], 0))
    with pytest.raises(FitError, match="keep each in one list"):
        fit_entities(KNOWN, KNOWN)
    silent = [Mentions(s.entities, s.kinds, s.lengths, np.zeros_like(s.z)) for s in (KNOWN, UNKNOWN)]
    with pytest.raises(FitError, match="give more entities"):
        fit_entities(*silent)
