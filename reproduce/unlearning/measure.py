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


Rows = dict[str, dict[str, float]]
"""Metric → target → value."""


def measure(runs: Runs, material: Material, cell: Cell) -> Rows:
    """All metrics of one cell, the targets in one batch."""
    if cell.method == "prompt":
        rows = {key(t): _prompt(runs, material, t) for t in material.knowledge.targets}
        metrics = sorted({metric for row in rows.values() for metric in row})
        return {metric: {name: row[metric] for name, row in rows.items() if metric in row} for metric in metrics}
    targets = material.knowledge.targets
    names = [key(t) for t in targets]
    plain = runs.plain()
    made = None if cell.method == "none" else [mapper(runs, material, cell, name) for name in names]
    forward = plain if made is None else runs.edited(made)
    found: Rows = {}
    for label, sets in (
        ("recall", [material.asked[n] for n in names]),
        ("recall in a chat", [material.chat[n][:CHAT] for n in names]),
        ("others beside it", [material.beside[n] for n in names]),
        ("others", [material.others for _ in names]),
    ):
        owners = [i for i, asked in enumerate(sets) for _ in asked]
        answered = ask([q for asked in sets for q in asked], forward, runs.passes, owners)
        for i, name in enumerate(names):
            own = [a for a, o in zip(answered, owners, strict=True) if o == i]
            if own:
                found.setdefault(label, {})[name] = sum(a.right for a in own) / len(own)
                found.setdefault(f"{label}: first token", {})[name] = sum(a.probability for a in own) / len(own)
    for label, sequences in (("neutral", material.neutral), ("other entities", material.other_texts)):
        values = _perplexities(sequences, len(names), forward, plain, runs)
        found[f"perplexity {label}"] = dict(zip(names, values, strict=True))
    for layer in runs.layers if made is None else [cell.layer]:
        of = f" (layer {layer})" if made is None else ""
        for where, at in (("own layer", layer), ("next SAE", runs.next[layer])):
            run = runs.plain(at) if made is None else runs.edited(made, at)
            owners = [i for i, n in enumerate(names) for _ in material.contexts[n]]
            x = _at_name(run, [c for n in names for c in material.contexts[n]], owners)
            for i, target in enumerate(targets):
                own_x = x[[o == i for o in owners]]
                for metric, value in _told_apart(runs, material, target, at, own_x).items():
                    found.setdefault(f"{metric}, {where}{of}", {})[names[i]] = value
    for name, mine in zip(names, made or [], strict=False):
        for metric, value in _effort(runs, mine, material.asked[name]).items():
            found.setdefault(metric, {})[name] = value
    return found


def _recall(label: str, asked: Sequence[Question], forward: Forward, runs: Runs) -> dict[str, float]:
    if not asked:
        return {}
    answered = ask(asked, forward, runs.passes)
    return {
        label: sum(a.right for a in answered) / len(answered),
        f"{label}: first token": sum(a.probability for a in answered) / len(answered),
    }


def _perplexities(sequences: Sequence[Ids], times: int, forward: Forward, plain: Forward, runs: Runs) -> list[float]:
    """Edited over unedited perplexity, less 1, for each of ``times`` owners."""
    lengths = [len(s) for s in sequences]
    before = plain(sequences, lengths)
    owners = [i for i in range(times) for _ in sequences]
    after = forward(list(sequences) * times, lengths * times, owners)
    unedited = {}
    total = [0.0] * times
    for j, (owner, a) in enumerate(zip(owners, after, strict=True)):
        i = j % len(sequences)
        if a is not before[i]:
            if i not in unedited:
                unedited[i] = _nll(sequences[i], before[i], runs)
            total[owner] += _nll(sequences[i], a, runs) - unedited[i]
    return [math.exp(t / sum(n - 1 for n in lengths)) - 1 for t in total]


def _nll(ids: Ids, last: Tensor, runs: Runs) -> float:
    logits = runs.passes.logits(last[:-1])
    chosen = logits.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
    return float((logits.logsumexp(dim=-1) - chosen).sum(dtype=torch.float64))


def knownness(probe: Probe, x: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """How much more known than unknown a residual stream ``[n, d]`` looks to the probe, ``[n]``."""
    score = (x.double() - probe.centre) / probe.scale @ probe.weight
    return (score[:, 0] - score[:, 1]).numpy()


def _at_name(run: Forward, contexts: Sequence[Ids], owners: Sequence[int] = ()) -> Tensor:
    """Residual stream ``[n, d]`` at the last token of each context."""
    return torch.stack([h[-1].float() for h in run(contexts, [len(c) for c in contexts], owners)])


def _told_apart(runs: Runs, material: Material, target: Entity, layer: int, x: Tensor) -> dict[str, float]:
    """The target, ``x [n, d]`` at the last token of its name, against held-out unknown and known entities of its type."""
    plain = runs.plain(layer)
    kind = [e for e in material.knowledge.unknown if e.kind == target.kind]
    known = [e for e in material.knowledge.others if e.kind == target.kind]
    probe = material.probes[layer]
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
    prompts = [q.prompt for q in asked]
    done = made([s[made.map.layer] for s in states], prompts, [len(p) for p in prompts])
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
            told_apart = _told_apart(runs, material, target, at, _at_name(runs.plain(at), contexts))
            found |= {f"{metric}, {where} (layer {layer})": value for metric, value in told_apart.items()}
    return found
