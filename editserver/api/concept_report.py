"""What a fitted concept is worth, measured on held-out texts through the served engine.

Removal is read by a frozen probe: fitted on what a dictionary sees in the unedited training texts (per text the mean activation of
each latent), applied to what it sees in held-out texts, unedited and edited. The dictionary is the served one at the highest layer
above the edit, so that the model itself has worked with what was left; without one it is the concept's own, reading the edited
stream. Cost is read as the perplexity of the held-out texts themselves. The unedited passes carry an edit too, which rounds away:
an edited residual stream is rounded to bfloat16 once more than one that no edit touches, and that is no effect of the concept.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from editserver.api.concept_plan import Plan, Readings, patient_pass, trying
from editserver.api.evidence import Seen, read_all
from editserver.api.jobs import Job
from editserver.api.state import EditState
from editserver.catalogue import ServedSAE
from interventions.concepts.concept import Concept, Method
from interventions.concepts.fitting import Fit
from interventions.concepts.gain import apply
from interventions.concepts.report import Accuracy, Point, Probe, accuracy, attenuated_fraction, fit_probe
from interventions.errors import InterventionError

MIN_TEXTS = 2
"""Latents that fire in fewer training texts are no column of the probe."""
MAX_COLUMNS = 16_384
"""Columns of the probe at most: the latents that fire in the most training texts."""
DENSE_SHOWN = 20


def readout(state: EditState, sae: ServedSAE) -> tuple[ServedSAE, bool]:
    """The dictionary that the probe reads, and whether it is ``sae`` itself, read after the edit."""
    later = [other for other in state.catalogue.saes.values() if other.layer > sae.layer and state.encodes(other)]
    if not later:
        return sae, True
    # Of several at one layer the one with the most latents sees most.
    return max(later, key=lambda other: (other.layer, other.sae.approximates is None, other.sae.n_features)), False


def describe(state: EditState, plan: Plan, found: Fit) -> dict[str, Any]:
    """What the fit says about the latents and the texts."""
    concept, examples = found.concept, plan.examples
    labels = state.knowledge(plan.sae.id).labels
    rates = concept.firing_rate
    target = concept.classes.index(concept.target)
    order = sorted(range(len(concept.features)), key=lambda i: (-float(concept.scores[i]), i))
    features = [
        {
            "index": int(concept.features[i]),
            "label": labels.get(int(concept.features[i])),
            "score": float(concept.scores[i]),
            "separability": float(concept.separability[i]),
            "mean": float(concept.mean[target, i]),
            "rates": {name: float(rates[c, i]) for c, name in enumerate(concept.classes)},
        }
        for i in order
    ]
    rate = found.background_rate
    dense = sorted(found.dense, key=lambda index: -float(rate[index]))[:DENSE_SHOWN]
    held = [examples.labels[i] for i in examples.indices(True)]
    return {
        "sae": plan.sae.id,
        "layer": plan.sae.layer,
        "target": concept.target,
        "background": concept.background,
        "by": concept.by,
        "max_rate": concept.max_rate,
        "classes": {
            name: {"texts": examples.labels.count(c), "held_out": held.count(c), "tokens": int(concept.tokens[c])}
            for c, name in enumerate(concept.classes)
        },
        "layer_score": found.layer_score,
        "active_score": found.active_score,
        "features": features,
        "dense": {
            "left_out": concept.dense,
            "features": [{"index": i, "label": labels.get(i), "rate": float(rate[i])} for i in dense],
        },
    }


async def measure(state: EditState, plan: Plan, concept: Concept, readings: Readings, job: Job) -> dict[str, Any]:
    """Accuracy of the probe and perplexity on the held-out texts, plain and under each method."""
    held_out = HeldOut(state, plan, concept, readings)
    await asyncio.to_thread(held_out.prepare)
    view = trying(state, concept)
    done = len(plan.examples.prompts)
    for method, strength in plan.methods:
        edit = [{"type": "suppress", "concept": plan.name, "method": method, "strength": strength}]
        runs: list[_Edited] = []
        try:
            for i in held_out.texts:
                passes = await patient_pass(
                    view, plan.examples.prompts[i], edit, held_out.inspect, prompt_logprobs=held_out.told
                )
                logprobs = passes.prompt_logprobs[0] if held_out.told else None
                runs.append(_Edited(Seen.of(passes, 0, None), logprobs))
                done += 1
                job.advance(done, f"measuring {method} {strength:g}")
        except InterventionError as error:
            if error.code != "dose_exceeded":
                raise
            done += len(held_out.texts) - len(runs)
            held_out.refuse(method, strength, error)
            continue
        await asyncio.to_thread(held_out.note, method, strength, runs)
    return held_out.as_dict()


@dataclass(frozen=True)
class _Edited:
    readout: Seen
    logprobs: npt.NDArray[np.float64] | None


class HeldOut:
    """The held-out half of a report.

    Attributes:
        texts: indices of the held-out texts.
        inspect: what the edited passes read.
        told: whether perplexities can be had.
        points: by method and strength, as JSON.
    """

    def __init__(self, state: EditState, plan: Plan, concept: Concept, readings: Readings) -> None:
        self._plan, self._concept, self._readings = plan, concept, readings
        self._sae, self._after = plan.readout
        self.texts = plan.examples.indices(True)
        self.inspect = read_all(state, self._sae) | ({"after": True} if self._after else {})
        self.told = all(readings.texts[i].logprobs is not None for i in self.texts)
        self.points: list[dict[str, Any]] = []
        self._labels = torch.tensor([plan.examples.labels[i] for i in self.texts])

    def prepare(self) -> None:
        """Fit the probe, and read the unedited texts."""
        train = self._plan.examples.indices(False)
        rows = [self._pooled(self._readings.texts[i].readout, i) for i in train]
        n = self._sae.sae.n_features
        texts = np.zeros(n, np.int64)
        for features, _ in rows:
            texts[features] += 1
        order = np.lexsort((np.arange(n), -texts))[:MAX_COLUMNS]
        self._columns = np.sort(order[texts[order] >= MIN_TEXTS])
        labels = torch.tensor([self._plan.examples.labels[i] for i in train])
        self._probe: Probe = fit_probe(self._matrix(rows), labels, self._plan.examples.classes)
        self._before = self._accuracy([self._readings.texts[i].readout for i in self.texts])
        self._plain = self._perplexities([self._readings.texts[i].logprobs for i in self.texts])

    def note(self, method: Method, strength: float, runs: Sequence[_Edited]) -> None:
        """One more point."""
        after = self._accuracy([one.readout for one in runs])
        edited = self._perplexities([one.logprobs for one in runs])
        perplexity = {name: (self._plain[name], edited[name]) for name in edited}
        attenuated = self._attenuated(method, strength)
        self.points.append(Point(method, strength, self._before, after, perplexity, attenuated).as_dict())

    def refuse(self, method: Method, strength: float, error: InterventionError) -> None:
        """One that the server's dose limit does not let happen."""
        self.points.append({"method": method, "strength": strength, "refused": error.message})

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        before = self._before
        return {
            "readout": {
                "sae": self._sae.id,
                "layer": self._sae.layer,
                "after_edit_at_same_layer": self._after,
                "columns": len(self._columns),
            },
            "accuracy": {"target": before.target, "others": before.others, "by_class": dict(before.by_class)},
            "perplexity": self._plain or None,
            "points": self.points,
        }

    def _pooled(self, seen: Seen, text: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Latents that fire on the tokens that count, ascending, and their mean activation over them."""
        kept = self._readings.kept[text]
        inside = kept[seen.tokens]
        features, place = np.unique(seen.features[inside], return_inverse=True)
        means = np.bincount(place, seen.values[inside], len(features)) / max(1, int(kept.sum()))
        return features, means

    def _matrix(self, rows: Sequence[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]]) -> torch.Tensor:
        whole = np.zeros((len(rows), len(self._columns)))
        for row, (features, means) in zip(whole, rows, strict=True):
            at = np.searchsorted(self._columns, features)
            known = at < len(self._columns)
            known[known] = self._columns[at[known]] == features[known]
            row[at[known]] = means[known]
        return torch.from_numpy(whole)

    def _accuracy(self, seen: Sequence[Seen]) -> Accuracy:
        rows = [self._pooled(one, i) for one, i in zip(seen, self.texts, strict=True)]
        predicted = self._probe.predict(self._matrix(rows))
        return accuracy(predicted, self._labels, self._plan.examples.classes, self._concept.target)

    def _sets(self) -> Mapping[str, list[int]]:
        """Name of a text set → places in ``texts``: the target's, the background's, and all others."""
        concept, sets = self._concept, dict[str, list[int]]()
        for place, label in enumerate(self._labels.tolist()):
            name = concept.classes[label]
            kind = "target" if name == concept.target else "background" if name == concept.background else "other"
            sets.setdefault(kind, []).append(place)
        return sets

    def _perplexities(self, logprobs: Sequence[npt.NDArray[np.float64] | None]) -> dict[str, float]:
        """exp(mean −log p) over all tokens of each set; empty where the server has no log-probabilities."""
        if not self.told:
            return {}
        found = {}
        for name, places in self._sets().items():
            tokens = np.concatenate([one for place in places if (one := logprobs[place]) is not None])
            found[name] = min(math.exp(min(-float(tokens.mean()), 700.0)), 1e300)
        return found

    def _attenuated(self, method: Method, strength: float) -> dict[str, float]:
        """Share of the concept's activation that the method takes from each set: its transfer function on the plain readings."""
        transfer = self._concept.transfer(method)
        index = self._concept.features.numpy()
        found = {}
        for name, places in self._sets().items():
            rows = [self._dense(self.texts[place], index) for place in places]
            before = torch.from_numpy(np.concatenate(rows))
            found[name] = attenuated_fraction(before, apply(transfer, before, strength))
        return found

    def _dense(self, text: int, index: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """The concept's latents on the tokens of one text that count, ``[tokens, n]``."""
        seen, kept = self._readings.texts[text].seen, self._readings.kept[text]
        whole = np.zeros((len(kept), len(index)), np.float32)
        at = np.searchsorted(index, seen.features)
        known = at < len(index)
        known[known] = index[at[known]] == seen.features[known]
        whole[seen.tokens[known], at[known]] = seen.values[known]
        return whole[kept]
