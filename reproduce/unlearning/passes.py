"""Forward passes that stop at a layer, or go on from one, and remember what they computed.

Beside :class:`reproduce.model.Runner`, whose batches are fixed, these take any sequences: most edits leave most sequences as
they are, and only the others are passed again. Sequences are padded on the right, which a causal model does not see.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from reproduce.model import Runner

Ids = Sequence[int]
BATCH_TOKENS = 1536


class Passes:
    """The runner's model, layer by layer, in its dtype.

    Args:
        runner: a Llama-like model.
        tokenizer: its tokenizer.
    """

    def __init__(self, runner: Runner, tokenizer: Any) -> None:
        self.runner = runner
        self.model = runner.model
        self.tokenizer = tokenizer
        self.body = self.model.model
        self.layers = list(runner.layers)
        self.tokens = 0.0
        """Tokens passed so far, each counted by the share of the layers that were computed."""
        self._kept: dict[tuple[int, ...], dict[int, Tensor]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids, without special tokens."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def keep(self, sequences: Sequence[Ids], layers: Sequence[int]) -> list[dict[int, Tensor]]:
        """As :meth:`states`, each sequence computed once."""
        wanted = {tuple(s) for s in sequences}
        new = sorted(s for s in wanted if not set(layers) <= set(self._kept.get(s, {})))
        for sequence, state in zip(new, self.states(new, layers), strict=True):
            self._kept.setdefault(sequence, {}).update(state)
        return [self._kept[tuple(s)] for s in sequences]

    @property
    def last(self) -> int:
        """The last layer."""
        return len(self.layers) - 1

    @torch.no_grad()
    def states(self, sequences: Sequence[Ids], layers: Sequence[int]) -> list[dict[int, Tensor]]:
        """resid_post of ``layers`` for every sequence: per sequence layer → ``[n, d]``. Stops at the highest of them."""
        found: list[dict[int, Tensor]] = [{} for _ in sequences]
        for rows in batches([len(s) for s in sequences]):
            width = max(len(sequences[i]) for i in rows)
            ids = torch.tensor([[*sequences[i], *[0] * (width - len(sequences[i]))] for i in rows])
            h = self.body.embed_tokens(ids)
            start = 0
            for layer in sorted(layers):
                h = self._run(h, start, layer + 1)
                start = layer + 1
                for row, i in enumerate(rows):
                    found[i][layer] = h[row, : len(sequences[i])].clone()
        return found

    @torch.no_grad()
    def onward(self, states: Sequence[Tensor], layer: int, to: int | None = None) -> list[Tensor]:
        """From resid_post(``layer``) ``[n, d]`` of each sequence to that of ``to`` (the last layer by default)."""
        stop = self.last if to is None else to
        found: list[Tensor] = [torch.empty(0)] * len(states)
        for rows in batches([len(h) for h in states]):
            width = max(len(states[i]) for i in rows)
            h = torch.zeros(len(rows), width, states[rows[0]].shape[1], dtype=states[rows[0]].dtype)
            for row, i in enumerate(rows):
                h[row, : len(states[i])] = states[i]
            h = self._run(h, layer + 1, stop + 1)
            for row, i in enumerate(rows):
                found[i] = h[row, : len(states[i])].clone()
        return found

    def logits(self, h: Tensor) -> Tensor:
        """Next-token logits fp32 ``[n, vocab]`` for the last layer's output ``[n, d]``."""
        return self.runner.logits(h)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Ids], new: int, temperature: float = 0.0, seed: int = 0) -> list[list[int]]:
        """``new`` more tokens for each prompt, greedy or sampled; cut at the end-of-sequence token."""
        found: list[list[int]] = [[] for _ in prompts]
        by_length: dict[int, list[int]] = {}
        for i, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt), []).append(i)
        generator = torch.Generator().manual_seed(seed)
        for _, rows in sorted(by_length.items()):
            ids = torch.tensor([list(prompts[i]) for i in rows])
            cache = None
            for _ in range(new):
                out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = out.past_key_values
                self.tokens += ids.numel()
                scores = out.logits[:, -1].float()
                if temperature > 0:
                    ids = torch.multinomial((scores / temperature).softmax(-1), 1, generator=generator)
                else:
                    ids = scores.argmax(-1, keepdim=True)
                for row, i in enumerate(rows):
                    found[i].append(int(ids[row, 0]))
        stop = self.tokenizer.eos_token_id
        return [tokens[: tokens.index(stop)] if stop in tokens else tokens for tokens in found]

    def _run(self, h: Tensor, start: int, stop: int) -> Tensor:
        positions = torch.arange(h.shape[1])[None]
        turned = self.body.rotary_emb(h, position_ids=positions)
        for layer in self.layers[start:stop]:
            out = layer(h, attention_mask=None, position_ids=positions, position_embeddings=turned)
            h = out[0] if isinstance(out, tuple) else out
        self.tokens += h.shape[0] * h.shape[1] * (stop - start) / len(self.layers)
        return h


def batches(lengths: Sequence[int], limit: int = BATCH_TOKENS) -> Iterator[list[int]]:
    """Indices, similar lengths together, at most ``limit`` padded tokens (one sequence at least) in each batch."""
    rows: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if rows and lengths[i] * (len(rows) + 1) > limit:
            yield rows
            rows = []
        rows.append(i)
    if rows:
        yield rows
