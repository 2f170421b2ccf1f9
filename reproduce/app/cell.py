"""One cell of the study: one labelled set, one seed, one target class; fit, then every edit on the same held-out texts."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interventions.concepts import gain
from interventions.concepts.concept import Concept, build_concept
from interventions.concepts.density import Densities, HistogramStream
from interventions.concepts.moments import Moments, MomentStream
from interventions.concepts.report import Accuracy, Probe, accuracy, fit_probe
from interventions.concepts.salient import MAX_RATE, By, select
from interventions.concepts.separability import layer_score, separability
from reproduce.app.data import Labelled
from reproduce.app.settings import SUFFIX, WINDOW, Settings, Trial
from reproduce.model import Edit, Runner, Started, Tokens, suppress_edit
from sae_weights.sae import SAE

NEUTRAL = Path(__file__).resolve().parents[2] / "tests" / "training" / "held_out.json"
"""Token ids of prose and of conversations that no bundled dictionary was trained on."""
BACKGROUND = "background"
_OUTLIER = 3.0
"""Tokens of more than this many median norms are not fitted on."""


@dataclass(frozen=True)
class Texts:
    """Token ids of a cell's texts, without the suffix.

    Attributes:
        fit: class → texts.
        held_out: (class, text); the target's first.
        background, neutral: pieces of neutral text.
    """

    fit: Mapping[str, list[list[int]]]
    held_out: list[tuple[str, list[int]]]
    background: list[list[int]]
    neutral: list[list[int]]


def draw(labelled: Labelled, texts: Mapping[str, Sequence[str]], seed: int, tokenizer: Any, sizes: Settings) -> Texts:
    """The texts of a cell: a draw without replacement, the same for the same seed."""
    chance = random.Random(f"{labelled.name}/{seed}")
    target = target_of(labelled, seed)
    fit: dict[str, list[list[int]]] = {}
    held_out: list[tuple[str, list[int]]] = []
    for name in sorted(labelled.classes, key=lambda c: (c != target, c)):
        shuffled = list(texts[name])
        chance.shuffle(shuffled)
        kept = sizes.target if name == target else sizes.others
        taken: list[list[int]] = []
        for text in shuffled:
            ids = tokenizer.encode(text)
            if 3 * len(ids) >= 2 * sizes.tokens:
                taken.append(ids[-sizes.tokens :] if labelled.end else ids[: sizes.tokens])
            if len(taken) == sizes.fit + kept:
                break
        else:
            raise ValueError(f"{labelled.name}: {len(taken)} texts of {name!r}; {sizes.fit + kept} are needed")
        fit[name] = taken[: sizes.fit]
        held_out += [(name, ids) for ids in taken[sizes.fit :]]
    background, neutral = _neutral(chance, sizes)
    return Texts({name: fit[name] for name in labelled.classes}, held_out, background, neutral)


def _neutral(chance: random.Random, sizes: Settings) -> tuple[list[list[int]], list[list[int]]]:
    """Pieces of the first half of the held-out windows of each kind, and of the second half: never the same document."""
    halves: tuple[list[list[int]], list[list[int]]] = ([], [])
    for windows in json.loads(NEUTRAL.read_text()).values():
        for i, ids in enumerate(windows):
            pieces = [ids[s : s + WINDOW] for s in range(0, len(ids) - WINDOW + 1, WINDOW)]
            halves[2 * i >= len(windows)].extend(pieces)
    return chance.sample(halves[0], sizes.background), chance.sample(halves[1], sizes.neutral)


def target_of(labelled: Labelled, seed: int) -> str:
    """The class that seed ``seed`` takes away."""
    return labelled.classes[seed % len(labelled.classes)]


@dataclass(frozen=True)
class Readout:
    """The next token after the suffix, read as a class: the word with the largest logit above its mean over the fitted texts."""

    words: tuple[int, ...]
    mean: Tensor

    def predict(self, logits: Tensor) -> Tensor:
        """Class index of each row of ``logits`` ``[n, k]``."""
        return (logits - self.mean).argmax(dim=1)


@dataclass(frozen=True)
class Measured:
    """What held-out texts say under one edit."""

    probe: Accuracy
    readout: Accuracy
    perplexity: Mapping[str, float]


def run_cell(
    runner: Runner,
    tokenizer: Any,
    saes: Mapping[int, SAE],
    labelled: Labelled,
    texts: Mapping[str, Sequence[str]],
    seed: int,
    sizes: Settings,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Fit and measure everything of one cell; JSON.

    Args:
        saes: layer → SAE; the main layer, and the side layers where they are wanted.
        progress: called with a few words before each step.
    """
    progress("fitting")
    target = target_of(labelled, seed)
    drawn = draw(labelled, texts, seed, tokenizer, sizes)
    suffix = tokenizer.encode(SUFFIX)
    words = tuple(tokenizer.encode(labelled.words[name])[0] for name in labelled.classes)
    fitted = _Fit(runner, saes, labelled.classes, drawn, suffix, words)
    layers = sorted(saes)
    labels = torch.tensor([labelled.classes.index(name) for name, _ in drawn.held_out])
    bench = _Bench(runner, fitted, labels, target, drawn, suffix, layers)
    before = bench.measure({})
    points, separable = [], {}
    for layer in layers:
        concepts: dict[tuple[By, int], Concept] = {}
        for trial in sizes.trials(layer):
            progress(f"layer {layer}, {trial.label}")
            key = (trial.by, trial.top)
            if key not in concepts:
                concepts[key] = fitted.concept(layer, target, *key)
            edit = _edit(saes[layer], concepts[key], trial)
            point = {"layer": layer, **_plain(trial), "label": trial.label}
            points.append(point | _measured(bench.measure({layer: edit})))
        separable[str(layer)] = fitted.separability(layer, concepts)
    return {
        "set": labelled.name,
        "seed": seed,
        "target": target,
        "classes": list(labelled.classes),
        "before": _measured(before),
        "separability": separable,
        "points": points,
    }


