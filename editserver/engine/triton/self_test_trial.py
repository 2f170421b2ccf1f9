"""One batch of the self-test on the device: resident, planned, run in one step or several, by launches or by replayed graphs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import cast

import msgspec
import numpy as np
import torch

from editserver.engine.resident import Resident, ResidentSet
from editserver.engine.rows import Dictionaries
from editserver.engine.rule_table import RuleRun
from editserver.engine.triton.fill import fill
from editserver.engine.triton.readout import take
from editserver.engine.triton.self_test_made import Made, Request, stream_of
from editserver.engine.triton.step import Cache, DeviceStep
from editserver.engine.wire import RuleRecord, StepRecord

Records = dict[str, StepRecord]
ONE_STEP = (0,)


class SelfTestError(RuntimeError):
    """The kernels do not compute on this device what the definition says."""


class Trial:
    """Made-up requests at one layer; ``stream [n, d]`` is what they find there, all of them one behind the other. Rows, request
    slots and residents are numbered differently.

    With ``block_size`` a KV cache of such blocks is attached, so that gates and rules may look back; the blocks of a request do
    not follow one another.
    """

    def __init__(
        self,
        step: DeviceStep,
        layer: int,
        made: Made,
        requests: Sequence[Request],
        block_size: int = 0,
    ) -> None:
        self.step, self.layer, self.made, self.requests = step, layer, made, tuple(requests)
        self.device = step.state.device
        self._halves = [torch.cat(parts) for parts in zip(*(r.halves for r in requests), strict=True)]
        self.stream = stream_of(self._halves)
        self._block_size = block_size
        self._row_slot = step.capacity.residents - 1 - np.arange(len(self.requests))
        each = -(-max(r.n for r in requests) // block_size) if block_size else 0
        blocks = torch.arange(len(requests) * each).flip(0).reshape(len(requests), each)
        self._blocks = blocks.int().to(self.device)
        self._slots = torch.full((step.capacity.tokens,), -1, dtype=torch.int64, device=self.device)

    @property
    def stages(self) -> str:
        """What it proves, for messages."""
        return ", ".join(dict.fromkeys(request.stage for request in self.requests))

    @property
    def bounds(self) -> list[slice]:
        """Tokens of each request."""
        edges = list(itertools.accumulate((r.n for r in self.requests), initial=0))
        return [slice(a, b) for a, b in itertools.pairwise(edges)]

    def _enter(self) -> None:
        """All requests are resident, and nothing is left of whoever was before."""
        self.leave()
        step, made = self.step, self.made
        if self._block_size:
            step.attach(Cache(self._blocks, self._slots, self._block_size, self._blocks.numel() * self._block_size))
        step.tables.history.fill_(-1)
        self.residents = ResidentSet(cast(Dictionaries, made), step.layers)
        keys = list(dict.fromkeys(key for r in self.requests for key in r.payload.row_keys))
        rows = [made.rows[key] for key in keys]
        gate = torch.tensor([(r.gate_bias, r.threshold, r.mag_scale, r.mag_bias) for r in rows])
        read, write = (torch.stack([getattr(r, name) for r in rows]) for name in ("read", "write"))
        step.bank.put(torch.arange(len(keys)), read, write, gate)
        for i, request in reversed([*enumerate(self.requests)]):
            slots = {key: keys.index(key) for key in request.payload.row_keys}
            run = RuleRun.of(request.payload.program)
            self.residents.add(Resident(f"{i}", request.payload, request.prompt_len, slots, rules=run))
        self._fill(self.residents)
        mapped = np.full(step.capacity.residents, -1, np.int32)
        mapped[self._row_slot] = [self.residents.index[f"{i}"] for i in range(len(self.requests))]
        step.tables.map_slots(mapped)

    def _fill(self, residents: ResidentSet) -> None:
        residents.refresh()
        prompts = {f"{i}": r.ids[: r.prompt_len].tolist() for i, r in enumerate(self.requests)}
        step, remembers = self.step, self._block_size > 0
        fill(step.tables, residents, remembers=remembers, rules=step.rules, encode=step.encode, prompts=prompts)

    def leave(self) -> None:
        """Nobody is resident any more, nothing planned, and no cache attached."""
        self.step.clear()
        if self.step.cache is not None:
            self.step.attach(None)
        self._fill(ResidentSet(cast(Dictionaries, self.made), self.step.layers))

    # -- steps --------------------------------------------------------------------------------------------------

    def run(
        self, split: bool, decode: bool | None, left: Sequence[int] = ONE_STEP, captured: bool = False
    ) -> tuple[torch.Tensor, Records]:
        """All tokens of all requests from the first on: the stream behind the layer, and the records.

        Args:
            split: the stream is in two tensors.
            decode: which variant; None: as a runner would choose.
            left: tokens of each request that are left after each step.
            captured: each step is the replay of a graph that was captured while nothing was planned.

        Raises:
            SelfTestError: a graph edits although nothing is planned, or a token is torn between the two tensors.
        """
        self._enter()
        after, records = torch.empty_like(self.stream), list[Records]()
        done = [0] * len(self.requests)
        for more in left:
            stop = [r.n - more for r in self.requests]
            chunks = zip(self.bounds, done, stop, strict=True)
            at = torch.cat([torch.arange(own.start + i, own.start + j) for own, i, j in chunks])
            single = all(j - i == 1 for i, j in zip(done, stop, strict=True))
            after[at] = self._step(done, stop, at, split, single if decode is None else decode, captured)
            for layer in self.step.layers:  # one of them was run: the others count as run
                if layer != self.layer:
                    self.step.ran[self.step.number(layer)].fill_(self.step.planned)
            requests = [self.residents.requests[f"{i}"] for i in range(len(self.requests))]
            records.append(take(self.step, requests, len(at)).records())
            done = stop
        return after, {name: joined([one[name] for one in records]) for name in records[0]}

    def _step(
        self, start: list[int], stop: list[int], at: torch.Tensor, split: bool, decode: bool, captured: bool
    ) -> torch.Tensor:
        given = [half[at] for half in self._halves] if split else [self.stream[at]]
        on_device = [one.to(self.device, copy=True) for one in given]
        hidden, residual = on_device[0], on_device[1] if split else None
        if captured:
            self._replay(start, stop, hidden, residual, decode)
        else:
            self._plan(start, stop)
            self.step.run(self.layer, hidden, residual, decode)
        left = [one.cpu() for one in on_device]
        if residual is None:
            return left[0]
        alone = (left[0] == given[0]).all(dim=1) & (left[1] == given[1]).all(dim=1)
        if not (alone | (left[0] == 0).all(dim=1)).all():
            message = "a token has neither the halves that it had nor an edited stream in one of them"
            raise SelfTestError(f"{self.stages}: {message}")
        return stream_of(left)

    def _replay(
        self, start: list[int], stop: list[int], hidden: torch.Tensor, residual: torch.Tensor | None, decode: bool
    ) -> None:
        streams = [hidden] if residual is None else [hidden, residual]
        self.step.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step.run(self.layer, hidden, residual, decode)
        before = [one.clone() for one in streams]
        graph.replay()
        if not all(map(torch.equal, streams, before)):
            raise SelfTestError(f"{self.stages}: a captured graph edits although nothing is planned ({decode=})")
        self._plan(start, stop)
        graph.replay()
        torch.cuda.synchronize()  # the graph is gone after this

    def _plan(self, start: list[int], stop: list[int]) -> None:
        """As a runner's batch would be."""
        rows, lengths = len(self.requests), [b - a for a, b in zip(start, stop, strict=True)]
        chunks = [(r, slice(a, b)) for r, a, b in zip(self.requests, start, stop, strict=True)]
        positions = torch.cat([r.positions[here] for r, here in chunks])
        if self._block_size:
            kept = [self._kv(i, r.positions[here]) for i, (r, here) in enumerate(chunks)]
            self._slots[: len(positions)] = torch.cat(kept)
        edges = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)).to(self.device)
        ids = torch.cat([r.ids[here] for r, here in chunks]).int().to(self.device)
        row_slot = torch.from_numpy(self._row_slot).to(self.device)
        self.step.plan(edges, row_slot, positions.to(self.device), ids, rows, len(positions), max(lengths))

    def _kv(self, request: int, positions: torch.Tensor) -> torch.Tensor:
        blocks, size = self._blocks[request].long(), self._block_size
        at = positions.to(self.device)
        return blocks[at // size] * size + at % size


def joined(records: Sequence[StepRecord]) -> StepRecord:
    """Steps of one request whose program is at one layer, as if it had been one step of all their tokens."""
    first = records[0]
    rules = [one.rules for one in records if one.rules is not None]
    fired, dose, clamped = (b"".join(getattr(one, name) for one in records) for name in ("fired", "dose", "clamped"))
    reads = []
    for parts in zip(*(one.reads for one in records), strict=True):
        listed, index, value = map(b"".join, zip(*parts, strict=True))
        reads.append((listed, index, value))
    gates = tuple(facts[-1:] for facts in records[-1].gates)
    n = sum(one.n for one in records)
    ruled = _joined_rules(rules) if rules else None
    return StepRecord(first.start, n, fired, dose, clamped, tuple(reads), gates, ruled)


def _joined_rules(records: Sequence[RuleRecord]) -> RuleRecord:
    names = ("held", "concluded", "active", "scores")
    parts = {name: b"".join(getattr(one, name) for one in records) for name in names}
    return msgspec.structs.replace(records[0], **parts)
