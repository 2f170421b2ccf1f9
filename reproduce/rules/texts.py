"""Prompts with labelled words, and what the dictionary reads in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interventions.concepts.labelled import IGNORED, LabelledText
from interventions.rules.proposition import Readings
from reproduce.model import Runner, Started
from sae_weights.sae import SAE

OUTLIER = 10.0
"""Tokens whose ‖h‖ is more than this many times the median are nobody's example."""


@dataclass(frozen=True)
class Labelled:
    """A user's message.

    Attributes:
        text: the message.
        words: phrase → concept; every occurrence of a phrase in ``text`` is labelled at its last token.
        begun: how the assistant's turn begins.
    """

    text: str
    words: Mapping[str, str]
    begun: str = ""


@dataclass(frozen=True)
class Prompt:
    """What the model is fed.

    Attributes:
        ids: token ids, after the chat template.
        at: concept → positions at which it is labelled.
    """

    ids: tuple[int, ...]
    at: Mapping[str, tuple[int, ...]]


def prompt(tokenizer: Any, message: Labelled) -> Prompt:
    """``message`` behind the chat template, with the positions of its labelled words.

    Raises:
        ValueError: the message does not stand in what the template made of it.
    """
    turns = [{"role": "user", "content": message.text}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) + message.begun
    start = whole.rfind(message.text)
    if start < 0:
        raise ValueError("the chat template changes the message")
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    ends = np.array([end for _, end in encoded["offset_mapping"]])
    at: dict[str, list[int]] = {}
    for phrase, concept in message.words.items():
        for found in re.finditer(rf"(?<!\w){re.escape(phrase)}(?!\w)", message.text):
            at.setdefault(concept, []).append(int(np.searchsorted(ends, start + found.end())))
    return Prompt(tuple(encoded["input_ids"]), {name: tuple(sorted(where)) for name, where in at.items()})


@dataclass(frozen=True, eq=False)
class Read:
    """What a dictionary reads in one prompt: reading i is latent ``features[i]`` at position ``tokens[i]`` ≥ 1.

    Attributes:
        tokens, features: int64 ``[m]``.
        values: float32 ``[m]``.
        ordinary: bool ``[n − 1]``, of positions 1 …: not of extraordinary norm.
        mean: float32 ``[d]``, mean residual of positions 1 … that are ordinary.
    """

    tokens: np.ndarray
    features: np.ndarray
    values: np.ndarray
    ordinary: np.ndarray
    mean: np.ndarray

    def labelled(self, where: Sequence[int], positive: bool, whole: bool = False) -> LabelledText:
        """As an example of a concept: positive at the positions ``where``, or at every token with ``whole``."""
        labels = np.full(len(self.ordinary), int(whole and positive), np.int8)
        for position in where:
            labels[position - 1] = 1
        labels[~self.ordinary] = IGNORED
        return LabelledText(self.tokens - 1, self.features, self.values, labels, positive)


def read_all(runner: Runner, sae: SAE, layer: int, prompts: Sequence[Sequence[int]], batch: int = 8) -> list[Read]:
    """Everything that ``sae`` reads in ``prompts``."""
    found: dict[int, Read] = {}
    for started in runner.start(prompts, (layer,), batch):
        for i, h in residuals(started, layer):
            norm = h[1:].norm(dim=1)
            ordinary = norm <= OUTLIER * norm.median()
            acts = sae.encode(h[1:])
            tokens, features = acts.nonzero(as_tuple=True)
            found[i] = Read(
                tokens.numpy() + 1,
                features.numpy(),
                acts[tokens, features].numpy(),
                ordinary.numpy(),
                h[1:][ordinary].mean(dim=0).numpy(),
            )
    return [found[i] for i in range(len(prompts))]


def residuals(started: Started, layer: int) -> Iterator[tuple[int, Tensor]]:
    """Number of a sequence and its residual stream, fp32 ``[n, d]``."""
    for row, i in enumerate(started.tokens.index):
        yield i, started.resid[layer][row, : int(started.tokens.lengths[row])].float()


@torch.no_grad()
def readings(sae: SAE, sae_id: str, h: Tensor, features: Iterable[int]) -> Readings:
    """What rules read of the residual stream ``h`` fp32 ``[n, d]``: the row-wise path of the engine."""
    wanted = sorted(set(features))
    x, _ = sae.token_scale(h)
    acts = sae.rows(wanted).activations(x).numpy()
    return {(sae_id, feature): np.ascontiguousarray(acts[:, i]) for i, feature in enumerate(wanted)}
