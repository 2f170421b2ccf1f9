"""Gates at one layer: which of a request's tokens are hits, and where that opens a gate.

Hits of triggers matter where they are. Hits behind a sequence gate are remembered with the KV cache, one uint64 per slot and
layer (bit g: gate g of the layer's program), for exactly as long as the token's KV: prefix caching shares blocks between
requests of equal salts only, whose programs are equal, so a cached block's bits mean the same to whoever reads it. Each
resident request keeps the gates' states on top, as they are after a step and as they were before it; where its tokens do not
continue what the states have seen (rejected drafts, a cached prefix, recomputation after a preemption), they are made anew
from the bits of the positions in between: of one step at most after drafts, of all earlier ones at worst.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from editserver.engine.full_encode import Demand, acting
from editserver.engine.kernel_cpu import hit_tokens
from editserver.engine.layer_table import LayerTable, Listener
from editserver.engine.plan import Plan, Segment
from editserver.engine.rows import RowBank
from interventions.maps import gates

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Blocks:
    """Where the KV of a step's requests lies.

    Attributes:
        table: KV blocks by batch row, int32 ``[rows, blocks]``: position p lies in ``table[row, p // block_size]``.
        block_size: tokens per block.
        n_slots: tokens of the whole KV cache.
    """

    table: Array
    block_size: int
    n_slots: int

    def slots(self, row: int, start: int, stop: int) -> Array:
        """KV slots of the positions ``start … stop − 1`` of the request in ``row``, int64."""
        positions = np.arange(start, stop)
        blocks = self.table[row, positions // self.block_size].astype(np.int64)
        slots: Array = blocks * self.block_size + positions % self.block_size
        return slots


@dataclass(frozen=True)
class Track:
    """One sequence gate of one request after some of its tokens: its state, and what receipts say.

    Attributes:
        open_from: first position at which it was open; -1 for never.
        largest: the largest statistic so far.
    """

    state: gates.GateState = gates.START
    open_from: int = -1
    largest: float = 0.0

    def feed(
        self, rule: gates.Gate, hits: Array, prompt_len: int, facts: int = 0
    ) -> tuple[Array, Track, tuple[tuple[int, float], ...]]:
        """Take the next tokens' hit bits (bool ``[n]``).

        Returns:
            ``(open, track, facts)``: whether the gate is open at each of them, bool ``[n]``; the track after all of them;
            and (``open_from``, ``largest``) after each of the last ``facts`` of them, or of all if they are fewer.
        """
        opened, statistic, state = gates.advance(rule, self.state, hits, prompt_len)
        open_from, n = self.open_from, len(opened)
        if open_from < 0 and opened.any():
            open_from = self.state.position + int(opened.argmax())
        largest = np.maximum.accumulate(np.maximum(statistic, self.largest))
        told = tuple(
            (open_from if open_from <= self.state.position + i else -1, float(largest[i]))
            for i in range(max(0, n - facts), n)
        )
        return opened, Track(state, open_from, float(largest[-1]) if n else self.largest), told


@dataclass
class Tracks:
    """The track of one sequence gate, with what it takes to go back behind drafts.

    Attributes:
        now: after all tokens so far, drafts of the last step included, rejected or not.
        before: as it was before that step, when all tokens were the request's own.
        facts: what the step's record says.
    """

    now: Track = Track()
    before: Track = Track()
    facts: tuple[tuple[int, float], ...] = ()

    def at(self, position: int) -> Track | None:
        """The latest track that surely is of the tokens before ``position`` alone, or of the first of these."""
        if self.now.state.position == position:
            return self.now
        return self.before if self.before.state.position <= position else None


@dataclass
class HitMemory:
    """Hit bits by KV slot, per layer; a layer's array is made when its first gate listens."""

    _bits: dict[int, Array] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        """Memory: 8 bytes per KV slot and layer at which a gate has listened."""
        return sum(bits.nbytes for bits in self._bits.values())

    def of(self, layer: int, blocks: Blocks) -> Array:
        """uint64 ``[n_slots]`` of ``layer``."""
        found = self._bits.get(layer)
        if found is None or len(found) != blocks.n_slots:
            found = self._bits[layer] = np.zeros(blocks.n_slots, np.uint64)
        return found


class Hearing:
    """What the gates of one layer hear in one step.

    Use: :meth:`demands` (looks at single rows at once, the rest comes when the demands are served), then :meth:`open`.

    Args:
        table: the layer's programs; ``table.listeners`` of the planned requests are heard.
        blocks: None where the KV cache cannot carry bits: then every request must be computed from position 0.
        facts: how many tokens' facts a record tells.
    """

    def __init__(
        self, layer: int, table: LayerTable, plan: Plan, memory: HitMemory, blocks: Blocks | None, facts: int = 1
    ) -> None:
        self._layer, self._plan, self._memory, self._blocks, self._facts = layer, plan, memory, blocks, facts
        self._heard = [(s, table.listeners[s.index]) for s in plan.segments if s.index in table.listeners]
        self._hits: Array = np.zeros(plan.n, np.uint64)

    def demands(self, h: torch.Tensor, bank: RowBank) -> list[Demand]:
        """Find the hits in ``h [n, d]`` (fp32), as far as single rows tell; the others come with the demands."""
        found: list[Demand] = []
        read, gate = bank.read.numpy(), bank.gate.numpy()
        for segment, listeners in self._heard:
            every = np.arange(segment.tokens.start, segment.tokens.stop)
            for listener in listeners:
                tokens = every if listener.rule else every[acting(self._plan.selected[segment.tokens], listener.masks)]
                if listener.whole:
                    found.append(Demand(listener.digest, tokens, self._taker(listener, tokens)))
                else:
                    hit_tokens(h.numpy(), tokens, listener.slots, listener.norm, listener.bit, read, gate, self._hits)
        return found

    def _taker(self, listener: Listener, tokens: Array) -> Callable[[slice, torch.Tensor], None]:
        features = torch.from_numpy(listener.features)

        def take(here: slice, z: torch.Tensor) -> None:
            active = (z[:, features] != 0).any(dim=1).numpy()
            self._hits[tokens[here][active]] |= listener.bit

        return take

    def open(self) -> Array:
        """Gates open at each planned token: uint64 ``[n]``, bit g = gate g of the token's own program at this layer.

        Raises:
            RuntimeError: a request continues behind tokens whose hits are not known.
        """
        opened: Array = np.zeros(self._plan.n, np.uint64)
        # First all, then who reads: a prefix may be computed in the very step that shares it.
        for segment, listeners in self._heard:
            if self._blocks is not None and any(listener.rule for listener in listeners):
                self._remember(segment, self._blocks)
        for segment, listeners in self._heard:
            here, hits = opened[segment.tokens], self._hits[segment.tokens]
            for listener in listeners:
                heard = hits & listener.bit != 0
                if listener.rule is not None:
                    before = self._track(segment, listener)
                    heard, now, facts = before.feed(listener.rule, heard, segment.resident.prompt_len, self._facts)
                    segment.resident.tracks[self._layer, listener.number] = Tracks(now, before, facts)
                here[heard] |= listener.bit
        return opened

    def _remember(self, segment: Segment, blocks: Blocks) -> None:
        stop = segment.first_position + segment.tokens.stop - segment.tokens.start
        slots = blocks.slots(segment.row, segment.first_position, stop)
        self._memory.of(self._layer, blocks)[slots] = self._hits[segment.tokens]

    def _track(self, segment: Segment, listener: Listener) -> Track:
        """The gate's state before the segment's first token, made anew where the request does not continue it."""
        first = segment.first_position
        tracks = segment.resident.tracks.get((self._layer, listener.number), Tracks())
        track = tracks.at(first) or Track()
        known = track.state.position
        if known == first:
            return track
        if self._blocks is None:
            message = (
                f"request {segment.resident.request_id} continues at position {first} behind a gate that did not hear"
            )
            raise RuntimeError(message + " its earlier tokens")
        earlier = self._memory.of(self._layer, self._blocks)[self._blocks.slots(segment.row, known, first)]
        assert listener.rule is not None
        return track.feed(listener.rule, earlier & listener.bit != 0, segment.resident.prompt_len)[1]
