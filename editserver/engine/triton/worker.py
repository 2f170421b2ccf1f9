"""One worker's engine on a device: residents on the host, everything that a step does to tokens in kernels."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from editserver.engine.batch import BlockTable, StepBatch
from editserver.engine.config import EngineConfig
from editserver.engine.memory import Footprint, of_device
from editserver.engine.resident import Resident, ResidentSet
from editserver.engine.rows import Dictionaries, RowBank
from editserver.engine.rule_table import RuleRun
from editserver.engine.triton.capacity import Capacity, EncodeCapacity, RuleCapacity
from editserver.engine.triton.encode import DeviceEncode
from editserver.engine.triton.fill import fill
from editserver.engine.triton.readout import Taken, take
from editserver.engine.triton.step import Cache, DeviceStep, Stages
from editserver.engine.wire import StepRecord
from interventions.program import Payload

MOST_BEHIND = 4
"""Steps whose outcomes nobody has looked at yet, at most."""


@dataclass
class _Outcome:
    """A step's outcome, and whether anybody asked for it."""

    taken: Taken
    asked: bool = False

    def records(self) -> dict[str, StepRecord]:
        """What :meth:`DeviceWorker.finish` returns."""
        self.asked = True
        return self.taken.records()

    @property
    def settled(self) -> bool:
        """Whether :meth:`settle` would not wait."""
        return self.asked or self.taken.arrived

    def settle(self) -> None:
        """Raise RuntimeError where a layer did not run; whoever asked was told."""
        if not self.asked:
            self.taken.prove()


