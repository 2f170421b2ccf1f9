"""What fitting a map asks a running server: token ids, activations, log-probabilities, answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from interventions.maps.reading import FitError, Reading
from interventions.wording import choices, nearest, show

if TYPE_CHECKING:
    from editserver_client import Client
    from editserver_client.catalogue import SAEInfo

Text = Any
"""A string, or a chat as a list of messages."""
Stage = Callable[[str], Callable[[int, int], None]]

_TOKENS = 4096
"""Prompt tokens of one request: enough to keep the engine busy, few enough to see progress."""
_ASKED = 16
"""Questions that are asked at once."""


@contextmanager
def stages(console: Console) -> Iterator[Stage]:
    """A progress bar per named stage: ``stage("reading")(done, total)``."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        tasks: dict[str, Any] = {}

        def stage(name: str) -> Callable[[int, int], None]:
            def report(done: int, total: int) -> None:
                if name not in tasks:
                    tasks[name] = progress.add_task(name, total=total)
                progress.update(tasks[name], completed=done, total=total)

            return report

        yield stage


def format_of(text: Text) -> str:
    """ "chat" or "text"."""
    return "text" if isinstance(text, str) else "chat"


@dataclass(frozen=True)
class Prompt:
    """A text as the model gets it."""

    token_ids: tuple[int, ...]
    format: str


@dataclass(frozen=True)
class Edit:
    """A stored map at a strength."""

    map: str
    strength: float


@dataclass(frozen=True, eq=False)
class Pass:
    """One prompt's forward pass.

    Attributes:
        readings: SAE id → what it saw.
        losses: nats per token, of every token but the first; empty unless asked for.
        edited: tokens that the edit changed.
    """

    readings: Mapping[str, Reading]
    losses: tuple[float, ...]
    edited: int


class Engine:
    """A running server, and the dictionary of it that a map is fitted on.

    Raises:
        FitError: no such dictionary, or one that cannot report all of its activations.
    """

    def __init__(self, client: Client, sae: str | None, stage: Stage) -> None:
        self.client, self._stage = client, stage
        self.capabilities = client.capabilities()
        self.saes: list[SAEInfo] = client.saes()
        self.sae = self._choose(sae)
        self.top_k = min(int(self.capabilities.limits.get("top_k", 128)), self.sae.n_features)
        self.truncated = 0
        self._encoded: dict[str, list[int]] = {}

    def _choose(self, given: str | None) -> SAEInfo:
        if given is None and len(self.saes) != 1:
            raise FitError(f"--sae ID: say which dictionary the map is for; the server has {choices(self._ids())}")
        for sae in self.saes:
            if given in (None, sae.id):
                return sae
        raise FitError(
            f"--sae {given}: the server has no such dictionary; it has {choices(self._ids())}."
            f"{nearest(str(given), self._ids())}"
        )

    def _ids(self) -> list[str]:
        return [sae.id for sae in self.saes]

    def later(self) -> SAEInfo | None:
        """The served dictionary of the latest layer behind the map's, if there is one."""
        behind = [sae for sae in self.saes if sae.layer > self.sae.layer]
        return max(behind, key=lambda sae: sae.layer, default=None)

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        if text not in self._encoded:
            self._encoded[text] = self.client.tokenize(text, add_special_tokens=False).tokens
        return self._encoded[text]

    def prompts(self, texts: Sequence[Text], longest: int, option: str) -> list[Prompt]:
        """Texts and chats as token ids, at most ``longest`` of each.

        Raises:
            FitError: a text of fewer than two tokens.
        """
        report, found = self._stage(f"{option}: tokens"), []
        for i, text in enumerate(texts, 1):
            ids = tuple(self.client.tokenize(text).tokens[:longest])
            if len(ids) < 2:
                raise FitError(f"{option}: text {i} ({show(text)}) has one token; the first one is never read")
            found.append(Prompt(ids, format_of(text)))
            report(i, len(texts))
        return found

    def run(
        self,
        prompts: Sequence[Prompt],
        title: str,
        *,
        saes: Sequence[str] = (),
        losses: bool = False,
        edit: Edit | None = None,
        tokens: str = "prompt",
    ) -> list[Pass]:
        """One forward pass over each prompt; activations of ``tokens`` are read, behind the edit if there is one."""
        report, done = self._stage(title), 0
        passes: list[Pass] = []
        for batch in _batches(prompts):
            fields: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0}
            if losses:
                fields["prompt_logprobs"] = 0
            if saes:
                fields["inspect"] = [
                    {"sae": sae, "tokens": tokens, "top_k": self.top_k, "after": edit is not None} for sae in saes
                ]
            if edit is not None:
                fields["interventions"] = [{"type": "remap", "map": edit.map, "strength": edit.strength}]
            answer = self.client.complete([list(prompt.token_ids) for prompt in batch], **fields)
            single = len(answer.choices) == 1
            for prompt, choice in zip(batch, sorted(answer.choices, key=lambda c: c.index), strict=True):
                inspections = choice.inspection or (answer.inspection if single else None) or []
                receipt = choice.interventions or (answer.interventions if single else None)
                readings = {
                    one.sae: self._reading(prompt, one.tokens)
                    for one in (inspections if isinstance(inspections, list) else [inspections])
                }
                fired = receipt.receipt[0].fired if receipt is not None else 0
                nats = _losses(prompt, (choice.model_extra or {}).get("prompt_logprobs")) if losses else ()
                passes.append(Pass(readings, nats, fired if isinstance(fired, int) else 0))
            done += len(batch)
            report(done, len(prompts))
        return passes

    def _reading(self, prompt: Prompt, tokens: Sequence[Any]) -> Reading:
        positions, latents, values = [], [], []
        for token in tokens:
            self.truncated += len(token.features) >= self.top_k < self.sae.n_features
            for feature in token.features:
                if token.position > 0 and feature.activation != 0:
                    positions.append(token.position)
                    latents.append(feature.index)
                    values.append(feature.activation)
        columns = np.array(positions, np.int64), np.array(latents, np.int64), np.array(values, np.float32)
        return Reading(prompt.token_ids, *columns)

    def answers(self, questions: Sequence[str], title: str, max_tokens: int, edit: Edit | None = None) -> list[str]:
        """Greedy answers of the chat model."""
        report, found = self._stage(title), []
        extra: dict[str, Any] = {}
        if edit is not None:
            extra["interventions"] = [{"type": "remap", "map": edit.map, "strength": edit.strength}]

        def ask(question: str) -> str:
            return self.client.chat(question, temperature=0.0, max_tokens=max_tokens, **extra).text

        with ThreadPoolExecutor(_ASKED) as pool:
            for i, answer in enumerate(pool.map(ask, questions), 1):
                found.append(answer)
                report(i, len(questions))
        return found


def _batches(prompts: Sequence[Prompt]) -> Iterator[list[Prompt]]:
    batch: list[Prompt] = []
    for prompt in prompts:
        if batch and sum(len(p.token_ids) for p in (*batch, prompt)) > _TOKENS:
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch


def _losses(prompt: Prompt, logprobs: Any) -> tuple[float, ...]:
    if not isinstance(logprobs, list) or len(logprobs) != len(prompt.token_ids):
        raise FitError("the server gave no log-probabilities of the prompt (prompt_logprobs): perplexity needs them")
    pairs = zip(prompt.token_ids[1:], logprobs[1:], strict=True)
    return tuple(-float(entry[str(token)]["logprob"]) for token, entry in pairs)
