"""The detector of a fitted concept: from readings of the served engine to propositions for rules, beside a dense probe.

The residual stream of each text is read in the same pass as its latents. Of tokens, only so many rows are kept as a probe can be
fitted to in seconds; labelled words and places come first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from editserver.api.concept_plan import Plan, Readings, Stream
from editserver.api.evidence import Seen, ordinary_tokens
from editserver.api.passes import Passes
from editserver.api.state import EditState
from interventions.concepts.agreement import Outcomes, agreement, difference
from interventions.concepts.concept import Concept
from interventions.concepts.dense import DenseText, DenseTrial, dense_judge, dense_probe, dense_trial
from interventions.concepts.detection import LEVELS, Detection, Level, fit_detector, judge
from interventions.concepts.detector import Detector
from interventions.concepts.labelled import IGNORED, NEGATIVE, POSITIVE, Ints, LabelledText
from interventions.errors import InterventionError
from interventions.rules.proposition import Sum

DENSE_TOKENS = 8192
"""Tokens whose residual stream is kept for the dense probe, at most."""
DENSE_NUMBERS = 2**23
"""Numbers that are, tokens × d_model."""


def kept_rows(state: EditState, plan: Plan) -> list[Ints]:
    """Of each text, the tokens whose residual stream is kept: labelled ones first, then evenly spread; token 0 is position 1."""
    examples = plan.examples
    most = min(DENSE_TOKENS, DENSE_NUMBERS // state.catalogue.d_model)
    lengths = [len(prompt.token_ids) - 1 for prompt in examples.prompts]
    stride = max(1, -(-sum(lengths) // most))
    found, passed = [], 0
    for length, labels in zip(lengths, examples.tokens, strict=True):
        here = (np.arange(length) + passed) % stride == 0
        if labels is not None:
            here |= labels == POSITIVE
        found.append(np.flatnonzero(here))
        passed += length
    return found


def stream_of(plan: Plan, passes: Passes, read: int, seen: Seen, at: Ints) -> Stream:
    """The residual stream of a pass whose reading number ``read`` it is."""
    choice = passes.choices[0]
    assert choice.journal is not None
    rows = choice.journal.listed(read, 1, choice.fed)
    (kept,) = ordinary_tokens(plan.sae, [seen])
    return Stream(rows[kept if kept.any() else slice(None)].mean(axis=0), at, rows[at])


def add_detector(
    state: EditState, plan: Plan, concept: Concept, readings: Readings
) -> tuple[Concept, dict[str, Any] | None]:
    """The concept with its detector, and what there is to report of it; unchanged where none was asked for, or none found."""
    recipe = plan.recipe
    if recipe is None:
        return concept, None
    texts = [_labelled(plan, readings, i) for i in range(len(readings.texts))]
    train, held = plan.examples.indices(False), plan.examples.indices(True)
    try:
        found = fit_detector([texts[i] for i in train], plan.sae.sae.n_features, recipe)
    except ValueError as error:
        if isinstance(error, InterventionError):
            raise
        return concept, {"kind": None, "reason": str(error)}
    detector = found.detector
    dense = [_dense(plan, readings, texts, i) for i in range(len(texts))]
    fitted = [dense[i] for i in train]
    tried = {level: dense_trial(fitted, found.folds, level) for level in LEVELS}
    crossed = _crossed(found, tried)
    unseen = _unseen(found, [texts[i] for i in held], tried, fitted, [dense[i] for i in held])
    report = {
        "kind": detector.kind,
        "asked": recipe.kind,
        "labels": plan.labelling.labels,
        "latents": _latents(state, plan, detector),
        "definition": detector.as_dict(),
        "expressions": detector.expressions(plan.sae.id, plan.name),
        "tokens": {
            "labelled": sum(int((text.labels == POSITIVE).sum()) for text in texts),
            "others": sum(int((text.labels == NEGATIVE).sum()) for text in texts),
        },
        "folds": len(found.folds),
        "trials": {
            kind: {
                "token": trial.token.balanced_accuracy,
                "text": {way: outcomes.balanced_accuracy for way, outcomes in trial.text.items()},
            }
            for kind, trial in found.trials.items()
        },
        "cross_validated": _measured(crossed),
        "held_out": _measured(unseen),
        "doubt": _doubt(recipe.level, unseen, "held-out texts") or _doubt(recipe.level, crossed, "held-out folds"),
        "against_dense": _against(unseen, "held-out texts") or _against(crossed, "held-out folds"),
    }
    return replace(concept, detector=detector, fitted_on=_provenance(plan, concept, report)), report


_Compared = Mapping[Level, tuple[Outcomes, Outcomes | None]]
"""Level → outcomes of the detector and of the dense probe."""


def _crossed(found: Detection, tried: Mapping[Level, DenseTrial | None]) -> _Compared:
    trial = found.trials.get(found.detector.kind)
    if trial is None:
        return {}
    compared: dict[Level, tuple[Outcomes, Outcomes | None]] = {}
    for level, other in tried.items():
        mine = trial.token if level == "token" else trial.text[trial.decision] if trial.decision else None
        if mine is not None:
            compared[level] = mine, other.outcomes if other is not None else None
    return compared


def _unseen(
    found: Detection,
    held: Sequence[LabelledText],
    tried: Mapping[Level, DenseTrial | None],
    train: Sequence[DenseText],
    dense: Sequence[DenseText],
) -> _Compared:
    compared: dict[Level, tuple[Outcomes, Outcomes | None]] = {}
    for level, mine in zip(LEVELS, judge(found.detector, held), strict=True) if held else ():
        if mine is None or not mine.all.sum(axis=0).all():
            continue
        trial = tried[level]
        try:
            probe = dense_probe(train, level, trial.ridge if trial is not None else 1.0)
            other = dense_judge(probe, dense, level)
        except ValueError:
            compared[level] = mine, None
            continue
        compared[level] = mine, other if other.all.sum(axis=0).all() else None
    return compared


def _measured(compared: _Compared) -> dict[str, Any] | None:
    """Level → agreement of the detector and of the dense probe."""
    if not compared:
        return None
    return {
        level: {
            name: asdict(agreement(outcomes, of_texts=level == "text")) if outcomes is not None else None
            for name, outcomes in (("detector", mine), ("dense", other))
        }
        for level, (mine, other) in compared.items()
    }


def _doubt(level: Level, compared: _Compared, where: str) -> str | None:
    """Said where the detector may be no better than chance, at the level that its labels are of."""
    if level not in compared:
        return None
    found = agreement(compared[level][0], of_texts=level == "text")
    if found.low > 0.5:
        return None
    figures = f"{found.balanced_accuracy:.3f} ({found.low:.3f} to {found.high:.3f}) on {where}"
    return f"Of {level}s the detector may be no better than chance: balanced accuracy {figures}."


def _against(compared: _Compared, where: str) -> dict[str, Any] | None:
    """Level → dense probe less detector, with what that says."""
    found: dict[str, Any] = {}
    for level, (mine, other) in compared.items():
        if other is None:
            continue
        gap, low, high = difference(other, mine)
        better = "dense" if low > 0 else "detector" if high < 0 else None
        found[level] = {"difference": gap, "low": low, "high": high, "better": better}
        found[level]["says"] = _says(level, better, gap, mine, other, where)
    return found or None


def _says(level: str, better: str | None, gap: float, mine: Outcomes, other: Outcomes, where: str) -> str:
    one, two = mine.balanced_accuracy, other.balanced_accuracy
    figures = f"balanced accuracy {two:.3f} against {one:.3f} on {where}"
    if better == "dense":
        return f"Of {level}s the dense probe is better: {figures}."
    if better == "detector":
        return f"Of {level}s the detector is better than the dense probe: {one:.3f} against {two:.3f} on {where}."
    leads = "is ahead" if gap > 0 else "is behind" if gap < 0 else "is level"
    return f"Of {level}s the dense probe {leads} ({figures}), by no more than chance could do with so few texts."


def _latents(state: EditState, plan: Plan, detector: Detector) -> list[dict[str, Any]]:
    labels = state.knowledge(plan.sae.id).labels
    weights = dict(detector.score.terms) if isinstance(detector.score, Sum) else {}
    order = sorted(detector.features(), key=lambda index: (-abs(weights.get(index, 0.0)), index))
    return [{"index": index, "label": labels.get(index), "weight": weights.get(index)} for index in order]


def _labelled(plan: Plan, readings: Readings, i: int) -> LabelledText:
    seen, kept, examples = readings.texts[i].seen, readings.kept[i], plan.examples
    positive = examples.classes[examples.labels[i]] == plan.choice.target
    given = examples.tokens[i]
    labels = np.full(len(kept), POSITIVE if positive else NEGATIVE, np.int8) if given is None else given.copy()
    labels[~kept] = IGNORED
    return LabelledText(seen.tokens, seen.features, seen.values.astype(np.float32), labels, positive)


def _dense(plan: Plan, readings: Readings, texts: Sequence[LabelledText], i: int) -> DenseText:
    stream, text = readings.texts[i].stream, texts[i]
    assert stream is not None
    return DenseText(stream.mean, stream.rows, text.labels[stream.at], text.positive)


def _provenance(plan: Plan, concept: Concept, report: Mapping[str, Any]) -> dict[str, Any]:
    """What the detector was made by, beside what the concept was fitted on."""
    recipe = plan.recipe
    assert recipe is not None
    measured = {
        where: {level: round(one["detector"]["balanced_accuracy"], 4) for level, one in report[where].items()}
        for where in ("cross_validated", "held_out")
        if report[where] is not None
    }
    made = {
        "labels": plan.labelling.labels,
        "kind": recipe.kind,
        "top": recipe.top,
        "weights": recipe.weights,
        "tree_depth": recipe.depth,
        "folds": report["folds"],
        "balanced_accuracy": measured,
    }
    if plan.labelling.by_token:
        made["span_tokens"] = plan.labelling.part
    return dict(concept.fitted_on) | {"detector": made}
