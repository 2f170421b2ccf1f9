"""Everything that the cells of the study share: questions, texts, contexts, and what is fitted per layer and per target."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from interventions.concepts.report import Probe, fit_probe
from interventions.maps.entities import EntityLatents, find_latents, mean_activation
from interventions.maps.mentions import surfaces
from interventions.maps.topics import TopicStatistics, dsg, farrell
from reproduce.unlearning import texts
from reproduce.unlearning.edits import Runs
from reproduce.unlearning.entities import QUESTIONS, Entity
from reproduce.unlearning.knowledge import Knowledge, key
from reproduce.unlearning.passes import Ids
from reproduce.unlearning.recall import Question, ask, question

TOP = 20
"""Known and unknown latents, each."""
CLAMPED = 10
"""Latents of a target."""
OUTLIER = 10.0
"""Tokens whose norm is above so many medians are left out of statistics."""
CLASSES = ("known", "unknown")


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the quick run differs in these alone."""

    targets_per_kind: int = 4
    others: int = 24
    other_texts: int = 12
    about_tokens: int = 40
    benign_tokens: int = 64
    mentions: int = 4


@dataclass
class Layer:
    """What is fitted at one SAE.

    Attributes:
        latents: the known and the unknown ones.
        mean_unknown: their mean activation over unknown entities, in the order of ``latents.all``.
        every, every_mean: all latents that fire on any fitting entity, and their mean over unknown ones.
        fires: bool ``[tokens, S]`` of the benign sequences, position 0 included.
        farrell, dsg: target → latents.
    """

    latents: EntityLatents
    mean_unknown: npt.NDArray[np.float64]
    every: tuple[int, ...]
    every_mean: npt.NDArray[np.float64]
    fires: npt.NDArray[np.bool_]
    farrell: Mapping[str, tuple[int, ...]]
    dsg: Mapping[str, tuple[int, ...]]


@dataclass
class Material:
    """Questions are the ones that the unedited model answers right in that very form.

    Attributes:
        knowledge: who is known.
        surfaces: target → token sequences of its name.
        asked: target → its questions as completions.
        chat: target → the same within a chat.
        others: questions about other known entities.
        beside: target → questions about others behind a sentence that mentions the target.
        neutral, other_texts: token ids, for perplexity.
        benign: sequences that mention no target, for gates.
        calibrated: which of them calibrate (the others are held out).
        padding: benign tokens for the dilution attack.
        contexts: entity key → token ids of :data:`texts.FRAMES`, the name's last token last.
        probes: layer → classifier of the residual stream at a name's last token.
        layers: SAE layer → what is fitted there.
    """

    knowledge: Knowledge
    surfaces: Mapping[str, tuple[tuple[int, ...], ...]]
    asked: Mapping[str, list[Question]]
    chat: Mapping[str, list[Question]]
    others: list[Question]
    beside: Mapping[str, list[Question]]
    neutral: list[tuple[int, ...]]
    other_texts: list[tuple[int, ...]]
    benign: list[tuple[int, ...]]
    calibrated: npt.NDArray[np.bool_]
    padding: list[int]
    contexts: Mapping[str, list[tuple[int, ...]]]
    probes: Mapping[int, Probe] = field(default_factory=dict)
    layers: Mapping[int, Layer] = field(default_factory=dict)


