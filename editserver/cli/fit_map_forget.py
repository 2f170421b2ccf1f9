"""``editserver fit map forget``: texts to forget and to retain → latents, gate, clamps, and what they do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editserver.cli.fit_map_job import (
    Measured,
    Options,
    Outcome,
    Quiz,
    build,
    mention_scope,
    provenance,
    store,
    text_change,
    trial,
)
from editserver.cli.fit_map_server import Edit, Engine, Stage, Text
from interventions.maps.fit_topic import TopicFit, TopicSettings, fit_topic
from interventions.maps.map import Scope

if TYPE_CHECKING:
    from editserver_client import Client


def run(
    client: Client,
    stage: Stage,
    options: Options,
    settings: TopicSettings,
    sae: str | None,
    forget: Sequence[Text],
    retain: Sequence[Text],
    mentions: Sequence[str],
    mention_tokens: str,
    files: dict[str, Path | None],
    url: str,
) -> Outcome:
    """Fit, measure and store.

    Raises:
        FitError: what stands in the way, before anything is stored; EditserverError: the server's refusals.
    """
    engine = Engine(client, sae, stage)
    options.check(engine)
    scope: Scope | None = mention_scope(engine, mentions, mention_tokens) if mentions else None
    sides = [
        engine.prompts(texts, options.longest, option) for option, texts in (("--forget", forget), ("--retain", retain))
    ]
    passes = [
        engine.run(prompts, title, saes=[engine.sae.id], losses=bool(options.strengths))
        for prompts, title in zip(sides, ("reading texts to forget", "reading texts to retain"), strict=True)
    ]
    readings = [[one.readings[engine.sae.id] for one in side] for side in passes]
    formats = [[prompt.format for prompt in side] for side in sides]
    fit = fit_topic(readings[0], readings[1], engine.sae.n_features, settings, formats[0], formats[1])
    quiz = Quiz(engine, options, mentions)
    used = scope or fit.scope
    asked = asdict(settings) | {"unit": settings.unit.value, "mentions": list(mentions), "longest": options.longest}
    origin = provenance(engine, asked, files)
    candidate = build(engine, fit.transfers, used, fit.gate, origin, {})
    measured: list[Measured] = []
    if options.strengths:
        parts = {"forget": (0, fit.forget_parts.judge), "retain": (1, fit.retain_parts.judge)}
        with trial(engine, options, candidate) as name:
            for strength in options.strengths:
                edit = Edit(name, strength)
                changes = {
                    title: text_change(
                        engine, [sides[i][j] for j in judge], [passes[i][j] for j in judge], edit, f"{title} texts"
                    )
                    for title, (i, judge) in parts.items()
                }
                measured.append(quiz.recall(edit, Measured(strength, changes)))
    figures = _figures(fit, formats)
    warnings = [*fit.warnings, *quiz.warnings(measured)]
    if engine.truncated:
        warnings.append(f"{engine.truncated} tokens have more active latents than the server reports: --limit top_k=N")
    report = {"fit": figures, "measured": [one.as_dict() for one in measured], "warnings": warnings}
    final = build(engine, fit.transfers, used, fit.gate, origin, report)
    return Outcome(
        "forget",
        options,
        final,
        engine.sae.id,
        url,
        store(engine, options, final),
        figures,
        tuple(measured),
        quiz.answers(),
        {"to forget": fit.statistics_forget, "to retain": fit.statistics_retain},
        None if fit.gate is None else fit.gate.gate.threshold,
        tuple(warnings),
    )


def _figures(fit: TopicFit, formats: Sequence[Sequence[str]]) -> dict[str, Any]:
    counts = [{kind: list(side).count(kind) for kind in sorted(set(side))} for side in formats]
    gate = fit.gate
    return {
        "latents": list(fit.selected.latents),
        "scores": list(fit.selected.scores),
        "passed": dict(fit.selected.passed),
        "texts": {
            name: {
                "select": len(parts.select),
                "calibrate": len(parts.calibrate),
                "judge": len(parts.judge),
                "formats": count,
            }
            for name, parts, count in zip(
                ("forget", "retain"), (fit.forget_parts, fit.retain_parts), counts, strict=True
            )
        },
        "tokens": {"forget": fit.tokens[0], "retain": fit.tokens[1], "outliers": fit.outliers},
        "gate": None
        if gate is None
        else asdict(gate.gate) | {"calibration": None if gate.calibration is None else asdict(gate.calibration)},
        "held_out": fit.detection.as_dict(),
    }
