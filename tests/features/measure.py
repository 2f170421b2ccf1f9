"""The two directions of a feature: what makes it fire, and what setting it makes the model say.

``topics.json`` holds 32 topics with eight sentences of our own each: ``pick.py`` proposes features on the four under
``find``, the tests judge them on the four under ``check``. Those of ``named.json`` were chosen by hand among the proposals:
their automatic label names the topic, and they pass (about half of the proposals that mean their topic do).
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from editserver.demo.model import ensure_demo_model
from sae_weights.sae import SAE
from sae_weights.training.activations import OUTLIER

FOLDER = Path(__file__).parent
TOPICS: dict[str, dict[str, list[str]]] = json.loads((FOLDER / "topics.json").read_text())
LAYERS = (10, 15, 20)
STRENGTHS = (1.0, 2.0, 3.0)
"""Multiples of the feature's largest recorded activation."""

NEUTRAL = (
    "Yesterday I read a long article about",
    "The most important thing to remember is the",
    "When they came back, everybody was talking about",
    "In the middle of the room there was a",
    "My friend told me a story about",
    "The next page shows a picture of the",
    "What I like best about it is the",
    "He stopped for a moment and thought of the",
)


@cache
def loaded():
    """The demo model in bf16, as it is served, and its tokenizer."""
    path = ensure_demo_model(progress=False)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    return model, AutoTokenizer.from_pretrained(path)


def batch(texts):
    """Right-padded ids and mask."""
    _, tokenizer = loaded()
    rows = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([[*r, *[0] * (width - len(r))] for r in rows])
    return ids, torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])


@torch.inference_mode()
def residuals(texts) -> dict[int, Tensor]:
    """``resid_post`` of :data:`LAYERS` for all texts, fp32 ``[texts, tokens, d]``; nan at position 0 and padding."""
    model, _ = loaded()
    seen: dict[int, Tensor] = {}
    handles = [
        model.model.layers[layer].register_forward_hook(lambda _m, _i, out, at=layer: seen.update({at: first(out)}))
        for layer in LAYERS
    ]
    ids, mask = batch(texts)
    model(input_ids=ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    kept = mask.bool()
    kept[:, 0] = False
    return {layer: h.float().masked_fill(~kept[..., None], float("nan")) for layer, h in seen.items()}


def first(output):
    return output[0] if isinstance(output, tuple) else output


def pooled(sae: SAE, h: Tensor) -> Tensor:
    """The largest activation of every feature in each text, ``[texts, n_features]``; sinks are no evidence."""
    rows = []
    for text in h:
        tokens = text[~text.isnan().any(dim=1)]
        tokens = tokens[tokens.norm(dim=1) <= OUTLIER * sae.metadata["median_norm"]]
        rows.append(sae.encode(tokens).amax(dim=0))
    return torch.stack(rows)


@torch.inference_mode()
def next_token_probability(sae: SAE, feature: int, tokens: list[int], values) -> list[float]:
    """Mean probability that one of ``tokens`` follows a neutral beginning: unedited, then per value of the feature.

    The edit is ``edit_features`` with ``set`` on every token but position 0: h' = h + (value − a)·d.
    """
    model, _ = loaded()
    ids, mask = batch(NEUTRAL)
    copies = 1 + len(values)
    ids, mask = ids.repeat(copies, 1), mask.repeat(copies, 1)
    row = sae.rows([feature])
    wanted = torch.tensor([float(v) for v in values])

    def edit(_module, _inputs, output):
        h = first(output)
        x = h.float().reshape(copies, len(NEUTRAL), *h.shape[1:])
        a = row.transfer(x[1:] @ row.encoder.T)[..., 0]
        delta = (wanted[:, None, None] - a)[..., None] * row.decoder[0]
        delta[:, :, 0] = 0
        new = torch.cat([x[:1], x[1:] + delta]).reshape(h.shape).to(h.dtype)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = model.model.layers[sae.hook.edit_layer].register_forward_hook(edit)
    try:
        logits = model(input_ids=ids, attention_mask=mask).logits
    finally:
        handle.remove()
    last = logits[torch.arange(len(ids)), mask.sum(1) - 1].float()
    found = last.softmax(-1)[:, tokens].sum(1).reshape(copies, len(NEUTRAL)).mean(1)
    return [float(p) for p in found]


def promoted_ids(promoted) -> list[int]:
    """Token ids of the promoted tokens' texts, those that are one token."""
    _, tokenizer = loaded()
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text, _ in promoted]
    return [one[0] for one in ids if len(one) == 1]
