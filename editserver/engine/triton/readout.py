"""What a step did, on its way from the device to the step records of ``editserver.engine.wire``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch

from editserver.engine.resident import Resident
from editserver.engine.triton.encode import TakenTops
from editserver.engine.triton.rules import TakenRules
from editserver.engine.triton.step import DeviceStep
from editserver.engine.wire import RuleRecord, StepRecord
from interventions.maps.gates import STEP
from interventions.program import GateKind


@dataclass(frozen=True)
class Taken:
    """One step's outcome; on the host when ``event`` has happened.

    Attributes:
        planned: number of the step's plan.
        requests: the batch's rows; None for those without programs and inspections.
        buffers: names of :class:`DeviceStep`'s attributes → what was in them.
        readings: (layer, "before" or "after") → fp32 ``[tokens, columns]``.
        event: when the copies are done; None where they are.
        rules, tops: what rules said, the largest activations; None where nobody has or asked for any.
    """

    step: DeviceStep
    planned: int
    requests: tuple[Resident | None, ...]
    buffers: dict[str, torch.Tensor]
    readings: dict[tuple[int, str], torch.Tensor]
    event: torch.cuda.Event | None
    rules: TakenRules | None = None
    tops: TakenTops | None = None

    @property
    def arrived(self) -> bool:
        """Whether the copies are done."""
        return self.event is None or self.event.query()

    def prove(self) -> None:
        """Raise RuntimeError where an armed layer did not run by the step's plan; waits for the copies."""
        if self.event is not None:
            self.event.synchronize()
        ran = self.buffers["ran"].tolist()
        if missed := [layer for layer in self.step.layers if ran[self.step.number(layer)] != self.planned]:
            raise RuntimeError(
                f"the edit op of layers {sorted(missed)} did not run in this step: the model is not armed"
            )

    def records(self) -> dict[str, StepRecord]:
        """Request id → record, as the plan on the device had the rows. Waits and raises as :meth:`prove`."""
        self.prove()
        found = {}
        for row, resident in enumerate(self.requests):
            first, last, _, start = self.buffers["rows"][:, row].tolist()
            if resident is not None and first < last:
                found[resident.request_id] = self._record(resident, row, slice(first, last), start)
        return found

    def _record(self, resident: Resident, row: int, tokens: slice, start: int) -> StepRecord:
        program = resident.payload.program
        layers = [self.step.number(lp.layer) for lp in program.layers] if program else []
        n = tokens.stop - tokens.start
        return StepRecord(
            start,
            n,
            self.buffers["fired"][layers, tokens].numpy().tobytes(),
            self.buffers["dose"][layers, tokens].numpy().tobytes(),
            self.buffers["flags"][layers, tokens].numpy().astype(np.uint8).tobytes(),
            tuple(
                (self._listed(resident, number, tokens), *self._top(resident, number, tokens))
                for number in range(len(resident.payload.reads))
            ),
            self._facts(resident, row, n),
            self._ruled(resident, row, tokens, start),
        )

    def _listed(self, resident: Resident, number: int, tokens: slice) -> bytes:
        """One inspection's columns: they lie behind those of the request's earlier ones of the same kind."""
        reads = resident.payload.reads
        mine = reads[number]
        begin = sum(len(r.features) for r in reads[:number] if (r.layer, r.after) == (mine.layer, mine.after))
        columns = self.readings[mine.layer, "after" if mine.after else "before"]
        return columns[tokens, begin : begin + len(mine.features)].contiguous().numpy().tobytes()

    def _top(self, resident: Resident, number: int, tokens: slice) -> tuple[bytes, bytes]:
        """One inspection's largest activations, int32 and float32 ``[n, top_k]``, by magnitude."""
        read = resident.payload.reads[number]
        if not read.top_k or self.tops is None:
            return b"", b""
        return self.tops.of(read, resident.request_id, resident.read_bit(number), tokens)

    def _ruled(self, resident: Resident, row: int, tokens: slice, start: int) -> RuleRecord | None:
        if self.rules is None or resident.rules is None:
            return None
        return self.rules.record(resident.rules.program, row, tokens, start)

    def _facts(self, resident: Resident, row: int, n: int) -> tuple[tuple[tuple[int, float], ...], ...]:
        """Of each sequence gate, after each of the last tokens."""
        program = resident.payload.program
        told = []
        for layer in program.layers if program else ():
            number = self.step.number(layer.layer)
            for place, gate in enumerate(one for one in layer.gates if one.over_sequence):
                scale = STEP if gate.kind is GateKind.CUSUM else 1.0
                since = self.buffers["open_from"][number, row, place, -n:].tolist()
                largest = (self.buffers["largest"][number, row, place, -n:] * scale).tolist()
                told.append(tuple(zip(since, largest, strict=True)))
        return tuple(told)


def take(
    step: DeviceStep,
    requests: Sequence[Resident | None],
    tokens: int,
    known: Mapping[str, Sequence[int]] = MappingProxyType({}),
) -> Taken:
    """Start copying what the forward pass before this call did, behind it on the current stream and without waiting.

    Args:
        requests: of each row of the batch, in order.
        tokens: of the batch.
        known: by request, the tokens that it came with; those with rules that come with more than their prompts must be named.
    """
    on_gpu = step.state.is_cuda

    def copied(source: torch.Tensor) -> torch.Tensor:
        target = torch.empty(source.shape, dtype=source.dtype, pin_memory=on_gpu)
        return target.copy_(source, non_blocking=True)

    rows = len(requests)
    programs = [one.payload.program for one in requests if one is not None and one.payload.program is not None]
    buffers = {"rows": copied(step.rows[:, :rows]), "ran": copied(step.ran[:, 0])}
    if programs:
        buffers |= {name: copied(getattr(step, name)[:, :tokens]) for name in ("fired", "dose", "flags")}
    if any(gate.over_sequence for program in programs for layer in program.layers for gate in layer.gates):
        buffers |= {name: copied(getattr(step, name)[:, :rows]) for name in ("open_from", "largest")}
    widths: dict[tuple[int, str], int] = {}
    for one in requests:
        own: dict[tuple[int, str], int] = {}
        for read in one.payload.reads if one is not None else ():
            key = (read.layer, "after" if read.after else "before")
            own[key] = own.get(key, 0) + len(read.features)
        widths |= {key: max(width, widths.get(key, 0)) for key, width in own.items()}
    readings = {key: copied(step.readings[key][:tokens, :width]) for key, width in widths.items()}
    rules = None
    if step.rules is not None and step.cache is not None:
        rules = step.rules.take(step.cache, requests, tokens, known, copied)
    tops = step.encode.take(step.selected, requests, tokens, copied) if step.encode is not None else None
    event = torch.cuda.Event() if on_gpu else None
    if event is not None:
        event.record()
    buffers.setdefault("fired", torch.empty(0, 0, dtype=torch.int64))
    buffers.setdefault("dose", torch.empty(0, 0))
    buffers.setdefault("flags", torch.empty(0, 0, dtype=torch.int32))
    return Taken(step, step.planned, tuple(requests), buffers, readings, event, rules, tops)