class _Fit:
    """What the fitted texts say: statistics of the latents of every layer, the probe and the readout."""

    def __init__(
        self,
        runner: Runner,
        saes: Mapping[int, SAE],
        classes: tuple[str, ...],
        texts: Texts,
        suffix: list[int],
        words: tuple[int, ...],
    ) -> None:
        self.saes, self.classes = saes, classes
        names = (*classes, BACKGROUND)
        sequences = [(c, ids + suffix) for c, name in enumerate(classes) for ids in texts.fit[name]]
        pooled, logits = (
            torch.zeros(len(sequences), runner.model.config.hidden_size),
            torch.zeros(len(sequences), len(words)),
        )
        labels = torch.tensor([c for c, _ in sequences])
        tokens: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in saes}
        for started in runner.start([ids for _, ids in sequences], saes):
            index = list(started.tokens.index)
            pooled[index] = pool(started.last, started, len(suffix))
            logits[index] = runner.logits(final(started.last, started), words)
            _collect(tokens, started, labels[index], len(suffix))
        for started in runner.start(texts.background, saes):
            _collect(tokens, started, torch.full((len(started.tokens.index),), len(classes)), 0)
        self.probe: Probe = fit_probe(pooled, labels, classes)
        self.readout = Readout(words, torch.stack([logits[labels == c].mean(0) for c in range(len(classes))]).mean(0))
        self._latents = {layer: _latents(saes[layer], tokens[layer], names) for layer in saes}

    def concept(self, layer: int, target: str, by: By, top: int) -> Concept:
        """The ``top`` latents of ``target`` and their tables, as the library's concepts have them."""
        moments, densities = self._latents[layer]
        rate = None if by == "mean" else MAX_RATE
        chosen = select(moments, target, by=by, top=top, background=BACKGROUND, max_rate=rate)
        few = densities.select(torch.tensor(chosen.features)).spread()
        sae = self.saes[layer]
        return build_concept(
            moments,
            few,
            chosen,
            target,
            sae_digest=sae.digest,
            layer=layer,
            model="smollm2-135m-instruct",
            background=BACKGROUND,
        )

    def separability(self, layer: int, concepts: Mapping[tuple[By, int], Concept]) -> dict[str, float]:
        """S_l over all latents, over those that fire, and over each selection (classes only, no background)."""
        _, densities = self._latents[layer]
        k = len(self.classes)
        of_classes = Densities(
            self.classes,
            densities.edges,
            densities.tokens[:k],
            densities.firing[:k],
            densities.counts[:k],
            densities.smoothing,
        )
        distances = separability(of_classes)
        active = of_classes.firing.sum(dim=0) > 0
        found = {"all": layer_score(distances), "active": layer_score(distances[active])}
        for (by, top), concept in concepts.items():
            found[f"{by}, top {top}"] = layer_score(distances[concept.features])
        return found


