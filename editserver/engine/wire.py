"""What crosses the process borders: the request's payload on the way in, step records on the way out.

In: ``SamplingParams.extra_args[KEY]`` = bytes of :class:`interventions.program.Payload`.
Out: per request and step one :class:`StepRecord`, those of a step together from the worker to the core; the core passes a list
of them with each output of the request.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

KEY = "editserver"
"""Our key in ``extra_args``, ``additional_config`` and ``kv_transfer_params``."""


class RuleRecord(msgspec.Struct, frozen=True, array_like=True):
    """What one request's rules said in one step. Bits in 64-bit words, little-endian: bit i of word w is number 64·w + i.

    ``held``, ``concluded`` and ``active`` cover the positions from ``first`` to the step's last, ``covered`` of them.
    """

    first: int
    """Before the step's own ``start`` where the state was not at hand: behind a cached prefix, after a preemption, after
    rejected drafts."""
    held: bytes
    """uint64 ``[covered, words]``: propositions of ``Program.rules``."""
    concluded: bytes
    """uint64 ``[covered, words]``: conclusions."""
    active: bytes
    """uint64 ``[covered, words]``: actions."""
    scores: bytes
    """float32: at the step's own positions, of each proposition that holds; by position, then number of the proposition."""

    def cut(self, start: int, n: int, dropped: int) -> RuleRecord:
        """Without the last ``dropped`` of the positions ``start … start + n − 1``, the step's own."""
        covered = start + n - self.first
        held, concluded, active = (
            bits[: len(bits) // covered * (covered - dropped)] for bits in (self.held, self.concluded, self.active)
        )
        own = np.frombuffer(held, np.uint8)[len(self.held) // covered * (start - self.first) :]
        return RuleRecord(self.first, held, concluded, active, self.scores[: 4 * int(np.unpackbits(own).sum())])


class StepRecord(msgspec.Struct, frozen=True, array_like=True):
    """What one step did to the tokens at positions ``start … start + n - 1`` of one request.

    Arrays are little-endian and row-major. ``layers`` counts the program's own layers, in program order.
    """

    start: int
    n: int
    fired: bytes
    """uint64 ``[layers, n]``: bit i = intervention i changed something at this token and layer."""
    dose: bytes
    """float32 ``[layers, n]``: ||delta|| / ||h||."""
    clamped: bytes
    """uint8 ``[layers, n]``: 1 where the dose was scaled down, 2 where it exceeds a refusing program's bound."""
    reads: tuple[tuple[bytes, bytes, bytes], ...] = ()
    """Per inspection: float32 ``[n, features]``, then top-k int32 ``[n, k]`` and float32 ``[n, k]``."""
    gates: tuple[tuple[tuple[int, float], ...], ...] = ()
    """Per sequence gate, the program's layers in order, at the last of the step's tokens (as many as may turn out to be
    rejected drafts, and one): first position at which it was open so far (-1: never) and its largest statistic so far."""
    rules: RuleRecord | None = None
    """Of a program with rules."""

    def cut(self, n: int) -> StepRecord:
        """What was done to the first ``n`` tokens; the others turned out not to be the request's (rejected drafts)."""
        dropped = self.n - n
        if dropped <= 0:
            return self

        def head(rows: bytes) -> bytes:
            return rows[: len(rows) // self.n * n]

        return StepRecord(
            self.start,
            n,
            _cut(self.fired, np.uint64, self.n, n),
            _cut(self.dose, np.float32, self.n, n),
            _cut(self.clamped, np.uint8, self.n, n),
            tuple((head(listed), head(index), head(value)) for listed, index, value in self.reads),
            tuple(facts[:-dropped] for facts in self.gates),
            None if self.rules is None else self.rules.cut(self.start, self.n, dropped),
        )


def _cut(data: bytes, dtype: type[np.generic], before: int, n: int) -> bytes:
    """The first ``n`` columns of ``[layers, before]``."""
    return np.frombuffer(data, dtype).reshape(-1, before)[:, :n].tobytes()


_records = msgspec.msgpack.Decoder(list[StepRecord])
_step = msgspec.msgpack.Decoder(dict[str, StepRecord])


Told = dict[str, StepRecord] | bytes
"""The records of one step, by request id; or the same in the form that they are sent in."""


def encode_step(told: Told) -> bytes:
    """Serialise the records of one step: a worker's output is pickled, and many small objects in it are slow."""
    return told if isinstance(told, bytes) else msgspec.msgpack.encode(told)


def decode_step(told: Told) -> dict[str, StepRecord]:
    """Inverse of :func:`encode_step`."""
    return _step.decode(told) if isinstance(told, bytes) else told


def form_of(request_id: str, layers: int) -> tuple[bytes, int]:
    """One request's share of an encoded step in which it has one token, for others to fill in, and where in it the position
    stands (8 bytes, big-endian; :func:`editserver.engine.kernel_plan.tell_tokens` knows where the rest does).

    ``layers``: of its program. It has no inspections, rules or gates over a sequence.
    """
    name = msgspec.msgpack.encode(request_id)
    record = StepRecord(_ANY_POSITION, 1, bytes(8 * layers), bytes(4 * layers), bytes(layers))
    return name + msgspec.msgpack.encode(record), len(name) + 2


def step_of(forms: Sequence[bytes]) -> bytes:
    """An encoded step of these requests."""
    n = len(forms)
    head = bytes([0x80 | n]) if n < 16 else b"\xde" + n.to_bytes(2, "big")  # msgpack's fixmap and map 16
    return head + b"".join(forms)


_ANY_POSITION = 1 << 40
"""So large that it takes 8 bytes."""


def encode_records(records: list[StepRecord]) -> bytes:
    """Serialise the records of one request for one output."""
    return msgspec.msgpack.encode(records)


def decode_records(data: bytes) -> list[StepRecord]:
    """Inverse of :func:`encode_records`."""
    return _records.decode(data)
