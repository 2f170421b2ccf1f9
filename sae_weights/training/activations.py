"""The model's own activations at some hooks: what dictionaries are trained on and judged by.

``resid_post(L)`` is the output of decoder layer L. The model is cut off behind the deepest hook and runs in bf16, once
for all hooks. Position 0 and massive-activation tokens (‖h‖ > 10 × median) are dropped: a handful of them carry most
of the variance.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

OUTLIER = 10.0
"""Tokens whose norm exceeds this multiple of the median are neither trained on nor counted."""

TOKENS_PER_BATCH = 8192
_CHUNK = 1 << 16


def windows(token_ids: Sequence[int], length: int, shortest: int = 16) -> Iterator[list[int]]:
    """Consecutive windows of ``length`` tokens; a rest shorter than ``shortest`` is dropped."""
    for start in range(0, len(token_ids), length):
        window = list(token_ids[start : start + length])
        if len(window) >= shortest:
            yield window


@dataclass(frozen=True)
class Activations:
    """Ordinary tokens' activations.

    Attributes:
        values: bf16 ``[tokens, d_model]``; memory-mapped where they were cached.
        median_norm: median ‖h‖ over all tokens but those at position 0.
        dropped: tokens left out as outliers.
    """

    values: Tensor
    median_norm: float
    dropped: int


def layers_path(model: Any) -> str:
    """Path of the list of decoder layers below a ``transformers`` causal LM: ``model.layers`` for Llama and its like.

    It is the list with one module per hidden layer that lies least deep.

    Raises:
        ValueError: there is none, or several at the same depth.
    """
    wanted = model.config.get_text_config().num_hidden_layers
    lists: list[tuple[int, str]] = [
        (name.count("."), name)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == wanted
    ]
    nearest = [name for depth, name in lists if depth == min(lists)[0]]
    if len(nearest) != 1:
        have = " and ".join(nearest) or "none"
        raise ValueError(f"{type(model).__name__}: expected one list of {wanted} decoder layers, found {have}")
    return nearest[0]


def decoder_layers(model: Any) -> nn.ModuleList:
    """The list at :func:`layers_path`."""
    found: nn.ModuleList = model.get_submodule(layers_path(model))
    return found


class Truncated:
    """A ``transformers`` causal LM up to and including the deepest of ``layers``."""

    def __init__(self, model: Any, *layers: int) -> None:
        decoder = decoder_layers(model)
        for layer in layers:
            if not 0 <= layer < len(decoder):
                raise ValueError(f"layer {layer}; the model has 0..{len(decoder) - 1}")
        self.layers = layers
        self.device = next(model.parameters()).device
        self._model = model.base_model
        self._seen: dict[int, Tensor] = {}
        for layer in layers:
            decoder[layer].register_forward_hook(self._note(layer))
        del decoder[max(layers) + 1 :]

    def _note(self, layer: int) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            self._seen[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    @torch.inference_mode()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
        """``resid_post`` of every layer, in their order, each ``[batch, tokens, d_model]``."""
        self._seen.clear()
        ids = input_ids.to(self.device)
        # Without padding there is nothing to mask, and plain causal attention is a fifth faster.
        mask = None if bool(attention_mask.all()) else attention_mask.to(self.device)
        self._model(input_ids=ids, attention_mask=mask, use_cache=False)
        return [self._seen.pop(layer) for layer in self.layers]


def batches(sequences: Sequence[Sequence[int]], tokens: int = TOKENS_PER_BATCH) -> list[list[int]]:
    """Indices of sequences of similar length, at most about ``tokens`` padded tokens a batch, in a fixed random order.

    A prefix of the batches is a fair sample, so a consumer may stop early.
    """
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    made: list[list[int]] = []
    members: list[int] = []
    for i in order:
        if members and (len(members) + 1) * len(sequences[i]) > tokens:
            made.append(members)
            members = []
        members.append(i)
    if members:
        made.append(members)
    random.Random(0).shuffle(made)
    return made


def read(model: Truncated, part: Sequence[Sequence[int]]) -> list[Tensor]:
    """One batch: per layer the bf16 activations ``[tokens, d_model]`` of all positions but 0."""
    width = max(len(s) for s in part)
    ids = torch.tensor([[*s, *[0] * (width - len(s))] for s in part])
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in part])
    keep = mask.bool()
    keep[:, 0] = False
    return [h[keep.to(h.device)].to(torch.bfloat16) for h in model(ids, mask)]


def ordinary(values: Tensor, median_norm: float) -> Tensor:
    """Mask ``[tokens]`` of those with ‖h‖ ≤ 10 × ``median_norm``."""
    return torch.cat([c.float().norm(dim=1) for c in values.split(_CHUNK)]) <= OUTLIER * median_norm


def collect(
    model: Truncated,
    sequences: Sequence[Sequence[int]],
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[Activations]:
    """Activations of all sequences, one set per layer, in memory. ``report(tokens done, tokens in all)``."""
    total = sum(len(s) for s in sequences)
    chunks: list[list[Tensor]] = [[] for _ in model.layers]
    done = 0
    for members in batches(sequences, tokens_per_batch):
        part = [sequences[i] for i in members]
        for kept, values in zip(chunks, read(model, part), strict=True):
            kept.append(values.cpu())
        done += sum(len(s) for s in part)
        report(done, total)
    return [_judged(torch.cat(kept)) for kept in chunks]


def _judged(values: Tensor) -> Activations:
    median = _median_norm(values)
    keep = ordinary(values, median)
    dropped = int((~keep).sum())
    return Activations(values[keep] if dropped else values, median, dropped)


def _median_norm(values: Tensor) -> float:
    return float(torch.cat([c.float().norm(dim=1) for c in values.split(_CHUNK)]).median())


def cached(
    load_model: Callable[[], Any],
    layers: Sequence[int],
    sequences: Sequence[Sequence[int]],
    stem: Path,
    *,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[Activations]:
    """Like :func:`collect`, kept on disk as ``STEM-lN.bf16`` and read back memory-mapped.

    Written batch by batch: a run that was stopped goes on with the batch it was in, and what was read for several layers
    serves a run over some of them. The median of outliers' bound is
    taken from the first batches (``STEM.json`` holds it), so that nothing has to be read twice.
    """
    notes = stem.with_suffix(".json")
    plan = batches(sequences)
    state: dict[str, Any] = {"batches": 0, "median": {}, "dropped": {}, "rows": {}, "d_model": 0, "of": len(plan)}
    if notes.exists():
        state = json.loads(notes.read_text())
        if state["of"] != len(plan) or not {*map(str, layers)} <= {*state["median"]}:
            raise ValueError(f"{notes} belongs to a run with other text or layers; name another work folder")
    files = {layer: stem.with_name(f"{stem.name}-l{layer}.bf16") for layer in layers}
    if state["batches"] < len(plan):
        if state["median"] and len(state["median"]) != len(layers):
            raise ValueError(f"{notes} belongs to an unfinished run over layers {sorted(map(int, state['median']))}")
        model = Truncated(load_model(), *layers)
        total = sum(len(s) for s in sequences)
        done = sum(len(sequences[i]) for members in plan[: state["batches"]] for i in members)
        for number in range(state["batches"], len(plan)):
            part = [sequences[i] for i in plan[number]]
            for layer, values in zip(layers, read(model, part), strict=True):
                _append(files[layer], state, layer, values.cpu())
            state["batches"] = number + 1
            notes.write_text(json.dumps(state))
            done += sum(len(s) for s in part)
            report(done, total)
    return [_mapped(files[layer], state, layer) for layer in layers]


def _append(path: Path, state: dict[str, Any], layer: int, values: Tensor) -> None:
    key = str(layer)
    if key not in state["median"]:
        state["median"][key], state["dropped"][key], state["rows"][key] = _median_norm(values), 0, 0
        state["d_model"] = values.shape[1]
    keep = ordinary(values, state["median"][key])
    row_bytes = 2 * values.shape[1]
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.truncate(state["rows"][key] * row_bytes)  # a batch that was cut short is written again
        file.seek(0, 2)
        file.write(values[keep].contiguous().view(torch.int16).numpy().tobytes())
    state["rows"][key] += int(keep.sum())
    state["dropped"][key] += int((~keep).sum())


def _mapped(path: Path, state: dict[str, Any], layer: int) -> Activations:
    rows, d = state["rows"][str(layer)], state["d_model"]
    values = torch.from_file(str(path), shared=False, size=rows * d, dtype=torch.bfloat16).view(rows, d)
    return Activations(values, state["median"][str(layer)], state["dropped"][str(layer)])
