"""Pipeline parallelism: every stage edits and reads at its own layers, and the last one tells of all.

A stage arms those of the configured layers that it has, and of a request's payload its engine gets what lies there
(:meth:`Stage.admit`). Nothing of a program may have to know what was read at another stage: rules and gates over a sequence
are refused. What a stage records goes on to the next one beside the hidden states, in vLLM's own ``IntermediateTensors``; the
last stage, which alone answers (vllm/v1/executor/multiproc_executor.py:345), joins all records of a request to the one that a
single worker would have made.

Every stage but the last waits for its own records before it hands on, and every stage but the first for those before it: the
host's work is not ahead of the device's there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from editserver.engine.engine import Engine
from editserver.engine.wire import KEY, StepRecord, Told, decode_step
from interventions.program import Payload


class Part(msgspec.Struct, frozen=True, array_like=True):
    """What one stage did in one step to one request's tokens.

    Attributes:
        reads: numbers of the payload's inspections that ``record.reads`` are of.
        record: of the stage's own layers.
    """

    request_id: str
    reads: tuple[int, ...]
    record: StepRecord


_parts = msgspec.msgpack.Decoder(list[Part])


def cut(payload: Payload, layers: Sequence[int]) -> tuple[Payload | None, tuple[int, ...]]:
    """What of ``payload`` lies at ``layers``, and the numbers of its inspections there; None where nothing does."""
    program = payload.program
    if program is not None:
        mine = tuple(one for one in program.layers if one.layer in layers)
        program = msgspec.structs.replace(program, layers=mine) if mine else None
    reads = tuple(i for i, read in enumerate(payload.reads) if read.layer in layers)
    if program is None and not reads:
        return None, ()
    return Payload(program, tuple(payload.reads[i] for i in reads), payload.digest), reads


def join(payload: Payload, parts: Sequence[Part]) -> StepRecord:
    """The record of one step of a request from its stages' own, in the order of the stages.

    Raises:
        RuntimeError: a layer or an inspection is in none of them.
    """
    first = parts[0].record
    layers = len(payload.program.layers) if payload.program is not None else 0
    fired, dose, clamped = (
        b"".join(getattr(part.record, name) for part in parts) for name in ("fired", "dose", "clamped")
    )
    reads = {number: read for part in parts for number, read in zip(part.reads, part.record.reads, strict=True)}
    alike = all((part.record.start, part.record.n) == (first.start, first.n) for part in parts)
    if not alike or len(clamped) != layers * first.n or sorted(reads) != list(range(len(payload.reads))):
        raise RuntimeError(f"the stages' records of request {parts[0].request_id} are not of all its layers")
    return StepRecord(
        first.start, first.n, fired, dose, clamped, tuple(reads[number] for number in range(len(payload.reads)))
    )


def _parts_of(told: Told, reads: Mapping[str, tuple[int, ...]]) -> list[Part]:
    return [Part(name, reads[name], record) for name, record in decode_step(told).items()]


def _packed(parts: list[Part], ranks: int) -> torch.Tensor:
    """uint8, on the host: the padding's length, the parts, the padding.

    No multiple of ``ranks``: of such a tensor vLLM would send each rank's share alone, and gather it on the device
    (``GroupCoordinator._should_use_all_gather``).
    """
    encoded = msgspec.msgpack.encode(parts)
    padding = int(ranks > 1 and (len(encoded) + 1) % ranks == 0)
    return torch.frombuffer(bytearray(bytes([padding]) + encoded + bytes(padding)), dtype=torch.uint8)


def _unpacked(sent: torch.Tensor) -> list[Part]:
    data = sent.numpy().tobytes()
    return _parts.decode(data[1 : len(data) - data[0]])


@dataclass
class Stage:
    """One worker's place in the pipeline.

    Attributes:
        armed: the configured layers that lie here.
        ranks: of tensor parallelism, of each stage; all of them record the same, and hand it on.
    """

    armed: tuple[int, ...]
    ranks: int = 1
    _payloads: dict[str, Payload] = field(default_factory=dict)
    _reads: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _earlier: list[Part] = field(default_factory=list)

    def admit(self, request_id: str, payload: Payload, slots: Sequence[int]) -> tuple[Payload | None, list[int]]:
        """What this stage's engine is to do for a request, and its bank slots; None for nothing."""
        own, reads = cut(payload, self.armed)
        self._payloads[request_id], self._reads[request_id] = payload, reads
        if own is None:
            return None, []
        slot = dict(zip(payload.row_keys, slots, strict=True))
        return own, [slot[key] for key in own.row_keys]

    def forget(self, request_id: str) -> None:
        """The request finished, or was preempted; unknown ids are ignored."""
        self._payloads.pop(request_id, None)
        self._reads.pop(request_id, None)

    def receive(self, tensors: dict[str, Any] | None) -> None:
        """Take the earlier stages' records of the step that follows out of what came with the hidden states."""
        sent = tensors.pop(KEY, None) if tensors is not None else None
        self._earlier = [] if sent is None else _unpacked(sent)

    def send(self, worker: Engine | None, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """``tensors`` for the next stage, with the records of this step: the earlier stages' and this one's. Waits for them."""
        finished = worker.finish() if worker is not None else None
        own = finished() if finished is not None else {}
        parts = [*self._earlier, *_parts_of(own, self._reads)]
        self._earlier = []
        if not parts:
            return dict(tensors)
        return dict(tensors) | {KEY: _packed(parts, self.ranks)}

    def joined(self, finished: Callable[[], Told] | None) -> Callable[[], Told] | None:
        """All stages' records of the step behind the last one: ``finished`` makes this stage's own, None where it has none."""
        earlier, self._earlier = self._earlier, []
        if finished is None and not earlier:
            return None
        payloads, reads = dict(self._payloads), dict(self._reads)  # they may be gone when the records are asked for

        def records() -> Told:
            own = finished() if finished is not None else {}
            by_name: dict[str, list[Part]] = {}
            for part in [*earlier, *_parts_of(own, reads)]:
                by_name.setdefault(part.request_id, []).append(part)
            return {name: join(payloads[name], found) for name, found in by_name.items()}

        return records


_stage: Stage | None = None


def install(stage: Stage | None) -> None:
    """Make ``stage`` this process's place in the pipeline; None where there is no pipeline."""
    global _stage
    _stage = stage


def current() -> Stage | None:
    """This process's place in the pipeline, if there is one."""
    return _stage


def stage_of(vllm_config: Any, armed: Sequence[int], layers: Sequence[int]) -> Stage | None:
    """The stage of a worker that has ``layers`` of the model, whose configured layers are ``armed``."""
    if vllm_config.parallel_config.pipeline_parallel_size == 1:
        return None
    ranks = int(vllm_config.parallel_config.tensor_parallel_size)
    return Stage(tuple(layer for layer in armed if layer in layers), ranks)
