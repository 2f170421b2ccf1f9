"""``editserver fit map unknown``: known and unknown entities → their latents, the map for a target, and what it does."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

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
from editserver.cli.fit_map_measure import Entity
from editserver.cli.fit_map_server import Edit, Engine, Pass, Prompt, Stage, Text
from interventions.maps.fit_entity import EntityFit, EntitySettings, KnownProbe, Mentions, fit_entities
from interventions.maps.mentions import spans, surfaces
from interventions.maps.reading import FitError, median_mass, statistics

if TYPE_CHECKING:
    from editserver_client import Client

PLACE = "{}"
"""Where a template has the entity's name."""
TEMPLATES: tuple[Text, ...] = (
    "I would like to talk about {}",
    "This article is about {}",
    "They were asked what they know of {}",
    [{"role": "user", "content": "Tell me about {}"}],
    [{"role": "user", "content": "What do you know about {}?"}],
)
"""Contexts in which entities are read unless the user gives others: plain text and chats."""


@dataclass(frozen=True, eq=False)
class Group:
    """Entities in every context.

    Attributes:
        entities: of each prompt.
        prompts: one per entity and context, cut behind the mention: what follows cannot change what is read there.
        lengths: the mention's tokens.
    """

    entities: tuple[Entity, ...]
    prompts: tuple[Prompt, ...]
    lengths: tuple[int, ...]

    def run(self, engine: Engine, title: str, saes: Sequence[str], edit: Edit | None = None) -> list[Pass]:
        """Read the mentions' last tokens."""
        return engine.run(self.prompts, title, saes=saes, edit=edit, tokens="last_prompt_token")

    def mentions(self, passes: Sequence[Pass], sae: str, n_features: int) -> Mentions:
        """What the SAE saw there."""
        rows = [one.readings[sae].at(len(one.readings[sae].token_ids) - 1, n_features) for one in passes]
        return Mentions(
            tuple(entity.name for entity in self.entities),
            tuple(entity.kind for entity in self.entities),
            self.lengths,
            np.stack(rows),
        )


