"""A fitted map, carried out on whole sequences with the pure functions that define it.

Where it acts, as in a request: position 0 never; the tokens of its scope (the last token of a mention, all its tokens in the
prompt, tokens where a trigger fires, or all); and, behind a gate, the tokens at which the gate is open. ``whole`` is the
published form of DSG instead, which sees a sequence twice: if the gate opens anywhere in the prompt it counts as open at every
token, also at those before it opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from interventions.maps import gates
from interventions.maps.map import AllTokens, LatentMap, MentionTokens, TriggerTokens
from interventions.maps.mentions import mention_ends, mention_positions
from interventions.maps.transfer import apply, delta, reads, units
from reproduce.unlearning.passes import Ids, Passes
from reproduce.unlearning.recall import Forward
from sae_weights.feature_rows import FeatureRows
from sae_weights.sae import SAE

Bits = gates.Bits


@dataclass(frozen=True)
class Edited:
    """What a map did to one sequence.

    Attributes:
        h: the residual stream after it, in the dtype that it came in.
        changed: whether any token changed.
        acted: tokens on which the map acted.
        dose: largest ‖Δh‖/‖h‖ of a token.
    """

    h: Tensor
    changed: bool
    acted: int
    dose: float


class Mapper:
    """``remap`` of one map on one SAE.

    Args:
        sae: whose latents they are.
        fitted: the map.
        whole: see the module.
    """

    def __init__(self, sae: SAE, fitted: LatentMap, whole: bool = False) -> None:
        self.sae, self.map, self.whole = sae, fitted, whole
        self._mapped = reads(fitted.transfers)
        self._trigger = fitted.scope.latents if isinstance(fitted.scope, TriggerTokens) else ()
        self._evidence = () if fitted.gate is None else fitted.gate.evidence
        self._latents = sorted({*self._mapped, *self._trigger, *self._evidence})
        self._rows: FeatureRows = sae.rows(self._latents)
        column = {latent: i for i, latent in enumerate(self._latents)}
        self._columns = {
            name: [column[latent] for latent in latents]
            for name, latents in (("map", self._mapped), ("trigger", self._trigger), ("evidence", self._evidence))
        }
        self._decoder = self._rows.decoder[self._columns["map"]]

    def __call__(self, states: Sequence[Tensor], sequences: Sequence[Ids], lengths: Sequence[int]) -> list[Edited]:
        """The residual streams ``[n, d]`` of ``sequences``, whose prompts are ``lengths`` long, after the map."""
        h = torch.cat([state.float() for state in states])
        x, scale = self.sae.token_scale(h)
        a = self._rows.activations(x)
        ends = [len(state) for state in states]
        bits = [self.acts(*each) for each in zip(a.split(ends), sequences, lengths, strict=True)]
        acts = torch.from_numpy(np.concatenate(bits))
        rows = acts.nonzero().flatten()
        before = a[rows][:, self._columns["map"]]
        after = apply(before, self._mapped, self.map.transfers, acts[rows], units(h[rows], scale[rows]))
        change = torch.zeros_like(h)
        change[rows] = delta(before, after, self._decoder, scale[rows])
        written = (change != 0).any(dim=-1)
        doses = change.norm(dim=-1) / h.norm(dim=-1)
        found = []
        for state, c, w, d, b in zip(
            states, change.split(ends), written.split(ends), doses.split(ends), bits, strict=True
        ):
            edited = torch.where(w[:, None], (state.float() + c).to(state.dtype), state) if bool(w.any()) else state
            found.append(Edited(edited, bool(w.any()), int(b.sum()), float(d.max())))
        return found

    def acts(self, a: Tensor, ids: Ids, prompt_len: int) -> Bits:
        """bool ``[n]``: where the map acts; ``a`` are the activations of all latents that it reads."""
        n = len(ids)
        here = np.arange(n) > 0
        scope = self.map.scope
        if isinstance(scope, TriggerTokens):
            here &= _fires(a[:, self._columns["trigger"]])
        elif isinstance(scope, MentionTokens):
            if scope.tokens == "last":
                here &= mention_ends(ids, scope.sequences)
            else:
                inside = np.zeros(n, np.bool_)
                inside[list(mention_positions(ids[:prompt_len], scope.sequences, "all"))] = True
                here &= inside
        else:
            assert isinstance(scope, AllTokens)
        if self.map.gate is not None:
            opened, _ = gates.update(
                self.map.gate.gate, gates.START, _fires(a[:, self._columns["evidence"]]), prompt_len
            )
            here &= opened[:prompt_len].any() if self.whole else opened
        return here


def _fires(a: Tensor) -> Bits:
    fires: Bits = (a != 0).any(dim=-1).numpy()
    return fires


class Runs:
    """Sequences under maps: what no edit changes is taken from the unedited pass.

    Args:
        passes: the model.
        saes: layer → SAE.
    """

    def __init__(self, passes: Passes, saes: Mapping[int, SAE]) -> None:
        self.passes, self.saes = passes, saes
        self.layers = sorted(saes)
        following = [*self.layers[1:], min(self.layers[-1] + 5, passes.last)]
        self.next = dict(zip(self.layers, following, strict=True))
        """Layer of each SAE → the layer at which its edits are looked at a second time."""
        self.kept = sorted({*self.layers, *following, passes.last})

    def plain(self, layer: int | None = None) -> Forward:
        """The unedited model up to ``layer`` (the last by default)."""
        at = self.passes.last if layer is None else layer
        return lambda sequences, _lengths, _owners=(): [s[at] for s in self.passes.keep(sequences, self.kept)]

    def edited(self, mappers: Sequence[Mapper], to: int | None = None) -> Forward:
        """The model up to layer ``to`` (the last by default), each sequence under the map of its owner.

        Args:
            mappers: all of one layer; with a single one, owners need not be told.
        """
        stop = self.passes.last if to is None else to
        (layer,) = {mapper.map.layer for mapper in mappers}

        def forward(sequences: Sequence[Ids], lengths: Sequence[int], owners: Sequence[int] = ()) -> list[Tensor]:
            whose = list(owners) or [0] * len(sequences)
            states = self.passes.keep(sequences, self.kept)
            found = [s[stop] for s in states]
            changed: list[tuple[int, Tensor]] = []
            for owner in sorted(set(whose)):
                rows = [i for i, o in enumerate(whose) if o == owner]
                after = mappers[owner](
                    [states[i][layer] for i in rows], [sequences[i] for i in rows], [lengths[i] for i in rows]
                )
                changed += [(i, e.h) for i, e in zip(rows, after, strict=True) if e.changed]
            hs = [h for _, h in changed]
            passed = hs if stop == layer else self.passes.onward(hs, layer, stop)
            for (i, _), h in zip(changed, passed, strict=True):
                found[i] = h
            return found

        return forward

    def activations(self, layer: int, sequences: Sequence[Ids]) -> list[Tensor]:
        """All latents ``[n, S]`` of the SAE at ``layer`` for each sequence, unedited."""
        states = [s[layer] for s in self.passes.keep(sequences, self.kept)]
        sae = self.saes[layer]
        return [sae.encode(h.float()) for h in states]
