"""What an adapter asks of a worker's engine, be it the CPU's or a device's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from editserver.engine.batch import BlockTable, StepBatch
from editserver.engine.config import EngineConfig
from editserver.engine.memory import Footprint
from editserver.engine.resident import ResidentSet
from editserver.engine.rows import Dictionaries, RowBank
from editserver.engine.wire import Told
from interventions.program import Payload


class Engine(Protocol):
    """One worker process's engine. In the order of a step: requests come and go, :meth:`begin` (or :meth:`idle_step`), the
    ops' :meth:`run` layer by layer, :meth:`finish`.

    Attributes:
        config: what the server was started with.
        bank: the rows, as the host has them.
        residents: the requests that it knows.
        agree: makes a contiguous tensor of ``h``, or of its parts, the same on all tensor-parallel ranks, in place, where their
            own differ in rounding; None where ranks decide alone (compat/parallel.py).
    """

    config: EngineConfig
    d_model: int
    dtype: torch.dtype
    dictionaries: Dictionaries
    bank: RowBank
    residents: ResidentSet
    agree: Callable[[torch.Tensor], None] | None

    @property
    def kept_bytes(self) -> int:
        """Memory of what gates and rules keep along with the KV cache."""

    def footprint(self) -> Footprint:
        """What it keeps in memory, at most: counted before vLLM sizes its KV cache."""

    def add_request(
        self, request_id: str, payload: Payload, slots: list[int], prompt_len: int, prompt: Sequence[int] = ()
    ) -> None:
        """Make a request resident and its rows present. ``slots[i]`` belongs to ``payload.row_keys[i]``; ``prompt`` are all
        its known tokens."""

    def remove_request(self, request_id: str) -> None:
        """Forget a finished, aborted or preempted request."""

    def attach(self, table: BlockTable, slot_mapping: torch.Tensor) -> None:
        """The KV cache is there: the rows' blocks, and each token's slot (int64, negative for none), at addresses that do not
        change. Before any graph is captured."""

    def begin(self, batch: StepBatch) -> None:
        """Plan the forward pass over ``batch``."""

    def idle_step(self, single: bool = False) -> None:
        """The forward pass that follows is a dummy: nothing is edited, nothing is reported. ``single``: it stands for batches
        in which every row has one token."""

    def count_visits(self) -> None:
        """Have :attr:`visits` tell of the dummy batches from now on."""

    @property
    def visits(self) -> dict[int, int]:
        """By armed layer, 0 where its op did not run since :meth:`count_visits`. Ends that."""

    def run(self, layer: int, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        """The op's body: edit and read at ``layer``, in place."""

    def finish(self) -> Callable[[], Told] | None:
        """Right behind the forward pass: what waits for its outcome and has the records; None where nothing was planned.

        The records' maker raises RuntimeError where an armed layer that had work did not run.
        """