class DeviceWorker:
    """As :class:`~editserver.engine.worker.EngineWorker`, outwardly; see :class:`~editserver.engine.engine.Engine`.

    Nothing here waits for the device but what :meth:`finish` returns. The ops may be captured: what a graph replays is the
    launches of :class:`DeviceStep`, whose grids depend on the shape of the batch and on which of the two variants was chosen
    at capture. Both give the same bits for any batch, so the choice is one of speed: the decode variant where every row has
    one token, which is what the graphs for uniform decode are captured and replayed for.

    Attributes:
        bank: rows as the host has them, from where they go to ``step.bank``.
        step: buffers and launches.
    """

    def __init__(
        self,
        config: EngineConfig,
        d_model: int,
        dtype: torch.dtype,
        device: torch.device,
        capacity: Capacity,
        drafts: int = 0,
        stages: Stages | None = None,
        rules: RuleCapacity | None = None,
        encode: EncodeCapacity | None = None,
    ) -> None:
        """``drafts``: most draft tokens of one request in one step (speculation); ``rules``, ``encode``: None where they are not
        run, or no whole dictionary is encoded."""
        self.config, self.d_model, self.dtype = config, d_model, dtype
        self.dictionaries = Dictionaries(config)
        self.bank = RowBank(config.bank_rows, d_model, self.dictionaries)
        self.residents = ResidentSet(self.dictionaries, config.armed)
        whole = None
        if encode is not None:
            tokens, residents = capacity.tokens, capacity.residents
            whole = DeviceEncode(encode, config, self.dictionaries, tokens, residents, d_model, device)
        self.step = DeviceStep(
            capacity, config.armed, d_model, device, stages, drafts=drafts, rules=rules, encode=whole
        )
        self._there: list[str | None] = [None] * config.bank_rows
        self._known: dict[str, Sequence[int]] = {}
        self._slots = np.full(capacity.residents, -1, np.int32)
        self._requests: tuple[Resident | None, ...] = ()
        self._n_tokens = 0
        self._behind: deque[_Outcome] = deque()
        self._changed = self._planned = self._single = self._remembers = self._probing = False
        self.agree: Callable[[torch.Tensor], None] | None = None

    # -- requests -----------------------------------------------------------------------------------------------

    def add_request(
        self, request_id: str, payload: Payload, slots: list[int], prompt_len: int, prompt: Sequence[int] = ()
    ) -> None:
        """Make a request resident and its rows present, in place of an earlier one of its name. ``slots[i]`` belongs to
        ``payload.row_keys[i]``.

        ``prompt`` are all its known tokens; programs that look for mentions need them.
        """
        keys = payload.row_keys
        self._upload(keys, slots, payload)
        self.step.tables.unseat(request_id)
        named, rules = dict(zip(keys, slots, strict=True)), RuleRun.of(payload.program)
        self.residents.add(Resident(request_id, payload, prompt_len, named, rules=rules))
        self._known[request_id] = prompt
        self._changed = True

    def _upload(self, keys: Sequence[str], slots: Sequence[int], payload: Payload) -> None:
        self.bank.upload(keys, slots, payload.program.vectors if payload.program else {})
        fresh = [slot for key, slot in zip(keys, slots, strict=True) if self._there[slot] != key]
        if fresh:
            at = torch.tensor(fresh, dtype=torch.int64)
            self.step.bank.put(at, self.bank.read[at], self.bank.write[at], self.bank.gate[at])
        for key, slot in zip(keys, slots, strict=True):
            self._there[slot] = key

    def remove_request(self, request_id: str) -> None:
        """Forget a finished, aborted or preempted request; unknown ids are ignored."""
        if self._known.pop(request_id, None) is not None:
            self.residents.remove(request_id)
            self.step.tables.unseat(request_id)
            self._changed = True

    @property
    def kept_bytes(self) -> int:
        """Memory of what gates keep along with the KV cache."""
        return self.step.memory_bytes

    def footprint(self) -> Footprint:
        """What this engine keeps on the device, at most."""
        return of_device(self.config, self.step)

    # -- one step -----------------------------------------------------------------------------------------------

    def attach(self, table: BlockTable, slot_mapping: torch.Tensor) -> None:
        """Keep hit bits with this KV cache; before any graph is captured."""
        self.step.attach(Cache(table.blocks, slot_mapping, table.block_size, table.n_slots))
        self._remembers = True

    def begin(self, batch: StepBatch) -> None:
        """Plan the forward pass over ``batch``: one launch, and copies where the residents, or their rows, are others than before.

        Raises:
            CapacityError, NotOnDevice: a program is resident that should have been refused before.
        """
        requests = tuple(self.residents.requests.get(name) for name in batch.request_ids)
        if not any(requests):
            self.idle_step(batch.single)
            return
        if self._changed:
            self.residents.refresh()
            fill(
                self.step.tables,
                self.residents,
                remembers=self._remembers,
                rules=self.step.rules,
                encode=self.step.encode,
                prompts=self._known,
            )
            self._changed = False
        index = self.residents.index
        self._slots[batch.slots[: len(requests)]] = [index.get(name, -1) for name in batch.request_ids]
        self.step.tables.map_slots(self._slots)
        self.step.plan(
            batch.query_start,
            batch.row_slot,
            batch.positions,
            batch.token_ids,
            len(requests),
            batch.n_tokens,
            batch.longest,
        )
        self._requests, self._n_tokens = requests, batch.n_tokens
        self._planned, self._single, self._probing = True, batch.single, False

    def idle_step(self, single: bool = False) -> None:
        """The forward pass that follows is a dummy: nothing is edited, nothing is reported."""
        if self._probing:
            self.step.probe()
        elif self._planned:
            self.step.clear()
        self._planned, self._requests, self._single = self._probing, (), single

    def count_visits(self) -> None:
        """From the next dummy batch on, armed layers say that they ran: in kernels, so those of replayed graphs too."""
        self._probing = True

    @property
    def visits(self) -> dict[int, int]:
        """Whether each armed layer ran in the last dummy batch since :meth:`count_visits`, and no more of that. Waits."""
        ran, planned = self.step.ran[:, 0].tolist(), self.step.planned
        probed, self._probing = self._probing, False
        self.idle_step()
        return {layer: int(probed and ran[self.step.number(layer)] == planned) for layer in self.step.layers}

    def run(self, layer: int, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        """The op's body: see :meth:`DeviceStep.run`. Launched whether or not anything is planned: the device knows.

        Where ranks have to :attr:`agree` they always do, so that no request's stream depends on who else is there.
        """
        if self.agree is not None:
            self.agree(hidden)
            if residual is not None:
                self.agree(residual)
        if self._planned or hidden.is_cuda:  # on a CPU no graph is captured, and an interpreted launch costs much
            self.step.run(layer, hidden, residual, self._single)

    def finish(self) -> Callable[[], dict[str, StepRecord]] | None:
        """Start copying the outcome of the forward pass behind us; its records are made when they are asked for.

        Nobody asks tensor-parallel ranks other than the first: that all layers ran is proven here, when a later step has been
        run and without waiting, or waiting where more than ``MOST_BEHIND`` outcomes are on their way.

        Raises:
            RuntimeError: an armed layer did not run in an earlier step, and nobody asked.
        """
        while self._behind and (self._behind[0].settled or len(self._behind) > MOST_BEHIND):
            self._behind.popleft().settle()
        if not self._requests:
            return None
        outcome = _Outcome(take(self.step, self._requests, self._n_tokens, self._known))
        self._behind.append(outcome)
        self._requests = ()
        return outcome.records
