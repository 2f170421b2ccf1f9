"""The residual stream of texts, one row per text: what a vector is fitted to.

``resid_post(L)`` is the output of decoder layer L of a ``transformers`` model. Position 0 (the attention sink) and massive
tokens, ‖h‖ > 10 × median, never count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from interventions.fitting.pairs import Encoded, PairsError, Passage
from interventions.wording import show
from sae_weights.training.activations import OUTLIER, decoder_layers

Pool = Literal["last", "mean"]

BATCH_TOKENS = 4096
"""Tokens of one forward pass, padding included."""
CALIBRATION = 64
"""Texts from which the median norm is taken."""


@contextmanager
def residuals(model: Any, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """While open, every forward pass leaves ``resid_post`` of ``layers`` here: layer → ``[batch, tokens, d_model]``."""
    seen: dict[int, Tensor] = {}
    modules = decoder_layers(model)

    def note(layer: int) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            seen[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [modules[layer].register_forward_hook(note(layer)) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Pooled:
    """Activations of n texts.

    Attributes:
        values: layer → float32 ``[n, d_model]``.
        dropped: layer → tokens that were left out as massive.
    """

    values: Mapping[int, Tensor]
    dropped: Mapping[int, int]


class Reader:
    """Reads texts with a model, without editing it.

    Args:
        model: a ``transformers`` causal LM.
        tokenizer: its tokenizer.
        layers: decoder layers (0-based) to read.
    """

    def __init__(self, model: Any, tokenizer: Any, layers: Sequence[int]) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.layers = list(layers)

    def median_norms(
        self, passages: Sequence[Passage], report: Callable[[int, int], None] = lambda done, total: None
    ) -> dict[int, float]:
        """Layer → median ‖h‖ over the first ``CALIBRATION`` texts' tokens, prompts included, without position 0."""
        norms: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}
        for _, lengths, states in self._passes(self._encode(passages[:CALIBRATION]), report):
            for layer, h in states.items():
                norms[layer] += [row[1:length].norm(dim=-1) for row, length in zip(h, lengths, strict=True)]
        medians = {layer: torch.cat(parts) for layer, parts in norms.items()}
        if any(not len(norm) for norm in medians.values()):
            raise PairsError("every text is a single token, and position 0 never counts; use longer texts")
        return {layer: float(norm.median()) for layer, norm in medians.items()}

    def pool(
        self,
        passages: Sequence[Passage],
        pool: Pool,
        median_norms: Mapping[int, float],
        report: Callable[[int, int], None] = lambda done, total: None,
    ) -> Pooled:
        """One row per text: the mean of h over the tokens that count, or h at the last of them.

        What counts: :class:`~interventions.fitting.pairs.Passage`, without position 0 and massive tokens.

        Raises:
            PairsError: a text of which nothing counts, or one longer than the model can read.
        """
        encoded = self._encode(passages)
        rows: dict[int, list[Tensor | None]] = {layer: [None] * len(encoded) for layer in self.layers}
        dropped = dict.fromkeys(self.layers, 0)
        for members, lengths, states in self._passes(encoded, report):
            for layer, h in states.items():
                for row, length, i in zip(h, lengths, members, strict=True):
                    counted = row[max(1, encoded[i].start) : length]
                    ordinary = counted.norm(dim=-1) <= OUTLIER * median_norms[layer]
                    dropped[layer] += int((~ordinary).sum())
                    kept = counted[ordinary]
                    if not len(kept):
                        text = show(passages[i].text or str(passages[i].prompt))
                        raise PairsError(f"no token of {text} counts: position 0 never does; use a longer text")
                    rows[layer][i] = kept[-1] if pool == "last" else kept.mean(dim=0)
        values = {layer: torch.stack([row for row in found if row is not None]) for layer, found in rows.items()}
        return Pooled(values, dropped)

    def _encode(self, passages: Sequence[Passage]) -> list[Encoded]:
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        encoded = [passage.encode(self.tokenizer) for passage in passages]
        for passage, one in zip(passages, encoded, strict=True):
            if longest is not None and len(one.token_ids) > longest:
                text = show(passage.text or str(passage.prompt))
                raise PairsError(f"{text} has {len(one.token_ids)} tokens; the model reads at most {longest}")
        return encoded

    @torch.inference_mode()
    def _passes(
        self, encoded: Sequence[Encoded], report: Callable[[int, int], None]
    ) -> Iterator[tuple[list[int], list[int], dict[int, Tensor]]]:
        """Batches of similar length: ``(indices of the texts, their lengths, layer → fp32 states on the CPU)``."""
        done = 0
        with residuals(self.model, self.layers) as seen:
            for members in _batches([len(one.token_ids) for one in encoded]):
                part = [encoded[i].token_ids for i in members]
                width = max(map(len, part))
                ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in part], device=self.model.device)
                mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in part], device=ids.device)
                self.model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
                yield members, [len(row) for row in part], {layer: h.float().cpu() for layer, h in seen.items()}
                done += len(members)
                report(done, len(encoded))


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices by rising length, in batches of at most ``BATCH_TOKENS`` tokens with padding (one text at least)."""
    members: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if members and (len(members) + 1) * lengths[i] > BATCH_TOKENS:
            yield members
            members = []
        members.append(i)
    if members:
        yield members
