"""From conclusions to answers: which way a word lies in the dictionary, and what the model says after a push that way."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reproduce.model import Edit, Runner, Started, Tokens, batches
from reproduce.rules.settings import EFFECT_LAYER, STRENGTH
from reproduce.rules.texts import Read
from sae_weights.sae import SAE

TOP = 10
"""Decoder rows of a direction, as published."""

Ways = Mapping[str, Tensor]
"""Conclusion → direction ``[d]``."""


def _sum_of_rows(sae: SAE, score: Tensor, even: bool = True) -> Tensor:
    """Σ w_i·d_i/‖d_i‖ over the ``TOP`` latents of largest score, w all the same or falling by rank (log decay)."""
    chosen = score.argsort(descending=True, stable=True)[:TOP].tolist()
    falling = 1 - torch.log(torch.arange(1, TOP + 1)) / np.log(TOP + 1)
    weight = torch.ones(TOP) if even else falling
    rows = torch.cat([sae.rows([feature]).decoder for feature in chosen])
    found: Tensor = (weight[:, None] * rows / rows.norm(dim=1, keepdim=True)).sum(dim=0)
    return found


@torch.no_grad()
def by_effect(runner: Runner, sae: SAE, words: Mapping[str, int], even: bool = True) -> dict[str, Tensor]:
    """Directions along the latents whose decoder rows, read by the unembedding, speak most for a word against the others.

    Args:
        words: conclusion → token that is to be said.
        even: give every row the same weight, else less by rank.
    """
    gain = runner.model.model.norm.weight.float()
    unembed = {name: runner.model.lm_head.weight[token].float() for name, token in words.items()}
    rows = sae.rows(range(sae.n_features)).decoder
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    found = {}
    for name in words:
        others = torch.stack([row for other, row in unembed.items() if other != name]).mean(dim=0)
        found[name] = _sum_of_rows(sae, rows @ (gain * (unembed[name] - others)), even)
    return found


def by_difference(sae: SAE, examples: Mapping[str, Sequence[Read]]) -> dict[str, Tensor]:
    """The same along the latents that are most active on the last token of a word's ``examples``, as published."""
    mean = {}
    for name, reads in examples.items():
        mean[name] = torch.zeros(sae.n_features)
        for read in reads:
            here = read.tokens == len(read.ordinary)
            mean[name][torch.from_numpy(read.features[here])] += torch.from_numpy(read.values[here]) / len(reads)
    found = {}
    for name, own in mean.items():
        others = torch.stack([one for other, one in mean.items() if other != name]).mean(dim=0)
        found[name] = _sum_of_rows(sae, own - others)
    return found


def push(ways: Ways, concluded: Mapping[int, frozenset[str]], strength: float = STRENGTH) -> Edit:
    """h + strength·‖h‖·v̂ for each conclusion, at the last token of the prompt: ``steer`` with mode ``normalized``.

    Args:
        concluded: number of a sequence → conclusions that act on it.
    """
    unit = {name: way / way.norm() for name, way in ways.items()}

    def edit(h: Tensor, tokens: Tokens) -> Tensor:
        delta = torch.zeros_like(h)
        for row, i in enumerate(tokens.index):
            last = int(tokens.lengths[row]) - 1
            for name in sorted(concluded.get(i, ())):
                delta[row, last] += strength * h[row, last].norm() * unit[name]
        return delta

    return edit


@dataclass(frozen=True)
class Said:
    """What the model says next, greedily.

    Attributes:
        token: of the whole vocabulary.
        choice: the likeliest of the words in question, by name.
    """

    token: int
    choice: str


def said(runner: Runner, started: Started, last: Tensor, words: Mapping[str, int]) -> dict[int, Said]:
    """Number of a sequence → what follows it."""
    ends, names = started.tokens.lengths - 1, list(words)
    logits = runner.logits(last[torch.arange(len(ends)), ends])
    few = logits[:, list(words.values())]
    return {
        i: Said(int(logits[row].argmax()), names[int(few[row].argmax())]) for row, i in enumerate(started.tokens.index)
    }


def steered(
    runner: Runner,
    started: Started,
    ways: Ways,
    words: Mapping[str, int],
    wanted: Mapping[int, Sequence[frozenset[str]]],
) -> dict[int, dict[frozenset[str], Said]]:
    """What the model says under each of the sets of conclusions that ``wanted`` lists for a sequence; none: unedited."""
    unedited = said(runner, started, started.last, words)
    found = {i: {frozenset[str](): unedited[i]} for i in started.tokens.index}
    rounds = {i: [one for one in dict.fromkeys(wanted.get(i, ())) if one] for i in started.tokens.index}
    for number in range(max(map(len, rounds.values()), default=0)):
        now = {i: sets[number] for i, sets in rounds.items() if number < len(sets)}
        spoken = said(runner, started, runner.edited(started, {EFFECT_LAYER: push(ways, now)}), words)
        for i, conclusions in now.items():
            found[i][conclusions] = spoken[i]
    return found


@torch.no_grad()
def think(runner: Runner, tokenizer: Any, prompts: Sequence[Sequence[int]], tokens: int, batch: int = 16) -> list[str]:
    """Greedy continuations of ``prompts``, at most ``tokens`` long."""
    found = [""] * len(prompts)
    end = tokenizer.eos_token_id
    for padded in batches(prompts, batch):
        flipped = torch.full_like(padded.ids, end)
        mask = torch.zeros_like(padded.ids)
        for row, length in enumerate(padded.lengths.tolist()):
            flipped[row, -length:] = padded.ids[row, :length]
            mask[row, -length:] = 1
        whole = runner.model.generate(
            flipped, attention_mask=mask, do_sample=False, max_new_tokens=tokens, pad_token_id=end
        )
        for i, row in zip(padded.index, whole[:, flipped.shape[1] :], strict=True):
            found[i] = tokenizer.decode(row, skip_special_tokens=True)
    return found


def verdict(text: str) -> bool | None:
    """The last True or False in an answer; ``None`` without one."""
    words = re.findall(r"\b(true|false)\b", text.lower())
    return words[-1] == "true" if words else None
