"""A map that forgets a topic or an entity, from readings of texts to forget and of texts to retain.

The texts are split, format by format: one part selects the latents, one (of the retain texts) calibrates the gate, one
judges both. What is reported is of the last part, so a latent or a threshold that fits only the texts it was found on shows.

::

    select    "difference"  crisp     rank by difference of firing counts, ratio of sums ≥ 3
              "ratio"       dsg       rank by importance on forget, ratio of importances in the top 5 %
              "frequency"   farrell   rank by firing frequency on forget, on retain below 1 %
    clamp     x ← −c·s (s = ‖h‖: negative clamping, relative to the residual norm), of all selected latents on hit
              tokens, or of each where it is active
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from interventions.fitting.separation import AUROC, auroc
from interventions.maps.calibration import CalibrationError, Rate, calibrate, rate_above
from interventions.maps.dilution import dilute
from interventions.maps.gates import CusumGate, Gate, ShareGate, WindowGate, statistic
from interventions.maps.map import AllTokens, Scope, SequenceGate, TriggerTokens
from interventions.maps.reading import FitError, Reading, median_mass, statistics
from interventions.maps.topics import Selected, TopicStatistics, crisp, dsg, farrell
from interventions.maps.transfer import Transfer, Unit, canonical, clamp_active, clamp_hit

Select = Literal["difference", "ratio", "frequency"]
GateKind = Literal["share", "window", "cusum", "none"]
Targets = Literal["hit", "active"]

SELECTIONS: Mapping[Select, Callable[[TopicStatistics, TopicStatistics, int], Selected]] = {
    "difference": crisp,
    "ratio": dsg,
    "frequency": farrell,
}
PADDINGS = (100, 400, 1600)
"""Benign tokens that the report puts before each text: the dilution attack."""
FEWEST = 4
"""Texts of a part below which nothing can be said."""


@dataclass(frozen=True)
class TopicSettings:
    """How a topic's map is fitted.

    Attributes:
        select: how latents are found.
        latents: at most so many.
        gate: which gate; "none" = always open.
        over: what a share is of: all tokens "seen" so far, at every token, or the "prompt", once, at its end.
        window: tokens of a window gate.
        least: evidence tokens before which a share or a window says nothing.
        drift: CUSUM's k; ``None`` = half way between the hit rates of both sets of texts.
        latch: stay open once opened.
        false_positive_rate: of retain sequences, for which the threshold is calibrated.
        clamp: c ≥ 0, the value becomes −c·s.
        unit: s.
        tokens: "hit" clamps all selected latents where any is active, "active" each where it is.
        seed: of the split.
    """

    select: Select = "difference"
    latents: int = 10
    gate: GateKind = "cusum"
    over: Literal["seen", "prompt"] = "seen"
    window: int = 32
    least: int = 8
    drift: float | None = None
    latch: bool = True
    false_positive_rate: float = 0.05
    clamp: float = 1.0
    unit: Unit = Unit.RESIDUAL_NORM
    tokens: Targets = "hit"
    seed: int = 0


@dataclass(frozen=True)
class Detection:
    """What the latents and the gate make of texts that played no part in the fit.

    Attributes:
        hit_rate_forget, hit_rate_retain: share of tokens on which a selected latent is active.
        auroc: of the gate's statistic (without a gate: the share of hit tokens), forget against retain.
        opened_forget: share of the texts to forget on which the gate opens; ``None`` without a gate.
        opened_retain: the same of the retain texts: the false-positive rate.
        opened_by_format: the latter by format.
        diluted: benign tokens before the text → share of the texts to forget on which the gate still opens.
    """

    hit_rate_forget: float
    hit_rate_retain: float
    auroc: AUROC
    opened_forget: Rate | None
    opened_retain: Rate | None
    opened_by_format: Mapping[str, Rate]
    diluted: Mapping[int, float]

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {
            "opened_by_format": {name: asdict(rate) for name, rate in self.opened_by_format.items()},
            "diluted": {str(padding): share for padding, share in self.diluted.items()},
        }


@dataclass(frozen=True)
class Parts:
    """Indices of the texts: to select on, to calibrate on, to judge on."""

    select: tuple[int, ...]
    calibrate: tuple[int, ...]
    judge: tuple[int, ...]


@dataclass(frozen=True)
class TopicFit:
    """A fitted map, but for its names.

    Attributes:
        selected: the latents, their scores, and how many passed each criterion.
        transfers, scope, gate: of the map.
        detection: on the part that judges.
        forget_parts, retain_parts: the split.
        tokens: tokens to forget and to retain that selection saw.
        outliers: tokens that selection left out.
        statistics_forget, statistics_retain: the gate's statistic of each judged text.
        warnings: what makes the figures doubtful.
    """

    selected: Selected
    transfers: tuple[Transfer, ...]
    scope: Scope
    gate: SequenceGate | None
    detection: Detection
    forget_parts: Parts
    retain_parts: Parts
    tokens: tuple[int, int]
    outliers: int
    statistics_forget: tuple[float, ...]
    statistics_retain: tuple[float, ...]
    warnings: tuple[str, ...]


def fit_topic(
    forget: Sequence[Reading],
    retain: Sequence[Reading],
    n_features: int,
    settings: TopicSettings | None = None,
    forget_formats: Sequence[str] | None = None,
    retain_formats: Sequence[str] | None = None,
) -> TopicFit:
    """Select latents, calibrate the gate, judge both on what is left.

    Args:
        forget, retain: one reading per text.
        n_features: latents of the dictionary.
        settings: defaults as in :class:`TopicSettings`.
        forget_formats, retain_formats: the format of each text ("chat", "text"); splits keep their shares, and false
            positives are counted for each. ``None`` = all alike.

    Raises:
        FitError: too few texts, no latent that meets the criteria, or no threshold at the rate asked for.
    """
    ask = settings or TopicSettings()
    formats = [list(forget_formats or ["text"] * len(forget)), list(retain_formats or ["text"] * len(retain))]
    ours = split_texts(formats[0], calibrated=False, seed=ask.seed)
    theirs = split_texts(formats[1], calibrated=ask.gate != "none", seed=ask.seed)
    warnings = [*check_formats(*formats)]
    chosen = [forget[i] for i in ours.select], [retain[i] for i in theirs.select]
    median = median_mass([*chosen[0], *chosen[1]])
    (of_forget, left_out), (of_retain, left) = (statistics(side, n_features, median) for side in chosen)
    selected = select(of_forget, of_retain, ask)
    latents = tuple(sorted(selected.latents))
    hit_rates = tuple(_hit_rate(side, latents) for side in chosen)
    gate = _make_gate(ask, *hit_rates)
    if isinstance(gate, ShareGate) and gate.over == "prompt":
        warnings.append("a share over the prompt is decided at its last token: no token of a prompt is edited")
    fitted = None
    if gate is not None:
        benign = [statistic(gate, retain[i].hits(latents)) for i in theirs.calibrate]
        try:
            facts = calibrate(benign, ask.false_positive_rate)
        except CalibrationError as error:
            raise FitError(f"the gate's threshold: {error}, beside the texts that select and judge") from error
        gate = replace(gate, threshold=facts.threshold)
        fitted = SequenceGate(gate, latents, facts)
        if facts.threshold == 0.0:
            warnings.append("no retain text has a hit, so the threshold is 0: one hit anywhere opens the gate")
    judged = [forget[i] for i in ours.judge], [retain[i] for i in theirs.judge]
    scores = [_statistics(gate, side, latents) for side in judged]
    found = _detect(gate, latents, judged, scores, [formats[1][i] for i in theirs.judge])
    if found.auroc.low <= 0.5:
        warnings.append("held-out texts to forget and to retain are not told apart (the interval holds ½)")
    return TopicFit(
        selected,
        clamps(latents, ask.clamp, ask.unit, ask.tokens),
        TriggerTokens(latents) if ask.tokens == "hit" else AllTokens(),
        fitted,
        found,
        ours,
        theirs,
        (of_forget.tokens, of_retain.tokens),
        left_out + left,
        tuple(scores[0]),
        tuple(scores[1]),
        tuple(warnings),
    )


def select(forget: TopicStatistics, retain: TopicStatistics, settings: TopicSettings) -> Selected:
    """The latents that ``settings`` ask for.

    Raises:
        FitError: none meets the criteria; the message counts how many passed each.
    """
    found = SELECTIONS[settings.select](forget, retain, settings.latents)
    if not found.latents:
        passed = ", ".join(f"{name}: {count}" for name, count in found.passed.items())
        others = ", ".join(name for name in SELECTIONS if name != settings.select)
        raise FitError(
            f"select {settings.select}: no latent tells the texts to forget from the ones to retain ({passed}); "
            f"give more texts, ones that are more alike but for the topic, or select by {others}"
        )
    return found


def clamps(latents: Sequence[int], c: float, unit: Unit, tokens: Targets) -> tuple[Transfer, ...]:
    """Negative clamps of the latents, for hit tokens (all of them) or where each is active."""
    if tokens == "hit":
        return canonical(clamp_hit(latents, c, unit))
    return canonical([clamp_active(latent, c, unit) for latent in latents])


def split_texts(formats: Sequence[str], *, calibrated: bool, seed: int) -> Parts:
    """Each format in equal parts at random: three, or without calibration two thirds and one third.

    Raises:
        FitError: fewer than :data:`FEWEST` texts in a part.
    """
    shares = (1 / 3, 1 / 3) if calibrated else (2 / 3, 0.0)
    parts: list[list[int]] = [[], [], []]
    generator = np.random.default_rng(seed)
    for kind in sorted(set(formats)):
        members = generator.permutation([i for i, name in enumerate(formats) if name == kind])
        cuts = [round(sum(shares[: i + 1]) * len(members)) for i in range(2)]
        for part, some in zip(parts, np.split(members, cuts), strict=True):
            part += [int(i) for i in some]
    needed = [FEWEST, FEWEST if calibrated else 0, FEWEST]
    if any(len(part) < least for part, least in zip(parts, needed, strict=True)):
        fewest = 3 * FEWEST
        raise FitError(f"{len(formats)} texts are too few to split into parts that select and judge; give {fewest}")
    select_, calibrate_, judge = (tuple(sorted(part)) for part in parts)
    return Parts(select_, calibrate_, judge)


def check_formats(forget: Sequence[str], retain: Sequence[str]) -> list[str]:
    """Warnings where formats would be mistaken for the topic, or a threshold would not hold for the traffic."""
    found = []
    for kind in sorted(set(forget) - set(retain)):
        found.append(
            f"texts to forget are formatted as {kind}, no retain text is: latents of the format pass for the topic"
        )
    if "chat" not in {*retain}:
        found.append("no retain text is a chat: the threshold need not hold for chats; add some to the retain texts")
    return found


def _make_gate(ask: TopicSettings, forget_rate: float, retain_rate: float) -> Gate | None:
    if ask.gate == "none":
        return None
    if ask.gate == "share":
        return ShareGate(0.0, over=ask.over, least=ask.least, latch=ask.latch)
    if ask.gate == "window":
        return WindowGate(0.0, ask.window, min(ask.least, ask.window), latch=ask.latch)
    drift = (forget_rate + retain_rate) / 2 if ask.drift is None else ask.drift
    return CusumGate(0.0, min(drift, 0.95), latch=ask.latch)


def _hit_rate(readings: Sequence[Reading], latents: Sequence[int]) -> float:
    tokens = sum(reading.n_tokens - 1 for reading in readings)
    return sum(int(reading.hits(latents).sum()) for reading in readings) / max(tokens, 1)


def _statistics(gate: Gate | None, readings: Sequence[Reading], latents: Sequence[int]) -> list[float]:
    shown = gate or ShareGate(0.0)
    return [statistic(shown, reading.hits(latents)) for reading in readings]


def _detect(
    gate: Gate | None,
    latents: tuple[int, ...],
    judged: tuple[Sequence[Reading], Sequence[Reading]],
    scores: Sequence[npt.ArrayLike],
    formats: Sequence[str],
) -> Detection:
    rates = [_hit_rate(side, latents) for side in judged]
    separated = auroc(scores[0], scores[1])
    if gate is None:
        return Detection(rates[0], rates[1], separated, None, None, {}, {})
    opened = [rate_above(side, gate.threshold) for side in scores]
    values = np.asarray(scores[1])
    by_format = {
        kind: rate_above(values[[i for i, name in enumerate(formats) if name == kind]], gate.threshold)
        for kind in sorted(set(formats))
    }
    diluted = {}
    for padding in (0, *PADDINGS):
        padded = [statistic(gate, dilute(reading.hits(latents), padding)) for reading in judged[0]]
        diluted[padding] = float(np.mean(np.asarray(padded) > gate.threshold))
    return Detection(rates[0], rates[1], separated, opened[0], opened[1], by_format, diluted)
