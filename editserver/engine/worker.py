"""One worker's engine: what the custom op calls, and what each step reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from editserver.engine import memory, native
from editserver.engine.batch import BlockTable, StepBatch
from editserver.engine.config import EngineConfig
from editserver.engine.decode import Decoding, readable
from editserver.engine.full_encode import Composed, Demand, serve
from editserver.engine.gates import Blocks, Hearing, HitMemory
from editserver.engine.history import History
from editserver.engine.journal import NOT_SELECTED
from editserver.engine.kernel_cpu import (
    BFLOAT16,
    FLOAT32,
    PREPARED,
    A,
    edit_tokens,
    load_tokens,
    read_latents,
    read_listed,
)
from editserver.engine.kernel_plan import ASK, EDIT, NOTHING
from editserver.engine.layer_table import LayerTable
from editserver.engine.memory import Footprint
from editserver.engine.outcome import Outcomes
from editserver.engine.plan import Plan, Segment
from editserver.engine.read_table import is_listed
from editserver.engine.resident import Resident, ResidentSet
from editserver.engine.rows import Dictionaries, RowBank
from editserver.engine.rule_table import RuleRun, RuleTable
from editserver.engine.rules import KeptBits, RuleStep
from editserver.engine.wire import RuleRecord, StepRecord, Told, decode_step
from interventions.program import Payload, Read, feature_key

Array = npt.NDArray[Any]


FORMS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}
"""Types that the kernel reads and writes itself."""


@dataclass
class Reading:
    """What one inspection saw in this step: float32 ``[n, features]``, int32 and float32 ``[n, k]``."""

    listed: Array
    top_index: Array
    top_value: Array


class Stream(NamedTuple):
    """The residual stream at one layer: the model's tensors, and how the kernel finds it (:func:`edit_tokens`)."""

    form: int
    hidden: torch.Tensor
    residual: torch.Tensor | None
    hidden_at: int
    residual_at: int


