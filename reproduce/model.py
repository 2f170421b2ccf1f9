"""The bundled model, batched, with edits of its residual stream.

A study asks the same texts many questions: one unedited pass, then dozens of edits at one layer. So :meth:`Runner.start` runs
the texts once and keeps the residual stream at the layers that will be edited, and :meth:`Runner.edited` continues from there:
only the layers above are computed again, for each edit.

Texts lie right-padded in a batch. The model is causal, so padding never reaches a real token, and no mask is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interventions.concepts import gain
from interventions.maps import transfer as remap
from sae_weights.feature_rows import FeatureRows
from sae_weights.sae import SAE


@dataclass(frozen=True, eq=False)
class Tokens:
    """A batch of token sequences, right-padded.

    Attributes:
        ids: int64 ``[b, t]``; padding repeats token 0 of the vocabulary.
        mask: bool ``[b, t]``, True on real tokens.
        index: place of each sequence in the list that was given, b of them.
    """

    ids: Tensor
    mask: Tensor
    index: tuple[int, ...]

    @property
    def lengths(self) -> Tensor:
        """int64 ``[b]``."""
        return self.mask.sum(dim=1)

    @property
    def evidence(self) -> Tensor:
        """bool ``[b, t]``: real tokens but position 0, whose residual norm is two orders larger than any other's."""
        kept = self.mask.clone()
        kept[:, 0] = False
        return kept

    @property
    def targets(self) -> Tensor:
        """bool ``[b, t − 1]``: places of :meth:`Runner.log_probs` that predict a real token."""
        return self.mask[:, 1:]


Edit = Callable[[Tensor, Tokens], Tensor]
"""``edit(h, tokens)``: from the fp32 residual stream ``[b, t, d]`` to what is added to it, ``[b, t, d]``.

A pure function. What it returns at padding and at position 0 is ignored."""


@dataclass(frozen=True, eq=False)
class Started:
    """Texts after their unedited pass.

    Attributes:
        tokens: the batch.
        resid: layer → resid_post ``[b, t, d]`` in the model's dtype, for the layers that were asked for.
        last: resid_post of the last layer ``[b, t, d]``, before the final norm.
        inputs: what decoder layers take beside the residual stream (positions and their embeddings).
    """

    tokens: Tokens
    resid: Mapping[int, Tensor]
    last: Tensor
    inputs: Mapping[str, Any]


