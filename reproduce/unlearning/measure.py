"""What a cell does: recall, indistinguishability, collateral."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interventions.concepts.report import Probe
from interventions.fitting.separation import auroc
from interventions.maps.entities import auroc_edited
from reproduce.unlearning import texts
from reproduce.unlearning.cells import Cell, mapper
from reproduce.unlearning.edits import Mapper, Runs
from reproduce.unlearning.entities import Entity
from reproduce.unlearning.knowledge import key
from reproduce.unlearning.material import Material, Writer
from reproduce.unlearning.passes import Ids
from reproduce.unlearning.recall import Forward, Question, ask, question

CHAT = 2
"""Questions per target that are asked in a chat too."""


def measure(runs: Runs, material: Material, cell: Cell) -> dict[str, dict[str, float]]:
    """Metric → target → value."""
    rows = {key(t): _target(runs, material, cell, t) for t in material.knowledge.targets}
    metrics = sorted({metric for row in rows.values() for metric in row})
    return {metric: {name: row[metric] for name, row in rows.items() if metric in row} for metric in metrics}


def _target(runs: Runs, material: Material, cell: Cell, target: Entity) -> dict[str, float]:
    name = key(target)
    if cell.method == "prompt":
        return _prompt(runs, material, target)
    plain = runs.plain()
    made = None if cell.method == "none" else mapper(runs, material, cell, name)
    forward = plain if made is None else runs.edited(made)
    sets = {
        "recall": material.asked[name],
        "recall in a chat": material.chat[name][:CHAT],
        "others beside it": material.beside[name],
        "others": material.others,
    }
    found: dict[str, float] = {}
    for label, asked in sets.items():
        found |= _recall(label, asked, forward, runs)
    for label, sequences in (("neutral", material.neutral), ("other entities", material.other_texts)):
        found[f"perplexity {label}"] = _perplexity(sequences, forward, plain, runs)
    layers = runs.layers if made is None else [made.map.layer]
    for layer in layers:
        of = f" (layer {layer})" if made is None else ""
        own = plain_at(runs, layer) if made is None else runs.edited(made, layer)
        after = plain_at(runs, runs.next[layer]) if made is None else runs.edited(made, runs.next[layer])
        for where, at, run in (("own layer", layer, own), ("next SAE", runs.next[layer], after)):
            told = _told_apart(runs, material, target, at, run)
            found |= {f"{metric}, {where}{of}": value for metric, value in told.items()}
    if made is not None:
        found |= _effort(runs, made, material.asked[name])
    return found


def plain_at(runs: Runs, layer: int) -> Forward:
    """The unedited model up to ``layer``."""
    return runs.plain(layer)


def _recall(label: str, asked: Sequence[Question], forward: Forward, runs: Runs) -> dict[str, float]:
    if not asked:
        return {}
    answered = ask(asked, forward, runs.passes)
    return {
        label: sum(a.right for a in answered) / len(answered),
        f"{label}: first token": sum(a.probability for a in answered) / len(answered),
    }


def _perplexity(sequences: Sequence[Ids], forward: Forward, plain: Forward, runs: Runs) -> float:
    """Edited over unedited perplexity, less 1."""
    lengths = [len(s) for s in sequences]
    before, after = plain(sequences, lengths), forward(sequences, lengths)
    total = 0.0
    for ids, b, a in zip(sequences, before, after, strict=True):
        if a is not b:
            total += _nll(ids, a, runs) - _nll(ids, b, runs)
    return math.exp(total / sum(n - 1 for n in lengths)) - 1


def _nll(ids: Ids, last: Tensor, runs: Runs) -> float:
    logits = runs.passes.logits(last[:-1])
    chosen = logits.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
    return float((logits.logsumexp(dim=-1) - chosen).sum(dtype=torch.float64))


def knownness(probe: Probe, x: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """How much more known than unknown a residual stream ``[n, d]`` looks to the probe, ``[n]``."""
    score = (x.double() - probe.centre) / probe.scale @ probe.weight
    return (score[:, 0] - score[:, 1]).numpy()


def _at_name(run: Forward, contexts: Sequence[Ids]) -> Tensor:
    """Residual stream ``[n, d]`` at the last token of each context."""
    return torch.stack([h[-1].float() for h in run(contexts, [len(c) for c in contexts])])


def _told_apart(runs: Runs, material: Material, target: Entity, layer: int, run: Forward) -> dict[str, float]:
    """Target against the held-out unknown and known entities of its type, at the last token of the name."""
    plain = runs.plain(layer)
    kind = [e for e in material.knowledge.unknown if e.kind == target.kind]
    known = [e for e in material.knowledge.others if e.kind == target.kind]
    probe = material.probes[layer]
    x = _at_name(run, material.contexts[key(target)])
    before = _at_name(plain, material.contexts[key(target)])
    of = {
        n: [_at_name(plain, material.contexts[key(e)]) for e in es] for n, es in (("unknown", kind), ("known", known))
    }
    unknown = torch.cat(of["unknown"])
    edited = auroc_edited(knownness(probe, before), knownness(probe, x), knownness(probe, unknown))
    others = auroc(knownness(probe, torch.cat(of["known"])), knownness(probe, x)).value if known else math.nan
    found = {"AUROC against unknown": edited.after.value, "fresh probe": fresh_probe(x, torch.stack(of["unknown"]))}
    return found if math.isnan(others) else {**found, "AUROC of known against it": others}


def fresh_probe(x: Tensor, unknown: Tensor) -> float:
    """AUROC of a direction fitted on the target *as edited*: the difference of means, each context left out in turn.

    Args:
        x: the target's contexts ``[n, d]``.
        unknown: unknown entities' contexts, in the same order, ``[entities, n, d]``.
    """
    values = []
    for i in range(len(x)):
        rest = [j for j in range(len(x)) if j != i]
        direction = x[rest].mean(dim=0) - unknown[:, rest].mean(dim=(0, 1))
        values.append(auroc((x[i : i + 1] @ direction).numpy(), (unknown[:, i] @ direction).numpy()).value)
    return sum(values) / len(values)


def _effort(runs: Runs, made: Mapper, asked: Sequence[Question]) -> dict[str, float]:
    """Over the target's questions: how often anything changed, and the largest ‖Δh‖/‖h‖ of a token where it did."""
    states = runs.passes.keep([q.prompt for q in asked], runs.kept)
    done = [made(s[made.map.layer], q.prompt, len(q.prompt)) for s, q in zip(states, asked, strict=True)]
    doses = [e.dose for e in done if e.changed]
    found = {"edited questions": len(doses) / len(done)}
    return {**found, "dose": sum(doses) / len(doses)} if doses else found


