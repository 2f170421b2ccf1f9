"""Edits with plain ``transformers`` and forward hooks: slow, obvious, and what the server must agree with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from interventions.errors import InterventionError
from interventions.oracle import (
    GateFacts,
    LayerResult,
    edit_layer,
    listen,
    read_latents,
    row_source,
    score_rules,
    select,
)
from interventions.program import LayerProgram, Payload, Read
from interventions.rules.machine import Machine, RuleTrace, decided
from sae_weights.sae import SAE

Reading = tuple[int, list[tuple[int, float]]]
"""Position, and (feature, activation): the listed features first, then the largest non-zero others."""


@dataclass(frozen=True)
class Stats:
    """Receipt numbers of one intervention at one layer; doses over the tokens where it fired."""

    fired: int
    dose_mean: float
    dose_max: float
    clamped: int


@dataclass(frozen=True)
class Forward:
    """One pass over t tokens.

    Attributes:
        logits: fp32 ``[t, vocab]``.
        layers: layer → what the program did there, for the t tokens.
        gates: layer → what its gates did, in the program's order.
        readings: per inspection of the payload, the readings of the tokens that it selects.
        rules: what the program's rules did; ``None`` where it has none.
    """

    logits: Tensor
    layers: Mapping[int, LayerResult]
    readings: list[list[Reading]]
    gates: Mapping[int, tuple[GateFacts, ...]] = field(default_factory=dict)
    rules: RuleTrace | None = None

    def stats(self, intervention: int, layer: int) -> Stats:
        """Receipt numbers of intervention ``intervention`` (its index in the request) at ``layer``."""
        if layer not in self.layers:
            return Stats(0, 0.0, 0.0, 0)
        result = self.layers[layer]
        fired = (result.fired >> intervention) & 1 != 0
        doses = result.dose[fired].double()
        if not len(doses):
            return Stats(0, 0.0, 0.0, 0)
        return Stats(len(doses), float(doses.mean()), float(doses.max()), int(result.clamped[fired].sum()))


@dataclass(frozen=True)
class Generated:
    """A greedy completion.

    Attributes:
        token_ids: the sampled tokens; of a refused one, those before the refusal.
        logprobs: log-probabilities of all next tokens at each step, fp32 ``[len(token_ids), vocab]``.
        forward: the last pass, over the prompt and every token that was fed (all but the last sampled one).
        refused: action and position of the first token at which a refusing action of the rules was active: tokens from
            that position on are withheld, all of them where it is in the prompt.
    """

    token_ids: list[int]
    logprobs: Tensor
    forward: Forward
    refused: tuple[int, int] | None = None


@dataclass
class _Pass:
    """The state of one forward pass that its hooks share."""

    payload: Payload
    selected: Tensor
    positions: Tensor
    token_ids: Tensor
    prompt_len: int
    layers: dict[int, LayerResult] = field(default_factory=dict)
    readings: dict[int, list[Reading]] = field(default_factory=dict)
    gates: dict[int, tuple[GateFacts, ...]] = field(default_factory=dict)
    machine: Machine | None = None
    scores: npt.NDArray[np.float32] | None = None


class ReferenceExecutor:
    """Runs a request's payload on a ``transformers`` causal language model.

    Every pass recomputes all tokens without a KV cache, so a token's phase is its position against ``prompt_len`` and
    nothing else. ``resid_post(L)`` is the output of decoder layer L; written tokens get ``dtype(fp32(h) + delta)``,
    all others keep their bits.

    Args:
        model: a causal LM whose decoder layers are at ``layers`` (``model.layers``: Llama, Qwen, Gemma, Mistral …).
        saes: content digest → SAE, for the programs and inspections that name it.
        layers: path of the list of decoder layers below ``model``.
    """

    def __init__(self, model: Any, saes: Mapping[str, SAE] | None = None, layers: str = "model.layers") -> None:
        self.model = model.eval()
        self.saes = dict(saes or {})
        self._layers = model.get_submodule(layers)

    @torch.no_grad()
    def forward(self, token_ids: Sequence[int], prompt_len: int, payload: Payload | None = None) -> Forward:
        """One pass over ``token_ids``, of which the first ``prompt_len`` are the prompt.

        Raises:
            InterventionError: ``dose_exceeded`` if the program refuses doses above its bound.
        """
        ids = torch.as_tensor(list(token_ids), dtype=torch.int64)
        payload = payload or Payload(None, (), None)
        positions = torch.arange(len(ids))
        selectors = () if payload.program is None else payload.program.selectors
        state = _Pass(payload, select(selectors, positions, ids, prompt_len), positions, ids, prompt_len)
        if payload.program is not None and payload.program.rules is not None:
            state.machine = Machine(payload.program.rules, prompt_len)
            state.machine.begin(len(ids))
            state.scores = np.full(state.machine.held.shape, np.nan, np.float32)
        with self._hooked(state):
            output = self.model(input_ids=ids[None].to(self.model.device), use_cache=False)
        readings = [state.readings[i] for i in range(len(payload.reads))]
        rules = None if state.machine is None else state.machine.trace(state.scores)
        return Forward(output.logits[0].float().cpu(), state.layers, readings, state.gates, rules)

    def generate(
        self,
        prompt: Sequence[int],
        payload: Payload | None = None,
        max_tokens: int = 16,
        stop_token_ids: Sequence[int] = (),
    ) -> Generated:
        """Greedy decoding: up to ``max_tokens`` (at least 1) tokens, ending after one of ``stop_token_ids``.

        A refusing rule ends it where it fires.
        """
        ids, steps = list(prompt), list[Tensor]()
        rules = None if payload is None or payload.program is None else payload.program.rules
        while True:
            result = self.forward(ids, len(prompt), payload)
            refused = None if rules is None or result.rules is None else result.rules.refusal(rules)
            if refused is not None:
                kept = max(0, refused[1] - len(prompt))
                logprobs = torch.stack(steps[:kept]) if kept else result.logits.new_zeros(0, result.logits.shape[1])
                return Generated(ids[len(prompt) :][:kept], logprobs, result, refused)
            steps.append(result.logits[-1].log_softmax(dim=-1))
            ids.append(int(result.logits[-1].argmax()))
            if len(ids) - len(prompt) >= max_tokens or ids[-1] in stop_token_ids:
                return Generated(ids[len(prompt) :], torch.stack(steps), result)

    @contextmanager
    def _hooked(self, state: _Pass) -> Iterator[None]:
        program = state.payload.program
        edits = {} if program is None else {layer.layer: layer for layer in program.layers}
        ruled = () if program is None or program.rules is None else program.rules.layers
        touched = sorted({*edits, *ruled, *(read.layer for read in state.payload.reads)})
        handles = []
        try:
            for layer in touched:
                hook = self._hook(state, layer, edits.get(layer))
                handles.append(self._layers[layer].register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, state: _Pass, layer: int, edit: LayerProgram | None) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            before = output[0] if isinstance(output, tuple) else output
            h = before[0].cpu()
            if state.machine is not None:
                self._judge(state, layer, h)
            after = h if edit is None else self._edit(state, edit, h)
            for i, read in enumerate(state.payload.reads):
                if read.layer == layer:
                    state.readings[i] = self._read(state, read, after if read.after else h)
            changed = after[None].to(before.device)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    def _judge(self, state: _Pass, layer: int, h: Tensor) -> None:
        """The rules of one layer, on its pre-edit h."""
        program = state.payload.program
        assert program is not None
        assert program.rules is not None
        assert state.machine is not None
        assert state.scores is not None
        rows = cache(row_source(program.vectors, self.saes))
        members = cache(lambda digest: self.saes[digest].encode(h.float()))
        scores = score_rules(h.float(), layer, program.rules, rows, members)
        own = ~np.isnan(scores)
        state.scores[own] = scores[own]
        state.machine.stage(layer, decided(program.rules, scores))

    def _edit(self, state: _Pass, edit: LayerProgram, h: Tensor) -> Tensor:
        program = state.payload.program
        assert program is not None
        rows = cache(row_source(program.vectors, self.saes))
        members = cache(lambda digest: self.saes[digest].encode(h.float()))
        active = None if state.machine is None else state.machine.active
        opened, state.gates[edit.layer] = listen(h.float(), edit, rows, members, state.prompt_len, active)
        result = edit_layer(
            h.float(),
            edit,
            state.selected,
            rows,
            members,
            program.max_dose,
            program.refuse_over_dose,
            lambda digest, z, edited: self.saes[digest].delta(h.float(), z, edited),
            opened,
        )
        if bool(result.over.any()):
            token = int(result.over.nonzero()[0])
            message = (
                f"the edit at layer {edit.layer}, position {token} has dose {float(result.dose[token]):.3f}; "
                f"doses above {program.max_dose:g} are refused"
            )
            raise InterventionError("dose_exceeded", message, "interventions")
        state.layers[edit.layer] = result
        return result.apply(h)

    def _read(self, state: _Pass, read: Read, h: Tensor) -> list[Reading]:
        mask = read.selector.mask(state.positions, state.token_ids, state.prompt_len)
        latents = read_latents(h[mask], self.saes[read.sae], read.features, read.top_k)
        readings: list[Reading] = []
        for i, position in enumerate(state.positions[mask].tolist()):
            pairs = list(zip(read.features, latents.listed[i].tolist(), strict=True))
            top = zip(latents.top_index[i].tolist(), latents.top_value[i].tolist(), strict=True)
            pairs += [(index, value) for index, value in top if value != 0 and index not in read.features]
            readings.append((position, pairs))
        return readings