class Writer:
    """Questions and texts as token ids."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.encode = runs.passes.encode

    def dialogue(self, user: str, assistant: str, system: str = texts.SYSTEM) -> tuple[int, ...]:
        """A chat up to the end of what the assistant has said so far."""
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        head = self.runs.passes.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tuple(self.encode(head + assistant))

    def chat(self, entity: Entity, attribute: str, system: str = texts.SYSTEM) -> Question:
        """The question as a request to complete it, the assistant's answer begun."""
        plain = question(entity, attribute, self.encode)
        prompt = self.dialogue(f"Please complete this sentence: {plain.text}", plain.text, system)
        return Question(plain.entity, attribute, prompt, plain.answers, plain.text)

    def continued(self, prompts: Sequence[str], new: int, seed: int) -> list[tuple[int, ...]]:
        """Each prompt with the model's own sampled continuation."""
        ids = [self.encode(prompt) for prompt in prompts]
        made = self.runs.passes.generate(ids, new, temperature=0.8, seed=seed)
        return [(*head, *tail) for head, tail in zip(ids, made, strict=True)]

    def right(self, asked: Sequence[Question]) -> list[Question]:
        """Those that the unedited model answers right."""
        answered = ask(asked, self.runs.plain(), self.runs.passes)
        return [q for q, a in zip(asked, answered, strict=True) if a.right]


