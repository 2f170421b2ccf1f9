"""Rules in one step: what they read at each layer, what that decides, and what is remembered of it.

The bits of propositions are kept with the KV cache by slot and layer, as the hit bits of gates are (see
:mod:`editserver.engine.gates`): salts hold the digest of the program, so whoever shares a cached block numbers its bits
alike. Everything else is state of the resident request, as it is after a step and as it was before it. Where its tokens do
not continue what the state has seen (rejected drafts, a cached prefix, recomputation after a preemption), the stage of each
layer goes through the tokens in between again, over their bits: those of one step after drafts, all earlier ones at worst.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from editserver.engine.full_encode import Demand
from editserver.engine.gates import Blocks
from editserver.engine.kernel_cpu import read_features
from editserver.engine.kernel_rules import pack_scores, run_stage
from editserver.engine.plan import Plan
from editserver.engine.rows import RowBank
from editserver.engine.rule_table import ResidentRules, RuleTable
from editserver.engine.wire import RuleRecord

Array = npt.NDArray[Any]

NO_BLOCKS = np.zeros((0, 0), np.int32)
NOTHING_KEPT = np.zeros((0, 1), np.uint64)


@dataclass
class KeptBits:
    """Proposition bits by KV slot, per layer; a layer's array is made when rules first read there."""

    _bits: dict[int, Array] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        """Memory: 8 bytes per KV slot, layer that rules read at, and 64 propositions that one request has there."""
        return sum(bits.nbytes for bits in self._bits.values())

    def of(self, layer: int, blocks: Blocks, words: int) -> Array:
        """uint64 ``[n_slots, words or more]`` of ``layer``."""
        found = self._bits.get(layer)
        if found is None or len(found) != blocks.n_slots:
            found = self._bits[layer] = np.zeros((blocks.n_slots, words), np.uint64)
        elif found.shape[1] < words:
            wider = np.zeros((blocks.n_slots, words), np.uint64)
            wider[:, : found.shape[1]] = found
            found = self._bits[layer] = wider
        return found


class RuleStep:
    """The ruled requests of one planned step.

    Use, at each layer where there is something to do: :meth:`demands` (reads single rows at once, the rest comes when the
    demands are served), then :meth:`decide`; after the last layer :meth:`records`.
    """

    def __init__(self, rules: ResidentRules, plan: Plan, blocks: Blocks | None, kept: KeptBits) -> None:
        """
        Raises:
            RuntimeError: a request continues behind tokens of which nothing is known.
        """
        self._rules, self._blocks, self._kept = rules, blocks, kept
        self._segments = [segment for segment in plan.segments if segment.resident.rules is not None]
        rows, row = [], 0
        for segment in self._segments:
            run = segment.resident.rules
            assert run is not None
            first, n = segment.first_position, segment.tokens.stop - segment.tokens.start
            back = run.go_to(first)
            if back and blocks is None:
                message = f"request {segment.resident.request_id} continues at position {first} behind tokens that its"
                raise RuntimeError(message + " rules did not see")
            run.next = -1  # a step that ends half way leaves no state to go on from
            rows.append((segment.index, segment.tokens.start, n, first, back, row, segment.row))
            row += back + n
        self._at: Array = np.array(rows, np.int64).reshape(-1, 7)
        self._held, self._remembered, self._concluded, self._active = (
            np.zeros((row, w), np.uint64) for w in rules.words
        )
        most = int(rules.n_propositions.max(initial=0))
        self._scores: Array = np.empty((plan.n, most), np.float32)
        self._acts: Array = np.empty((0, 0), np.float32)

    @staticmethod
    def of(rules: ResidentRules, plan: Plan, blocks: Blocks | None, kept: KeptBits) -> RuleStep | None:
        """None where no planned token belongs to a request with rules."""
        if not any(segment.resident.rules is not None for segment in plan.segments):
            return None
        return RuleStep(rules, plan, blocks, kept)

    def table(self, layer: int) -> RuleTable | None:
        """What there is to do at ``layer``."""
        return self._rules.tables[layer]

    def demands(self, table: RuleTable, h: torch.Tensor, bank: RowBank) -> list[Demand]:
        """Find the activations in ``h [n, d]`` (fp32), as far as single rows tell; the others come with the demands."""
        self._acts = np.empty((len(h), table.n_columns), np.float32)
        if not table.n_columns:
            return []
        features = (table.feature_ptr, table.feature_slot, table.feature_norm)
        read_features(h.numpy(), self._at, *features, bank.read.numpy(), bank.gate.numpy(), self._acts)
        return [
            Demand(
                whole.digest,
                np.arange(segment.tokens.start, segment.tokens.stop),
                self._taker(segment.tokens, *columns),
            )
            for segment in (self._segments if table.wholes else ())
            for whole in table.wholes.get(segment.index, ())
            for columns in ((torch.from_numpy(whole.features), whole.columns),)
        ]

    def _taker(self, tokens: slice, features: torch.Tensor, columns: Array) -> Callable[[slice, torch.Tensor], None]:
        acts = self._acts[tokens]

        def take(here: slice, z: torch.Tensor) -> None:
            acts[here, columns] = z[:, features].numpy()

        return take

    def decide(self, layer: int, table: RuleTable, opened: Array) -> None:
        """The stage of ``layer``; ``opened`` (uint64 ``[n]``) is ORed with the RULE gates that are open at each token."""
        blocks, size, kept = NO_BLOCKS, 0, NOTHING_KEPT
        if self._blocks is not None and table.n_words:
            blocks, size = self._blocks.table, self._blocks.block_size
            kept = self._kept.of(layer, self._blocks, table.n_words)
        run_stage(
            self._at,
            table.pointers,
            self._rules.prompt_len,
            self._acts,
            *table.stage,
            table.gates,
            table.depth,
            blocks,
            size,
            kept,
            self._rules.cells,
            self._rules.before,
            self._held,
            self._remembered,
            self._concluded,
            self._active,
            self._scores,
            opened,
        )

    def records(self) -> dict[int, RuleRecord]:
        """Resident index → what this step says of its rules. The requests' states are complete now."""
        packed = np.empty(self._scores.size, np.float32)
        ends = np.zeros(len(self._at), np.int64)
        pack_scores(self._at, self._rules.n_propositions, self._held, self._scores, packed, ends)
        found, begin = {}, 0
        for segment, (index, _, n, start, back, row, _), end in zip(
            self._segments, self._at.tolist(), ends.tolist(), strict=True
        ):
            run = segment.resident.rules
            assert run is not None
            run.first, run.next = start, start + n
            here = slice(row, row + back + n)
            bits = zip((self._held, self._concluded, self._active), run.words, strict=True)
            held, concluded, active = (array[here, :words].tobytes() for array, words in bits)
            found[index] = RuleRecord(start - back, held, concluded, active, packed[begin:end].tobytes())
            begin = end
        return found