def _prompt(runs: Runs, material: Material, target: Entity) -> dict[str, float]:
    """The prompt-only baseline: told to know nothing; no edit."""
    name, writer, plain = key(target), Writer(runs), runs.plain()
    told = texts.FORGET.format(target.name)
    before = told + "\n\n"
    everyone = {e.name: e for e in [*material.knowledge.others, target]}
    of: Mapping[str, list[Question]] = {
        "recall": [question(target, q.attribute, writer.encode, before) for q in material.asked[name]],
        "recall in a chat": [writer.chat(target, q.attribute, told) for q in material.chat[name][:CHAT]],
        "others": [question(everyone[q.entity], q.attribute, writer.encode, before) for q in material.others],
    }
    found: dict[str, float] = {}
    for label, asked in of.items():
        found |= _recall(label, asked, plain, runs)
    head = writer.encode(before)
    contexts = [[*head, *c] for c in material.contexts[name]]
    for layer in runs.layers:
        for where, at in (("own layer", layer), ("next SAE", runs.next[layer])):
            told_apart = _told_apart(runs, material, target, at, _instead(runs, at, contexts))
            found |= {f"{metric}, {where} (layer {layer})": value for metric, value in told_apart.items()}
    return found


def _instead(runs: Runs, layer: int, contexts: Sequence[Ids]) -> Forward:
    """The unedited model up to ``layer`` on ``contexts``, whatever it is asked for."""
    return lambda _sequences, lengths: runs.plain(layer)(contexts, lengths)