def gather(runs: Runs, knowledge: Knowledge, sizes: Sizes, seed: int = 0) -> Material:
    """Questions, texts and contexts."""
    writer, draw = Writer(runs), random.Random(seed)
    encode = writer.encode
    attributes = {key(e): [q.attribute for q in knowledge.right.get(key(e), [])] for e in _everyone(knowledge)}
    other_pairs = [(e, a) for e in knowledge.others for a in attributes[key(e)]]
    draw.shuffle(other_pairs)
    beside = {}
    for target in knowledge.targets:
        before = texts.MENTION.format(target.name)
        near_first = sorted(other_pairs, key=lambda pair: pair[0].kind != target.kind)
        asked = [question(e, a, encode, before) for e, a in near_first[: 3 * sizes.mentions]]
        beside[key(target)] = writer.right(asked)[: sizes.mentions]
    about_others = [texts.ABOUT[i % len(texts.ABOUT)].format(e.name) for i, e in enumerate(knowledge.others)]
    other_texts = writer.continued(about_others, sizes.about_tokens, seed)
    made = writer.continued(texts.BENIGN, sizes.benign_tokens, seed + 1)
    half = len(made) // 2
    asked_of_fit = [(e, a) for e in knowledge.fit_known for a in attributes[key(e)]]
    benign = [
        *made[:half],
        *(writer.dialogue(texts.BENIGN[i], runs.passes.tokenizer.decode(made[i])) for i in range(0, half, 2)),
        *(question(e, a, encode).prompt for e, a in asked_of_fit),
        *(writer.chat(e, a).prompt for e, a in asked_of_fit[::2]),
        *other_texts[sizes.other_texts :],
    ]
    order = list(range(len(benign)))
    draw.shuffle(order)
    calibrated = np.zeros(len(benign), np.bool_)
    calibrated[order[: (2 * len(order)) // 3]] = True
    names = [*_everyone(knowledge), *knowledge.fit_unknown, *knowledge.unknown]
    return Material(
        knowledge=knowledge,
        surfaces={key(t): surfaces([t.name], encode).sequences for t in knowledge.targets},
        asked={key(t): writer.right([question(t, a, encode) for a in attributes[key(t)]]) for t in knowledge.targets},
        chat={key(t): writer.right([writer.chat(t, a) for a in attributes[key(t)]]) for t in knowledge.targets},
        others=[question(e, a, encode) for e, a in other_pairs][: sizes.others],
        beside=beside,
        neutral=[tuple(encode(text)) for text in texts.NEUTRAL],
        other_texts=other_texts[: sizes.other_texts],
        benign=benign,
        calibrated=calibrated,
        padding=[token for text in made[half:] for token in (*text, *encode("\n\n"))],
        contexts={key(e): [tuple(encode(frame.format(e.name))) for frame in texts.FRAMES] for e in names},
    )


def fit(runs: Runs, material: Material, sizes: Sizes, seed: int = 0) -> None:
    """Probes, known and unknown latents, and each target's latents; into ``material``."""
    knowledge = material.knowledge
    sides = (knowledge.fit_known, knowledge.fit_unknown)
    flat = [material.contexts[key(e)] for side in sides for e in side]
    labels = torch.tensor([i for i, side in enumerate(sides) for e in side for _ in material.contexts[key(e)]])
    states = runs.passes.keep([c for contexts in flat for c in contexts], runs.kept)
    material.probes = {
        layer: fit_probe(torch.stack([s[layer][-1].float() for s in states]), labels, CLASSES)
        for layer in runs.kept[:-1]
    }
    about = {
        key(t): [
            *material.contexts[key(t)],
            *Writer(runs).continued([a.format(t.name) for a in texts.ABOUT], sizes.about_tokens, seed + 2),
        ]
        for t in knowledge.targets
    }
    plain = [s for s, yes in zip(material.benign, material.calibrated, strict=True) if yes]
    plain += [c for e in knowledge.fit_known for c in material.contexts[key(e)][:2]]
    plain += [c for e in knowledge.fit_unknown for c in material.contexts[key(e)][:2]]
    material.layers = {layer: _layer(runs, material, layer, about, plain) for layer in runs.layers}


def _layer(
    runs: Runs, material: Material, layer: int, about: Mapping[str, list[tuple[int, ...]]], plain: Sequence[Ids]
) -> Layer:
    knowledge, n = material.knowledge, runs.saes[layer].n_features
    z: list[dict[str, npt.NDArray[np.float32]]] = []
    for side in (knowledge.fit_known, knowledge.fit_unknown):
        of_kind: dict[str, list[Tensor]] = {}
        for entity in side:
            rows = runs.activations(layer, material.contexts[key(entity)])
            of_kind.setdefault(entity.kind, []).extend(a[-1] for a in rows)
        z.append({kind: torch.stack(rows).numpy() for kind, rows in of_kind.items()})
    retain = _statistics(runs, layer, plain, n)
    latents = find_latents(z[0], z[1], TOP, TOP, retain.frequency)
    unknown = np.concatenate(list(z[1].values()))
    ever = np.flatnonzero((np.concatenate([*z[0].values(), *z[1].values()]) > 0).any(axis=0))
    every = tuple(int(i) for i in ever)
    chosen = {name: _statistics(runs, layer, sequences, n) for name, sequences in about.items()}
    return Layer(
        latents=latents,
        mean_unknown=mean_activation(unknown, latents.all),
        every=every,
        every_mean=mean_activation(unknown, every),
        fires=np.concatenate([(a != 0).numpy() for a in runs.activations(layer, material.benign)]),
        farrell={name: farrell(s, retain, CLAMPED).latents for name, s in chosen.items()},
        dsg={name: dsg(s, retain, CLAMPED).latents for name, s in chosen.items()},
    )


def _statistics(runs: Runs, layer: int, sequences: Sequence[Ids], n: int) -> TopicStatistics:
    """Of all tokens but position 0 and outliers."""
    states = [s[layer].float() for s in runs.passes.keep(sequences, runs.kept)]
    rows = torch.cat([h[1:] for h in states])
    norm = rows.norm(dim=-1)
    kept = rows[norm <= OUTLIER * norm.median()]
    found = TopicStatistics.empty(n)
    for start in range(0, len(kept), 2048):
        found = found.add(runs.saes[layer].encode(kept[start : start + 2048]))
    return found


def _everyone(knowledge: Knowledge) -> list[Entity]:
    return [*knowledge.fit_known, *knowledge.targets, *knowledge.others]


def mentions_none(ids: Ids, sequences: Sequence[Ids]) -> bool:
    """Whether no sequence of ``sequences`` occurs in ``ids``."""
    return not any(tuple(ids[i : i + len(s)]) == tuple(s) for s in sequences for i in range(len(ids) - len(s) + 1))


__all__ = ["CLASSES", "QUESTIONS", "Layer", "Material", "Sizes", "Writer", "fit", "gather", "mentions_none"]