class EngineWorker:
    """Everything that one worker process needs in order to edit: rows, resident programs, the plan of the step.

    Attributes:
        config: what the server was started with.
        jobs: what the C++ op may do without asking; None: every op comes to :meth:`run`.
    """

    def __init__(
        self, config: EngineConfig, d_model: int, dtype: torch.dtype, max_tokens: int, drafts: int = 0
    ) -> None:
        """``drafts``: most draft tokens of one request in one step (speculation)."""
        self.config = config
        self.d_model = d_model
        self.dtype = dtype
        self.dictionaries = Dictionaries(config)
        self.bank = RowBank(config.bank_rows, d_model, self.dictionaries)
        self.residents = ResidentSet(self.dictionaries, config.armed)
        self.plan = Plan(max_tokens)
        self._visits: dict[int, int] = dict.fromkeys(config.armed, 0)
        self._outcomes = Outcomes(config.armed, max_tokens)
        self._readings: dict[tuple[int, int], Reading] = {}
        self._listed: dict[tuple[int, bool], Array] = {}
        self._form = FORMS.get(dtype, PREPARED)
        self._h = np.empty((max_tokens, d_model), np.float32)
        self._row, self._delta = (np.empty((1, d_model), np.float32) for _ in range(2))
        self._written = np.zeros(max_tokens, np.bool_)
        self._closed = np.zeros(max_tokens, np.uint64)
        self._nothing = Composed.empty(0, d_model, 0, False)
        self._rows = self.bank.read.numpy(), self.bank.write.numpy(), self.bank.gate.numpy()
        self._memory = HitMemory()
        self._kept = KeptBits()
        self._rules: RuleStep | None = None
        self._ran: set[int] = set()
        self._blocks: Blocks | None = None
        self._counting = False
        self._facts = drafts + 1
        self.agree: Callable[[torch.Tensor], None] | None = None
        self.jobs: native.Jobs | None = None
        self._known = -1
        self._resting = False
        self._alone = False
        """Whether the C++ op does all of this step."""
        self._decoding: Decoding | None = None
        self._decodes: Decoding | None = None
        """The one of this step."""
        self._latest: tuple[int, Sequence[str]] = (-1, ())
        """Version of the residents and requests of the latest step in which each had one token."""

    # -- requests -----------------------------------------------------------------------------------------------

    def add_request(
        self, request_id: str, payload: Payload, slots: list[int], prompt_len: int, prompt: Sequence[int] = ()
    ) -> None:
        """Make a request resident and its rows present. ``slots[i]`` belongs to ``payload.row_keys[i]``.

        ``prompt`` are its ``prompt_len`` tokens; programs that look for mentions need them.
        """
        keys = payload.row_keys
        self.bank.upload(keys, slots, payload.program.vectors if payload.program else {})
        named, history = dict(zip(keys, slots, strict=True)), History.of(payload.selectors, prompt)
        rules = RuleRun.of(payload.program)
        self.residents.add(Resident(request_id, payload, prompt_len, named, history, rules=rules))

    def remove_request(self, request_id: str) -> None:
        """Forget a finished or aborted request."""
        self.residents.remove(request_id)

    def footprint(self) -> Footprint:
        """What this engine keeps in memory, at most."""
        whole = [self.dictionaries[digest] for digest in self.dictionaries.whole]
        return memory.on_cpu(self.config, self.d_model, len(self._h), whole)

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
        self._start()
        self._blocks = blocks
        self.plan.build(self.residents, request_ids, query_start, positions, token_ids)
        self._rules = RuleStep.of(self.residents.rules, self.plan, blocks, self._kept)
        if not self.plan.active:
            self._rest()
        elif self.jobs is not None:
            self._prepare(self.jobs)

    def _start(self) -> None:
        """Of the step before nothing is left."""
        self._outcomes.begin()
        self._readings.clear()
        self._listed.clear()
        self._ran.clear()
        self._rules = self._decodes = None
        self._resting = self._alone = False

    def _prepare(self, jobs: native.Jobs) -> None:
        """Say what is due at each layer, and with which arguments, where no reading, rule or gate has a part in it."""
        if self._rules is not None or self.agree is not None or self._form == PREPARED:
            jobs.say(ASK)
            return
        if self._known != self.residents.version:
            self._known = self.residents.version
            jobs.know(*self._due())
        jobs.begin(self.plan.n, self.plan.stop)
        self._alone = jobs.alone

    def give_jobs(self) -> None:
        """Have the C++ op, which is loaded, take what it can off this engine's hands."""
        self.jobs = native.Jobs(self.config.armed, self.d_model, self.dtype)
        read, write, gate = self._rows
        plan = self.plan
        for layer in self.config.armed:
            fired, dose, flags = self._outcomes.layers[layer]
            arguments: dict[int, int | Array] = {
                A.form: self._form,
                A.d: self.d_model,
                A.tokens: len(plan.all_places),
                A.slots: len(read),
                A.places: plan.all_places,
                A.scratch: self._row,
                A.delta: self._delta,
                A.token_program: plan.all_requests,
                A.token_selected: plan.all_selected,
                A.token_open: self._closed,
                A.bank_read: read,
                A.bank_write: write,
                A.bank_gate: gate,
                A.fired: fired,
                A.dose: dose,
                A.flags: flags,
                A.written: self._written,
            }
            self.jobs.always(layer, arguments)

    def _due(self) -> tuple[dict[int, int], dict[int, dict[int, int]]]:
        """What is due at each layer as long as the residents are the same, and no rules run; and arguments of the kernel."""
        due: dict[int, int] = {}
        arguments: dict[int, dict[int, int]] = {}
        residents = self.residents
        dose, refuses = residents.dose_addresses
        for layer, table in residents.layers.items():
            reads = residents.reads[layer]
            if table is None or reads or table.uses or table.listeners:
                due[layer] = NOTHING if table is None and not reads else ASK
                continue
            due[layer] = EDIT
            programs, channels, channel_ops, op_ints, op_values, op_masks = table.addresses
            arguments[layer] = {
                A.width: table.width,
                A.residents: len(residents.dose),
                A.channels: len(table.channels),
                A.ops: len(table.op_ints),
                A.programs: programs,
                A.channel_rows: channels,
                A.channel_ops: channel_ops,
                A.op_ints: op_ints,
                A.op_values: op_values,
                A.op_masks: op_masks,
                A.program_dose: dose,
                A.program_refuses: refuses,
            }
        return due, arguments

    def begin(self, batch: StepBatch) -> None:
        """:meth:`begin_step` for a batch that lies on the host."""
        names, decoding = batch.request_ids, self._decoding
        if not self.residents.requests:
            self.idle_step()
            return
        if decoding is not None and batch.single and decoding.goes_on(self.residents, names):
            self._start()
            decoding.begin(batch.positions, batch.token_ids)
            self.plan.resume(decoding.n, decoding.stop)
            self._decodes = decoding
            return
        n = batch.n_tokens
        self.begin_step(
            list(names),
            batch.query_start[: len(names) + 1].numpy(),
            batch.positions[:n].numpy(),
            batch.token_ids[:n].numpy(),
            self._blocks_of(batch),
        )
        self._decoding = self._next_decoding(batch)

    def _blocks_of(self, batch: StepBatch) -> Blocks | None:
        """Where the batch's KV lies, as far as somebody here keeps something along with it."""
        self.residents.refresh()
        table = batch.blocks() if self.residents.remembers else None
        return None if table is None else Blocks(table.blocks.numpy(), table.block_size, table.n_slots)

    def _next_decoding(self, batch: StepBatch) -> Decoding | None:
        """What steps like this one may go on with. It pays where there are several of them: from the third on."""
        if self.jobs is None or not (self._alone and batch.single and readable(batch.positions, batch.token_ids)):
            return None
        latest, self._latest = self._latest, (self.residents.version, list(batch.request_ids))
        if latest != self._latest or any(segment.resident.history is not None for segment in self.plan.segments):
            return None
        return Decoding(self.residents, batch.request_ids, self.plan, self._outcomes, self.jobs)

    def attach(self, table: BlockTable, slot_mapping: torch.Tensor) -> None:
        """Nothing: every step says where its KV lies."""

    def idle_step(self, single: bool = False) -> None:
        """The forward pass that follows is a dummy: nothing is edited, nothing is reported."""
        if not self._resting:
            self._rest()

    def _rest(self) -> None:
        """Nothing is planned."""
        self.plan.clear()
        if self.jobs is not None:
            self.jobs.say(ASK if self._counting else NOTHING)
        self._resting = True

    def count_visits(self) -> None:
        """Count the ops' runs in dummy batches from now on (the handshake)."""
        self._visits = dict.fromkeys(self.config.armed, 0)
        self._counting = True
        self._rest()

    @property
    def visits(self) -> dict[int, int]:
        """How often each armed layer's op ran since :meth:`count_visits`, and no more of that: the compiled graph calls it."""
        self._counting = False
        self._rest()
        return self._visits

    def run(self, layer: int, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        """The op's body: edit and read at ``layer``, in place.

        Args:
            hidden: ``[tokens, d]``; with a ``residual``, the residual stream is their sum (most families).
            residual: ``[tokens, d]`` or None when ``hidden`` already is the residual stream.

        Writes collapse: ``residual' = dtype(h + delta)`` and ``hidden' = 0`` for the tokens with a non-zero delta; no
        other token is touched.
        """
        if self._counting:
            self._visits[layer] += 1
        plan = self.plan
        if not plan.active:
            return
        self._ran.add(layer)
        residents = self.residents
        table, reads = residents.layers[layer], residents.reads[layer]
        ruled = self._rules.table(layer) if self._rules is not None else None
        if table is None and not reads and ruled is None:
            return
        if hidden.shape[-1] != self.d_model or hidden.shape[0] < plan.stop:
            raise RuntimeError(
                f"layer {layer} returned a hidden state of shape {tuple(hidden.shape)} for a plan up to token {plan.stop} "
                f"of width {self.d_model}: this model's layers do not carry the whole residual stream"
            )
        stream = self._stream(hidden, residual)
        if self.agree is None and table is not None and not (reads or ruled or table.uses or table.listeners):
            self._edit(layer, table, self._nothing, self._closed, stream, stream.form == PREPARED)
            return
        h = torch.from_numpy(self._h[: plan.n])
        if stream.form != PREPARED:
            load_tokens(stream.form, stream.hidden_at, stream.residual_at, plan.places, self._h[: plan.n])
        if self.agree is not None:
            self.agree(h)
        demands = self._read(layer, reads, False, h)
        if table is None:
            if ruled is not None:
                self._open(layer, None, ruled, h, demands)
            else:
                serve(demands, self.dictionaries, h)
        else:
            composed = Composed.empty(plan.n, self.d_model, table.n_members, table.has_joint)
            demands += composed.demands(table, plan, self.dictionaries, h, self.bank)
            opened = self._closed
            if table.listeners or ruled is not None:
                opened = self._open(layer, table, ruled, h, demands)
                demands = composed.demands(table, plan, self.dictionaries, h, self.bank, opened)
            serve(demands, self.dictionaries, h)
            self._edit(layer, table, composed, opened, stream, True)
        serve(self._read(layer, reads, True, h), self.dictionaries, h)

    def _stream(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> Stream:
        """What the kernel needs to know of the layer's tensors; what it cannot read is read for it."""
        readable = hidden.dtype is self.dtype and hidden.is_contiguous()
        if residual is not None:
            readable = readable and residual.dtype is self.dtype and residual.is_contiguous()
        if readable and self._form != PREPARED:
            return Stream(
                self._form, hidden, residual, hidden.data_ptr(), 0 if residual is None else residual.data_ptr()
            )
        index = torch.from_numpy(self.plan.places)
        h = hidden[index].float()
        if residual is not None:
            h += residual[index].float()
        self._h[: self.plan.n] = h.to(self.dtype).float().numpy()
        return Stream(PREPARED, hidden, residual, 0, 0)

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
        hearing = None
        if table is not None and table.listeners:
            hearing = Hearing(layer, table, self.plan, self._memory, self._blocks, self._facts)
        wanted = [*demands, *(hearing.demands(h, self.bank) if hearing else ())]
        if ruled is not None and self._rules is not None:
            wanted += self._rules.demands(ruled, h, self.bank)
        serve(wanted, self.dictionaries, h)
        opened = hearing.open() if hearing else np.zeros(self.plan.n, np.uint64)
        if ruled is not None and self._rules is not None:
            self._rules.decide(layer, ruled, opened)
        return opened

    def _edit(
        self, layer: int, table: LayerTable, composed: Composed, opened: Array, stream: Stream, loaded: bool
    ) -> None:
        """Edit the tensors; and the stream before it, where ``loaded``, becomes the stream after it."""
        residents, plan = self.residents, self.plan
        read, write, gate = self._rows
        count = edit_tokens(
            stream.form,
            stream.hidden_at,
            stream.residual_at,
            plan.n,
            plan.all_places,
            loaded,
            self._h if loaded else self._row,
            plan.all_requests,
            plan.all_selected,
            opened,
            table.width,
            composed.members,
            composed.joint,
            composed.joint_fired,
            table.programs,
            table.channels,
            table.channel_ops,
            table.op_ints,
            table.op_values,
            table.op_masks,
            residents.dose,
            residents.refuses,
            read,
            write,
            gate,
            self._delta,
            *self._outcomes.layers[layer],
            self._written,
        )
        if stream.form != PREPARED or not count:
            return
        rows = np.flatnonzero(self._written[: plan.n])
        places, edited = torch.from_numpy(plan.places[rows]), torch.from_numpy(self._h[rows]).to(self.dtype)
        self._h[rows] = edited.float().numpy()
        if stream.residual is None:
            stream.hidden[places] = edited
        else:
            stream.residual[places] = edited
            stream.hidden[places] = 0

    def _read(self, layer: int, reads: list[tuple[int, int, Read]], after: bool, h: torch.Tensor) -> list[Demand]:
        """Read ``h [n, d]`` as far as single rows tell; what needs whole dictionaries is returned, and comes with them."""
        demands: list[Demand] = []
        table = self.residents.listed.get((layer, after))
        if table is not None:
            found = self._listed[layer, after] = np.empty((len(h), table.width), np.float32)
            which = self.plan.request, self.plan.selected
            read_listed(h.numpy(), *which, table.pointers, table.rows, table.bits, self._rows[0], self._rows[2], found)
        segments: dict[int, Segment] | None = None
        for index, number, read in reads:
            if read.after is not after or is_listed(read, self.dictionaries):
                continue
            if segments is None:
                segments = {s.index: s for s in self.plan.segments}
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
        sae = self.dictionaries[read.sae]
        if len(rows) and len(read.features) and sae.row_separable:
            slots = np.array([segment.resident.slots[feature_key(read.sae, f)] for f in read.features], np.int32)
            values = np.empty((len(rows), len(slots)), np.float32)
            norm = self.dictionaries.input_norm(read.sae)
            read_latents(h.numpy()[rows], slots, norm, self._rows[0], self._rows[2], values)
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

    def finish(self) -> Callable[[], Told] | None:
        """The records of the step behind us, made at once; None where nothing was planned."""
        if not self.plan.active:
            return None
        told: Told = self.end_step() if self._decodes is None else self._end(self._decodes)
        return lambda: told

    def _end(self, decoding: Decoding) -> bytes:
        """Of a step of ``decoding``: the records."""
        told = decoding.end()
        if told is None:  # the op came to Python for some layers: its tensors were others than before
            self._check_ran()
            told = decoding.end(certain=True)
            assert told is not None
        self.plan.clear()
        self._resting = True
        return told

    def _check_ran(self) -> None:
        if self.jobs is not None:
            self._ran |= self.jobs.ran
        if missed := self.residents.due - self._ran:
            raise RuntimeError(
                f"the edit op of layers {sorted(missed)} did not run in this step: the model is not armed"
            )

    def end_step(self) -> dict[str, StepRecord]:
        """Request id → what this step did to its tokens. Raises if an armed layer that had work did not run."""
        if not self.plan.active:
            return {}
        if self._decodes is not None:
            return decode_step(self._end(self._decodes))
        self._check_ran()
        records: dict[str, StepRecord] = {}
        rules = self._rules.records() if self._rules is not None else {}
        for segment in self.plan.segments:
            records[segment.resident.request_id] = self._record(segment, rules.get(segment.index))
        self._rest()
        return records

    def _record(self, segment: Segment, rules: RuleRecord | None) -> StepRecord:
        resident, tokens = segment.resident, segment.tokens
        fired = dose = clamped = b""
        if resident.edited:
            fired, dose, clamped = self._outcomes.tell(resident.edited, tokens, self.plan.n)
        reads: tuple[tuple[bytes, bytes, bytes], ...] = ()
        if resident.payload.reads:
            reads = tuple(self._told(segment, number, read) for number, read in enumerate(resident.payload.reads))
        facts: tuple[tuple[tuple[int, float], ...], ...] = ()
        if resident.sequence_gates:
            facts = tuple(resident.tracks[place].facts for place in resident.sequence_gates)
        return StepRecord(segment.first_position, tokens.stop - tokens.start, fired, dose, clamped, reads, facts, rules)

    def _told(self, segment: Segment, number: int, read: Read) -> tuple[bytes, bytes, bytes]:
        columns = self.residents.columns(segment.index, read.layer, read.after).get(number)
        if columns is not None:
            listed = self._listed[read.layer, read.after][segment.tokens, columns[0] : columns[1]]
            return listed.tobytes(), b"", b""
        reading = self._readings[segment.index, number]
        return reading.listed.tobytes(), reading.top_index.tobytes(), reading.top_value.tobytes()