class Runner:
    """A causal language model of ``transformers`` whose decoder layers are at ``model.model.layers``.

    Args:
        model: Llama-like: ``model.model.norm`` after the layers, then ``lm_head``.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self.layers = model.model.layers

    @classmethod
    def bundled(cls, dtype: torch.dtype = torch.bfloat16) -> tuple[Runner, Any]:
        """The bundled model and its tokenizer; ``dtype`` bfloat16 is that of the checkpoint."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from editserver.demo.model import ensure_demo_model

        folder = ensure_demo_model()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return cls(model), AutoTokenizer.from_pretrained(folder)

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    def start(self, sequences: Sequence[Sequence[int]], layers: Iterable[int], batch: int = 16) -> Iterator[Started]:
        """Run texts unedited, batches of about equal length together.

        Args:
            sequences: token ids of each text, at least one token each.
            layers: whose resid_post to keep; edits may begin at any of them.
        """
        kept = sorted(set(layers))
        if kept and not 0 <= kept[0] <= kept[-1] < self.n_layers:
            raise ValueError(f"layers: {kept}; this model has 0..{self.n_layers - 1}")
        for tokens in batches(sequences, batch):
            yield self._start(tokens, kept)

    @torch.no_grad()
    def _start(self, tokens: Tokens, kept: Sequence[int]) -> Started:
        resid: dict[int, Tensor] = {}
        inputs: dict[str, Any] = {}

        def keep(layer: int) -> Callable[..., None]:
            def hook(_module: Any, _inputs: Any, output: Any) -> None:
                resid[layer] = _hidden(output)

            return hook

        def read_inputs(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            inputs.update(kwargs)

        wanted = {*kept, self.n_layers - 1}
        handles = [self.layers[layer].register_forward_hook(keep(layer)) for layer in wanted]
        handles.append(self.layers[-1].register_forward_pre_hook(read_inputs, with_kwargs=True))
        try:
            self.model.model(input_ids=tokens.ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return Started(tokens, {layer: resid[layer] for layer in kept}, resid[self.n_layers - 1], inputs)

    @torch.no_grad()
    def edited(self, started: Started, edits: Mapping[int, Edit]) -> Tensor:
        """resid_post of the last layer ``[b, t, d]`` with ``edits`` (layer → edit) in place.

        Tokens whose delta is zero keep their bits; others become ``dtype(fp32(h) + delta)``.

        Raises:
            ValueError: the lowest edited layer is not among those that were kept.
        """
        if not edits:
            return started.last
        first = min(edits)
        if first not in started.resid:
            raise ValueError(f"edits: layer {first} was not kept; kept are {sorted(started.resid)}")
        h = _apply(started.resid[first], edits[first], started.tokens)
        for layer in range(first + 1, self.n_layers):
            h = _hidden(self.layers[layer](h, **started.inputs))
            if layer in edits:
                h = _apply(h, edits[layer], started.tokens)
        return h

    @torch.no_grad()
    def log_probs(self, last: Tensor, tokens: Tokens) -> Tensor:
        """log p(token i + 1 | tokens ≤ i), fp32 ``[b, t − 1]``; 0 where token i + 1 is padding (see ``tokens.targets``)."""
        found = torch.zeros(tokens.targets.shape)
        for row in range(len(last)):
            n = int(tokens.lengths[row]) - 1
            if n > 0:
                logits = self.logits(last[row, :n])
                chosen = logits.gather(1, tokens.ids[row, 1 : n + 1, None]).squeeze(1)
                found[row, :n] = chosen - logits.logsumexp(dim=-1)
        return found

    @torch.no_grad()
    def logits(self, last: Tensor, words: Sequence[int] | None = None) -> Tensor:
        """Next-token logits of residuals ``[…, d]``: fp32 ``[…, vocab]``, or of the tokens ``words`` only."""
        x = self.model.model.norm(last)
        if words is None:
            whole: Tensor = self.model.lm_head(x).float()
            return whole
        rows: Tensor = self.model.lm_head.weight[list(words)]
        chosen: Tensor = (x @ rows.T).float()
        return chosen


def batches(sequences: Sequence[Sequence[int]], size: int) -> Iterator[Tokens]:
    """Right-padded batches of at most ``size`` sequences, the shortest first."""
    for i, sequence in enumerate(sequences):
        if not len(sequence):
            raise ValueError(f"sequences[{i}]: expected at least one token")
    order = sorted(range(len(sequences)), key=lambda i: (len(sequences[i]), i))
    for start in range(0, len(order), size):
        index = tuple(order[start : start + size])
        width = max(len(sequences[i]) for i in index)
        ids = torch.zeros(len(index), width, dtype=torch.int64)
        mask = torch.zeros(len(index), width, dtype=torch.bool)
        for row, i in enumerate(index):
            ids[row, : len(sequences[i])] = torch.tensor(list(sequences[i]))
            mask[row, : len(sequences[i])] = True
        yield Tokens(ids, mask, index)


def suppress_edit(sae: SAE, features: Sequence[int], transfer: gain.Transfer, strength: float = 1.0) -> Edit:
    """Δh = scale·Σ_j (a'_j − a_j)·W_dec[j] with a' = a·(1 − strength·w(a)) on ``features``.

    Args:
        transfer: w of the listed latents, in their order.
    """
    rows = separable_rows(sae, features)

    def edit(h: Tensor, _tokens: Tokens) -> Tensor:
        x, scale = sae.token_scale(h.flatten(0, 1))
        a = rows.activations(x)
        return (scale[:, None] * gain.delta(a, gain.apply(transfer, a, strength), rows.decoder)).view_as(h)

    return edit


def remap_edit(
    sae: SAE,
    transfers: Sequence[remap.Transfer],
    acts: Callable[[Tensor, Tokens], Tensor] | None = None,
    listens: Sequence[int] = (),
) -> Edit:
    """The remap ``transfers`` on the latents of ``sae``.

    Args:
        acts: ``acts(a, tokens)`` → bool ``[b, t]``, where the remap acts (scope and gate); everywhere if None. ``a``
            ``[b, t, m]`` are the original activations of ``listens``, in that order, zero where a token is no evidence.
        listens: latents that ``acts`` reads; any, mapped or not.

    Raises:
        ValueError: a transfer counts in units of the mean pre-activation.
    """
    if any(t.beta != 0.0 and t.unit is remap.Unit.PREACT_MEAN for t in transfers):
        raise ValueError("transfers: units of the mean pre-activation are not for this runner")
    mapped = remap.reads(transfers)
    rows, heard = separable_rows(sae, mapped), separable_rows(sae, listens)

    def edit(h: Tensor, tokens: Tokens) -> Tensor:
        flat = h.flatten(0, 1)
        x, scale = sae.token_scale(flat)
        here = tokens.evidence
        if acts is not None:
            signal = heard.activations(x).view(*h.shape[:2], -1) * tokens.evidence[..., None]
            here = here & acts(signal, tokens)
        a = rows.activations(x)
        after = remap.apply(a, mapped, transfers, here.flatten(), remap.units(flat, scale))
        return remap.delta(a, after, rows.decoder, scale).view_as(h)

    return edit


def separable_rows(sae: SAE, features: Sequence[int]) -> FeatureRows:
    """Rows of latents that can be read without the rest of the dictionary.

    Raises:
        ValueError: the dictionary is not of that kind.
    """
    if not sae.row_separable:
        raise ValueError(f"a {sae.architecture} dictionary needs all latents; this runner reads rows only")
    return sae.rows(features)


def _apply(h: Tensor, edit: Edit, tokens: Tokens) -> Tensor:
    delta = edit(h.float(), tokens)
    written = tokens.evidence & (delta != 0).any(dim=-1)
    return torch.where(written[..., None], (h.float() + delta).to(h.dtype), h)


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