def _collect(tokens: dict[int, list[tuple[Tensor, Tensor]]], started: Started, labels: Tensor, tail: int) -> None:
    for layer, kept in tokens.items():
        h = started.resid[layer].float()
        mask = _body(started, tail)
        norm = h.norm(dim=-1)
        mask = mask & (norm <= _OUTLIER * norm[mask].median())
        kept.append((h[mask], labels[:, None].expand(mask.shape)[mask]))


def _latents(sae: SAE, tokens: Sequence[tuple[Tensor, Tensor]], names: tuple[str, ...]) -> tuple[Moments, Densities]:
    moments = MomentStream(names, sae.n_features)
    encoded = [(sae.encode(h), labels) for h, labels in tokens]
    for a, labels in encoded:
        moments.add(a, labels)
    found = moments.moments()
    histogram = HistogramStream(names, found.edges())
    for a, labels in encoded:
        histogram.add(a, labels)
    return found, histogram.densities()


class _Bench:
    """Held-out texts after their unedited pass, and what is read off them under an edit."""

    def __init__(
        self,
        runner: Runner,
        fitted: _Fit,
        labels: Tensor,
        target: str,
        texts: Texts,
        suffix: list[int],
        layers: Sequence[int],
    ) -> None:
        self.runner, self.fitted, self.labels, self.target, self.tail = runner, fitted, labels, target, len(suffix)
        self.other = [name != target for name, _ in texts.held_out]
        self.labelled = list(runner.start([ids + suffix for _, ids in texts.held_out], layers))
        self.neutral = list(runner.start(texts.neutral, layers))

    def measure(self, edits: Mapping[int, Edit]) -> Measured:
        """Everything under ``edits``."""
        n = len(self.labels)
        by_probe, by_word = torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)
        surprise: dict[str, list[Tensor]] = {"others": [], "neutral": []}
        for started in self.labelled:
            last = self.runner.edited(started, edits)
            index = list(started.tokens.index)
            by_probe[index] = self.fitted.probe.predict(pool(last, started, self.tail))
            words = self.runner.logits(final(last, started), self.fitted.readout.words)
            by_word[index] = self.fitted.readout.predict(words)
            rows = [row for row, i in enumerate(index) if self.other[i]]
            if rows:
                tokens = Tokens(started.tokens.ids[rows], started.tokens.mask[rows], tuple(index[r] for r in rows))
                counted = tokens.targets & (torch.arange(tokens.ids.shape[1])[1:] < tokens.lengths[:, None] - self.tail)
                surprise["others"].append(self.runner.log_probs(last[rows], tokens)[counted])
        for started in self.neutral:
            last = self.runner.edited(started, edits)
            surprise["neutral"].append(self.runner.log_probs(last, started.tokens)[started.tokens.targets])
        classes = self.fitted.classes
        return Measured(
            accuracy(by_probe, self.labels, classes, self.target),
            accuracy(by_word, self.labels, classes, self.target),
            {name: math.exp(-float(torch.cat(found).double().mean())) for name, found in surprise.items()},
        )


def pool(last: Tensor, started: Started, tail: int) -> Tensor:
    """Mean residual of each text's tokens ``[b, d]``, without position 0 and the last ``tail``."""
    mask = _body(started, tail)[..., None]
    return torch.where(mask, last.float(), 0.0).sum(dim=1) / mask.sum(dim=1)


def final(last: Tensor, started: Started) -> Tensor:
    """Residual of each text's last token ``[b, d]``."""
    return last[torch.arange(len(last)), started.tokens.lengths - 1]


def _body(started: Started, tail: int) -> Tensor:
    place = torch.arange(started.tokens.ids.shape[1])
    return started.tokens.evidence & (place < started.tokens.lengths[:, None] - tail)


def _edit(sae: SAE, concept: Concept, trial: Trial) -> Edit:
    transfer: gain.Transfer = concept.transfer(trial.method, trial.tau)
    return suppress_edit(sae, concept.features.tolist(), transfer, trial.strength)


def _plain(trial: Trial) -> dict[str, Any]:
    return {name: None if value == math.inf else value for name, value in asdict(trial).items()}


def _measured(found: Measured) -> dict[str, Any]:
    read = {
        name: {"target": a.target, "others": a.others}
        for name, a in (("probe", found.probe), ("readout", found.readout))
    }
    return {**read, "perplexity": dict(found.perplexity)}
