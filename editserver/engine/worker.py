"""One worker's engine: what the custom op calls, and what each step reports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from editserver.engine.config import EngineConfig
from editserver.engine.full_encode import Composed, Demand, serve
from editserver.engine.gates import Blocks, Hearing, HitMemory
from editserver.engine.history import History
from editserver.engine.journal import NOT_SELECTED
from editserver.engine.kernel_cpu import edit_tokens, read_latents
from editserver.engine.plan import Plan, Segment
from editserver.engine.resident import LayerTable, Resident, ResidentSet
from editserver.engine.rows import Dictionaries, RowBank
from editserver.engine.rule_table import RuleRun, RuleTable
from editserver.engine.rules import KeptBits, RuleStep
from editserver.engine.wire import RuleRecord, StepRecord
from interventions.program import STREAM, Payload, Read, feature_key

Array = npt.NDArray[Any]


@dataclass
class LayerOutcome:
    """What happened at one layer in this step, over the plan's compact tokens ``[n]``."""

    fired: Array
    dose: Array
    flags: Array


@dataclass
class Reading:
    """What one inspection saw in this step: float32 ``[n, features]``, int32 and float32 ``[n, k]``."""

    listed: Array
    top_index: Array
    top_value: Array


class EngineWorker:
    """Everything that one worker process needs in order to edit: rows, resident programs, the plan of the step.

    Attributes:
        config: what the server was started with.
        visits: how often each armed layer's op ran since :meth:`count_visits`; proves that the compiled graph calls it.
    """

    def __init__(self, config: EngineConfig, d_model: int, dtype: torch.dtype, max_tokens: int) -> None:
        self.config = config
        self.d_model = d_model
        self.dtype = dtype
        self.dictionaries = Dictionaries(config)
        self.bank = RowBank(config.bank_rows, d_model, self.dictionaries)
        self.residents = ResidentSet(self.dictionaries, config.armed)
        self.plan = Plan(max_tokens)
        self.visits: dict[int, int] = dict.fromkeys(config.armed, 0)
        self._outcomes: dict[int, LayerOutcome] = {}
        self._readings: dict[tuple[int, int], Reading] = {}
        self._delta = np.zeros((max_tokens, d_model), np.float32)
        self._closed = np.zeros(max_tokens, np.uint64)
        self._memory = HitMemory()
        self._kept = KeptBits()
        self._rules: RuleStep | None = None
        self._ran: set[int] = set()
        self._blocks: Blocks | None = None
        self._counting = False

    # -- requests -----------------------------------------------------------------------------------------------

    def add_request(
        self, request_id: str, payload: Payload, slots: list[int], prompt_len: int, prompt: Sequence[int] = ()
    ) -> None:
        """Make a request resident and its rows present. ``slots[i]`` belongs to ``payload.row_keys[i]``.

        ``prompt`` are its ``prompt_len`` tokens; programs that look for mentions need them.
        """
        keys = payload.row_keys
        self.bank.upload(keys, slots, payload.program.vectors if payload.program else {})
        resident = Resident(request_id, payload, prompt_len, dict(zip(keys, slots, strict=True)))
        history, rules = History.of(resident.selectors, prompt), RuleRun.of(payload.program)
        self.residents.add(replace(resident, history=history, rules=rules))

    def remove_request(self, request_id: str) -> None:
        """Forget a finished or aborted request."""
        self.residents.remove(request_id)

    @property
    def kept_bytes(self) -> int:
        """Memory of what gates and rules keep along with the KV cache."""
        return self._memory.n_bytes + self._kept.n_bytes

    # -- one step -----------------------------------------------------------------------------------------------

    def begin_step(
        self,
        request_ids: list[str],
        query_start: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int64],
        token_ids: Array,
        blocks: Blocks | None = None,
    ) -> None:
        """Plan the forward pass that follows; arguments as in :meth:`Plan.build`, and where the batch's KV lies.

        Without ``blocks``, a request with rules or behind a sequence gate must be computed from position 0 on.
        """
        self.idle_step()
        self._blocks = blocks
        self.plan.build(self.residents, request_ids, query_start, positions, token_ids)
        self._rules = RuleStep.of(self.residents.rules, self.plan, blocks, self._kept)

    def idle_step(self) -> None:
        """The forward pass that follows is a dummy: nothing is edited, nothing is reported."""
        self._outcomes.clear()
        self._readings.clear()
        self._ran.clear()
        self._rules = None
        self.plan.clear()

    def count_visits(self) -> None:
        """Count the ops' runs from now on (the handshake)."""
        self.visits = dict.fromkeys(self.config.armed, 0)
        self._counting = True

    def run(self, layer: int, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        """The op's body: edit and read at ``layer``, in place.

        Args:
            hidden: ``[tokens, d]``; with a ``residual``, the residual stream is their sum (most families).
            residual: ``[tokens, d]`` or None when ``hidden`` already is the residual stream.

        Writes collapse: ``residual' = dtype(h + delta)`` and ``hidden' = 0`` for the tokens with a non-zero delta; no
        other token is touched.
        """
        if self._counting:
            self.visits[layer] += 1
        plan = self.plan
        if not plan.active:
            return
        self._ran.add(layer)
        table = self.residents.layers[layer]
        reads = self.residents.reads[layer]
        ruled = self._rules.table(layer) if self._rules is not None else None
        if table is None and not reads and ruled is None:
            return
        if hidden.shape[-1] != self.d_model or hidden.shape[0] < plan.n:
            raise RuntimeError(
                f"layer {layer} returned a hidden state of shape {tuple(hidden.shape)} for a plan of {plan.n} tokens of "
                f"width {self.d_model}: this model's layers do not carry the whole residual stream"
            )
        if plan.dense:
            at: slice | torch.Tensor = slice(0, plan.n)
        else:
            at = plan.index
        stream = hidden[at].float()
        if residual is not None:
            stream = stream + residual[at].float()
        h = stream.to(self.dtype).float() if self.dtype != torch.float32 else stream
        demands = self._read([(i, n, read) for i, n, read in reads if not read.after], h)
        if table is None:
            if ruled is not None:
                self._open(layer, None, ruled, h, demands)
            else:
                serve(demands, self.dictionaries, h)
            edited = h
        else:
            composed = Composed.empty(plan.n, self.d_model, table)
            demands += composed.demands(table, plan, self.dictionaries, h, self.bank)
            opened = self._closed[: plan.n]
            if table.listeners or ruled is not None:
                opened = self._open(layer, table, ruled, h, demands)
                demands = composed.demands(table, plan, self.dictionaries, h, self.bank, opened)
            serve(demands, self.dictionaries, h)
            edited = self._edit(layer, table, composed, opened, h, at, hidden, residual)
        serve(self._read([(i, n, read) for i, n, read in reads if read.after], edited), self.dictionaries, edited)

    def _open(
        self,
        layer: int,
        table: LayerTable | None,
        ruled: RuleTable | None,
        h: torch.Tensor,
        demands: Sequence[Demand] = (),
    ) -> Array:
        """Gates open at each planned token, uint64 ``[n]``: what they hear in ``h``, and what the rules decide.

        ``demands`` of others are served along.
        """
        hearing = Hearing(layer, table, self.plan, self._memory, self._blocks) if table and table.listeners else None
        wanted = [*demands, *(hearing.demands(h, self.bank) if hearing else ())]
        if ruled is not None and self._rules is not None:
            wanted += self._rules.demands(ruled, h, self.bank)
        serve(wanted, self.dictionaries, h)
        opened = hearing.open() if hearing else np.zeros(self.plan.n, np.uint64)
        if ruled is not None and self._rules is not None:
            self._rules.decide(layer, ruled, opened)
        return opened

    def _edit(
        self,
        layer: int,
        table: LayerTable,
        composed: Composed,
        opened: Array,
        h: torch.Tensor,
        at: slice | torch.Tensor,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        n = self.plan.n
        outcome = LayerOutcome(np.zeros(n, np.uint64), np.zeros(n, np.float32), np.zeros(n, np.uint8))
        written = np.zeros(n, np.bool_)
        delta = self._delta[:n]
        count = edit_tokens(
            h.numpy(),
            self.plan.request,
            self.plan.selected,
            opened,
            table.width,
            composed.members,
            composed.joint,
            composed.joint_fired,
            table.programs,
            table.read,
            table.slot,
            table.norm,
            table.member,
            table.channel_ops,
            table.remaps,
            *table.ops,
            self.residents.dose,
            self.residents.refuses,
            self.bank.read.numpy(),
            self.bank.write.numpy(),
            self.bank.gate.numpy(),
            delta,
            outcome.fired,
            outcome.dose,
            outcome.flags,
            written,
        )
        self._outcomes[layer] = outcome
        if not count:
            return h
        stream = hidden if residual is None else residual
        if count == n:
            edited = (h + torch.from_numpy(delta)).to(self.dtype)
            stream[at] = edited
            if residual is not None:
                hidden[at] = 0
            return edited.float()
        rows = torch.from_numpy(np.flatnonzero(written))
        edited = (h[rows] + torch.from_numpy(delta[written])).to(self.dtype)
        target = rows if isinstance(at, slice) else at[rows]
        stream[target] = edited
        if residual is not None:
            hidden[target] = 0
        after = h.clone()
        after[rows] = edited.float()
        return after

    def _read(self, reads: list[tuple[int, int, Read]], h: torch.Tensor) -> list[Demand]:
        """Read ``h [n, d]`` as far as single rows tell; what needs whole dictionaries is returned, and comes with them."""
        demands: list[Demand] = []
        segments = {s.index: s for s in self.plan.segments} if reads else {}
        for index, number, read in reads:
            segment = segments.get(index)
            if segment is not None:
                demands += self._reading(segment, number, read, h[segment.tokens])
        return demands

    def _reading(self, segment: Segment, number: int, read: Read, h: torch.Tensor) -> list[Demand]:
        n = len(h)
        wanted = self.plan.selected[segment.tokens] & segment.resident.read_bit(number) != 0
        listed = np.full((n, len(read.features)), np.nan, np.float32)
        top_index = np.full((n, read.top_k), NOT_SELECTED, np.int32)
        top_value = np.zeros((n, read.top_k), np.float32)
        self._readings[segment.index, number] = Reading(listed, top_index, top_value)
        rows = np.flatnonzero(wanted)
        if read.sae == STREAM:
            listed[rows] = h.numpy()[rows][:, list(read.features)]
            return []
        sae = self.dictionaries[read.sae]
        if len(rows) and len(read.features) and sae.row_separable:
            slots = np.array([segment.resident.slots[feature_key(read.sae, f)] for f in read.features], np.int32)
            values = np.empty((len(rows), len(slots)), np.float32)
            norm = self.dictionaries.input_norm(read.sae)
            read_latents(h.numpy()[rows], slots, norm, self.bank.read.numpy(), self.bank.gate.numpy(), values)
            listed[rows] = values
        if not len(rows) or not (read.top_k or (len(read.features) and not sae.row_separable)):
            return []
        features = torch.tensor(read.features, dtype=torch.long)

        def take(here: slice, acts: torch.Tensor) -> None:
            if len(features) and not sae.row_separable:
                listed[rows[here]] = acts[:, features].numpy()
            if read.top_k:
                best = acts.abs().topk(min(read.top_k, sae.n_features), dim=1).indices
                top_index[rows[here], : best.shape[1]] = best.numpy()
                top_value[rows[here], : best.shape[1]] = acts.gather(1, best).numpy()

        return [Demand(read.sae, rows + segment.tokens.start, take)]

    def end_step(self) -> dict[str, StepRecord]:
        """Request id → what this step did to its tokens. Raises if an armed layer that had work did not run."""
        if not self.plan.active:
            return {}
        due = {layer for layer, table in self.residents.layers.items() if table is not None}
        due |= {layer for layer, table in self.residents.rules.tables.items() if table is not None}
        if missed := due - self._ran:
            raise RuntimeError(
                f"the edit op of layers {sorted(missed)} did not run in this step: the model is not armed"
            )
        records: dict[str, StepRecord] = {}
        rules = self._rules.records() if self._rules is not None else {}
        for segment in self.plan.segments:
            records[segment.resident.request_id] = self._record(segment, rules.get(segment.index))
        self.plan.clear()
        return records

    def _record(self, segment: Segment, rules: RuleRecord | None) -> StepRecord:
        program = segment.resident.payload.program
        outcomes = [self._outcomes[lp.layer] for lp in program.layers] if program else []
        tokens = segment.tokens
        reads: list[tuple[bytes, bytes, bytes]] = []
        for number in range(len(segment.resident.payload.reads)):
            reading = self._readings[segment.index, number]
            reads.append((reading.listed.tobytes(), reading.top_index.tobytes(), reading.top_value.tobytes()))
        return StepRecord(
            segment.first_position,
            tokens.stop - tokens.start,
            b"".join(o.fired[tokens].tobytes() for o in outcomes),
            b"".join(o.dose[tokens].tobytes() for o in outcomes),
            b"".join(o.flags[tokens].tobytes() for o in outcomes),
            tuple(reads),
            tuple(self._gates(segment.resident)),
            rules,
        )

    @staticmethod
    def _gates(resident: Resident) -> Iterator[tuple[int, float]]:
        """What the record says of each sequence gate."""
        for place in resident.sequence_gates:
            track = resident.tracks[place]
            yield track.open_from, track.largest