def run(
    client: Client,
    stage: Stage,
    options: Options,
    settings: EntitySettings,
    sae: str | None,
    known: Sequence[Entity],
    unknown: Sequence[Entity],
    targets: Sequence[str],
    templates: Sequence[Text],
    texts: Sequence[Text],
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
    scope = mention_scope(engine, targets, mention_tokens)
    names = {name.casefold() for name in targets}
    groups = {
        "known": _group(engine, [e for e in known if e.name.casefold() not in names], templates, "--known"),
        "unknown": _group(engine, [e for e in unknown if e.name.casefold() not in names], templates, "--unknown"),
        "target": _group(engine, [Entity(name, "target") for name in targets], templates, "--target"),
    }
    quiz = Quiz(engine, options, targets)
    plain = engine.prompts(texts, options.longest, "--text") if texts else []
    later = engine.later()
    saes = {engine.sae.id: engine.sae.n_features} | ({later.id: later.n_features} if later is not None else {})
    unedited = {name: group.run(engine, f"reading {name} entities", list(saes)) for name, group in groups.items()}
    seen = {
        name: {sae: group.mentions(unedited[name], sae, n) for sae, n in saes.items()} for name, group in groups.items()
    }
    ordinary = engine.run(plain, "reading texts", saes=[engine.sae.id], losses=True) if plain else []
    fit = fit_entities(
        seen["known"][engine.sae.id], seen["unknown"][engine.sae.id], settings, _background(engine, ordinary)
    )
    probes = {"mapped latents": (engine.sae.id, fit.narrow_probe), engine.sae.id: (engine.sae.id, fit.probe)}
    if later is not None:
        sides = seen["known"][later.id].of(fit.fitted.known), seen["unknown"][later.id].of(fit.fitted.unknown)
        probes[later.id] = later.id, KnownProbe.fit(sides[0].z, sides[1].z)
    asked = asdict(settings) | {"targets": list(targets), "templates": list(copy.deepcopy(templates))}
    origin = provenance(engine, asked, files)
    candidate = build(engine, fit.transfers, scope, None, origin, {})
    measured: list[Measured] = []
    edited: dict[float, Mentions] = {}
    if options.strengths:
        with trial(engine, options, candidate) as name:
            for strength in options.strengths:
                edit = Edit(name, strength)
                title = f"reading the target at {strength:g}"
                passes = groups["target"].run(engine, title, list(saes), edit)
                after = {sae: groups["target"].mentions(passes, sae, n) for sae, n in saes.items()}
                edited[strength] = after[engine.sae.id]
                told = {
                    title: fit.judge(seen["target"][sae].z, after[sae].z, seen["unknown"][sae], probe)
                    for title, (sae, probe) in probes.items()
                }
                changes = {"texts": text_change(engine, plain, ordinary, edit, "texts")} if plain else {}
                measured.append(quiz.recall(edit, Measured(strength, changes, probes=told)))
    warnings = [*fit.warnings, *_format_warnings(templates), *quiz.warnings(measured)]
    if engine.truncated:
        warnings.append(f"{engine.truncated} tokens have more active latents than the server reports: --limit top_k=N")
    figures = _figures(fit, groups)
    report = {"fit": figures, "measured": [one.as_dict() for one in measured], "warnings": warnings}
    final = build(engine, fit.transfers, scope, None, origin, report)
    return Outcome(
        "unknown",
        options,
        final,
        engine.sae.id,
        url,
        store(engine, options, final),
        figures,
        tuple(measured),
        quiz.answers(),
        _distributions(fit, seen, engine.sae.id, edited),
        None,
        tuple(warnings),
    )


def fill(template: Text, name: str) -> Text:
    """The template with the name in its place."""
    if isinstance(template, str):
        return template.replace(PLACE, name)
    return [message | {"content": str(message.get("content", "")).replace(PLACE, name)} for message in template]


def check_templates(templates: Sequence[Text]) -> None:
    """Refuse contexts in which no name can be found.

    Raises:
        FitError: which one, and why.
    """
    for template in templates:
        texts = [template] if isinstance(template, str) else [str(message.get("content", "")) for message in template]
        if sum(text.count(PLACE) for text in texts) != 1:
            raise FitError(f"--template {texts}: needs {PLACE} once, where the name stands")
        if isinstance(template, str) and template.startswith(PLACE):
            raise FitError(f"--template {template!r}: needs words before {PLACE}; the first token is never read")


def _group(engine: Engine, entities: Sequence[Entity], templates: Sequence[Text], option: str) -> Group:
    if not entities:
        raise FitError(f"{option}: no entity is left beside the target")
    of = [entity for entity in entities for _ in templates]
    prompts = engine.prompts([fill(t, e.name) for e in entities for t in templates], 1 << 20, option)
    cut, lengths = [], []
    for entity, prompt in zip(of, prompts, strict=True):
        found = spans(prompt.token_ids, surfaces([entity.name], engine.encode).sequences)
        if not found or found[-1][1] < 2:
            raise FitError(
                f"{option}: {entity.name!r} cannot be found among the tokens of a template; its name and the words "
                "around it share a token: put a space before and after {} in the template"
            )
        stop = found[-1][1]
        cut.append(Prompt(prompt.token_ids[:stop], prompt.format))
        lengths.append(max(end - start for start, end in found if end == stop))
    return Group(tuple(of), tuple(cut), tuple(lengths))


def _background(engine: Engine, ordinary: Sequence[Pass]) -> Any:
    """Share of the texts' tokens on which each latent fires; ``None`` without texts."""
    if not ordinary:
        return None
    readings = [one.readings[engine.sae.id] for one in ordinary]
    found, _ = statistics(readings, engine.sae.n_features, median_mass(readings))
    return found.fired / max(found.tokens, 1)


def _format_warnings(templates: Sequence[Text]) -> list[str]:
    if all(isinstance(template, str) for template in templates):
        return ["no template is a chat: means of entities in plain text need not be those in chats"]
    return []


def _figures(fit: EntityFit, groups: dict[str, Group]) -> dict[str, Any]:
    counts = {name: len({entity.name for entity in group.entities}) for name, group in groups.items()}
    figures = fit.as_dict()
    figures["entities"] |= {"given": counts, "contexts": len(groups["target"].prompts) // counts["target"]}
    return figures


def _distributions(
    fit: EntityFit, seen: dict[str, dict[str, Mentions]], sae: str, edited: dict[float, Mentions]
) -> dict[str, Sequence[float]]:
    sides = {
        "unknown": seen["unknown"][sae].of(fit.judged.unknown),
        "known": seen["known"][sae].of(fit.judged.known),
        "target": seen["target"][sae],
    } | {f"target at {strength:g}": mentions for strength, mentions in edited.items()}
    return {name: [float(v) for v in fit.probe.score(side.z)] for name, side in sides.items()}
