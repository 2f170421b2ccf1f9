"""Runners on paper: what vLLM's two families tell an adapter in the course of many steps, in vLLM's own types where it has them.

Tokens, positions and row starts "on the device" are the truth; what the host has beside them is ahead of it wherever vLLM lets
it be.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from editserver.engine import op
from editserver.engine.bank import BankLedger
from editserver.engine.batch import StepBatch
from editserver.engine.compat import runner as adapter
from editserver.engine.compat import v1_runner, v2_runner
from editserver.engine.compat.core import SLOTS
from editserver.engine.config import EngineConfig
from editserver.engine.engine import Engine
from editserver.engine.gates import Blocks
from editserver.engine.journal import Journal
from editserver.engine.wire import KEY, decode_step
from editserver.engine.worker import EngineWorker
from tests.engine.marked_requests import (
    BLOCK,
    KINDS,
    LAYER,
    MAX_ROWS,
    MAX_TOKENS,
    MENTION,
    VOCAB,
    D,
    Request,
    Row,
    payload_of,
)
from tests.engine.shadow import fired_at

CONFIG = EngineConfig((LAYER,), bank_rows=64)


@contextmanager
def current(worker: Engine | None) -> Iterator[None]:
    """This process's ops, and adapters, act through ``worker``, whichever another test left here; None: there is none."""
    before, op._worker = op._worker, worker
    try:
        yield
    finally:
        op._worker = before


class BareState:
    """What ``listening`` extends; the methods that it calls, in the way that ``DefaultModelState`` has them."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        self.seen.append(f"add {req_index} {new_req_data.req_id}")

    def remove_request(self, req_id: str) -> None:
        self.seen.append(f"remove {req_id}")

    def initialize_kv_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
        self.seen.append("initialize")

    def preprocess_state(self, input_batch: Any, block_tables: Any, kv_cache_config: Any, num_computed: Any) -> None:
        self.seen.append("preprocess")

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        return {"positions": "of the base"}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        return {"inputs_embeds": "of the base"}


class Machine:
    """Steps of one worker under random arrivals, finishes, preemptions, chunks, drafts and dummies."""

    def __init__(
        self, family: str, seed: int, kinds: Sequence[str] = tuple(KINDS), worker: Engine | None = None
    ) -> None:
        """``worker`` of :data:`CONFIG`: a CPU engine where none is given."""
        from vllm.v1.kv_cache_interface import FullAttentionSpec
        from vllm.v1.worker.gpu.input_batch import InputBuffers

        self.rng, self.family, self.kinds = random.Random(seed), family, kinds
        self.worker = worker or EngineWorker(CONFIG, D, torch.float32, MAX_TOKENS)
        self.batch: StepBatch | None = None
        begin = self.worker.begin

        def noted(batch: StepBatch) -> None:
            self.batch = batch
            begin(batch)

        setattr(self.worker, "begin", noted)  # noqa: B010
        self.ledger = BankLedger(64)
        self.requests: list[Request] = []
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.free = list(range(MAX_ROWS))
        self.buffers, self._scratch = (InputBuffers(MAX_ROWS, MAX_TOKENS, torch.device("cpu")) for _ in range(2))
        self.state = v2_runner.listening(BareState)()
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
        self.kv = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)], num_blocks=512)
        with current(None):  # these workers are given no cache to keep anything with
            self.state.initialize_kv_cache(self.kv, SimpleNamespace(block_sizes=[BLOCK]))
        self._late: list[tuple[Any, list[Row]]] = []
        self.counts = dict.fromkeys(("steps", "dummies", "padded", "resent", "rejected", "reallocated", "ahead"), 0)

    # -- requests -------------------------------------------------------------------------------------------------

    def arrive(self) -> None:
        """A new request waits."""
        number, rng = len(self.requests), self.rng
        kind = rng.choice([*self.kinds, None])
        prompt_len = rng.randint(1, 14)
        tokens = [rng.randrange(VOCAB) for _ in range(prompt_len + rng.randint(1, 10))]
        for at in rng.sample(range(len(tokens) - 1), min(2, len(tokens) - 1)):
            tokens[at : at + 2] = MENTION
        payload = None if kind is None else payload_of(number, KINDS[kind][0])
        journal = None if payload is None else Journal(payload)
        request = Request(number, kind, prompt_len, tokens, payload, journal, known=prompt_len)
        if payload is not None:
            found = self.ledger.acquire(request.name, payload.row_keys)
            assert found is not None
            request.slots = found
        self.requests.append(request)
        self.waiting.append(request)

    def _new(self, request: Request) -> Any:
        from vllm.v1.core.sched.output import NewRequestData

        extra = {KEY: request.payload.to_bytes(), SLOTS: request.slots} if request.payload else None
        return NewRequestData(
            req_id=request.name,
            prompt_token_ids=request.tokens[: request.prompt_len],
            mm_features=[],
            sampling_params=SimpleNamespace(extra_args=extra),  # type: ignore[arg-type]
            pooling_params=None,
            block_ids=([],),
            num_computed_tokens=request.computed,
            lora_request=None,
            prefill_token_ids=request.tokens[: request.known] if self.family == "v2" else None,
        )

    def _resume(self, request: Request) -> Any:
        """A waiting request gets a slot; returns its data where it has to be sent."""
        again, request.sent = request.sent, True
        cached = self.rng.randrange(0, request.known, BLOCK) if again or self.rng.random() < 0.3 else 0
        request.computed = min(cached, request.known - 1, *([request.computed] if again else []))
        request.computed_from = min(request.computed_from, request.computed) if again else request.computed
        request.slot = self.free.pop()
        self.running.append(request)
        self.counts["resent"] += again and request.computed > request.prompt_len
        return self._new(request) if self.family == "v2" or not again else None

    def _leave(self, request: Request) -> None:
        self.running.remove(request)
        assert request.slot is not None
        self.free.append(request.slot)
        request.slot = None

    def run(self, steps: int) -> None:
        """So many steps, between which requests arrive."""
        for _ in range(steps):
            if self.rng.random() < 0.4:
                self.arrive()
            self.step()

    # -- one step -------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Requests come and go, a batch is prepared, run and reported."""
        rng = self.rng
        done = [r for r in self.running if r.computed == len(r.tokens)]
        preempted = [r for r in self.running if r not in done and rng.random() < 0.08]
        for request in (*done, *preempted):
            self._leave(request)
        for request in done:
            self.ledger.release(request.name)
        new: list[Any] = []
        for request in self.waiting[: len(self.free)]:
            new.append(self._resume(request))
        self.waiting = [*self.waiting[len(new) :], *preempted]
        self._tell([r.name for r in done], [r.name for r in preempted], [one for one in new if one])
        scheduled = [r for r in self.running if r.computed < len(r.tokens) and rng.random() < 0.9]
        rng.shuffle(scheduled)
        rows = [self._row(request) for request in scheduled]
        if not rows:
            return
        self._reallocate(rows)
        order, n_padded = (self._v2_batch if self.family == "v2" else self._v1_batch)(rows)
        self._expect(order, n_padded)
        output = SimpleNamespace(get_output=SimpleNamespace) if self.family == "v2" else SimpleNamespace()
        self._late.append((adapter.report(self.worker, output), order))
        for row in order:
            self._advance(row)
        while len(self._late) > (self.family == "v2"):
            self._deliver()
        self.counts["steps"] += 1

    def _deliver(self) -> None:
        """The oldest output is asked for; in V2, when the next step is under way."""
        output, order = self._late.pop(0)
        made = output.get_output() if self.family == "v2" else output
        records = decode_step(told) if (told := getattr(made, KEY, None)) else {}
        for row in order:
            record = records.get(row.request.name)
            assert (record is not None) == (row.request.payload is not None), "whose records an output has"
            if record is not None:
                assert row.request.journal is not None
                row.request.journal.add(record)

    def _tell(self, finished: list[str], preempted: list[str], new: list[Any]) -> None:
        if self.family == "v1":  # in the order of v1_runner's ``_update_states``
            for name in finished:
                self.worker.remove_request(name)
            for one in new:
                adapter.admit(self.worker, one)
            self.worker.idle_step()
            return
        with current(self.worker):
            for name in sorted({*finished, *preempted}):  # vllm/v1/worker/gpu/model_runner.py:1152, :1181
                self.state.remove_request(name)
            for one in new:
                self.state.remove_request(one.req_id)
                slot = next(r.slot for r in self.running if r.name == one.req_id)
                self.state.add_request(slot, one)

    def _row(self, request: Request) -> Row:
        rng, start = self.rng, request.computed
        if start < request.known - 1 or start < request.prompt_len:
            n = min(rng.randint(1, 7), request.known - start)
            return Row(request, start, request.tokens[start : start + n], n, 0)
        drafts = min(rng.choice((0, 0, 1, 2)), len(request.tokens) - start - 1)
        fed = [request.tokens[start]]
        for offset in range(1, drafts + 1):
            right = rng.random() < 0.6
            fed.append(request.tokens[start + offset] if right else rng.randrange(VOCAB))
        return Row(request, start, fed, len(fed), drafts)

    def _reallocate(self, rows: Sequence[Row]) -> None:
        """The device verifies fewer drafts of one request and more of another than the host laid out."""
        drafting = [row for row in rows if row.drafts]
        if self.family == "v1" or len(drafting) < 2 or self.rng.random() < 0.3:
            return
        give, take = self.rng.sample(drafting, 2)
        end = take.start + len(take.tokens)
        if end < len(take.request.tokens):
            give.tokens.pop()
            take.tokens.append(take.request.tokens[end])
            self.counts["reallocated"] += 1

    def _advance(self, row: Row) -> None:
        request, fed = row.request, row.tokens
        right = 0
        true = request.tokens[row.start : row.start + len(fed)]
        while right < len(fed) and fed[right] == true[right]:
            right += 1
        self.counts["rejected"] += len(fed) - right
        request.computed = row.start + right
        if request.computed >= request.known:
            request.known = min(request.computed + 1, len(request.tokens))

    # -- batches --------------------------------------------------------------------------------------------------

    def _lay_out(self, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
        """Write the flat batch to the device's buffers; row starts as they are, and as the host has them."""
        starts = np.cumsum([0, *(len(row.tokens) for row in rows)], dtype=np.int32)
        forecast = np.cumsum([0, *(row.forecast for row in rows)], dtype=np.int32)
        garbage = torch.from_numpy(np.array([self.rng.randrange(40) for _ in range(MAX_TOKENS)]))
        self.buffers.input_ids.copy_(garbage % VOCAB)
        self.buffers.positions.copy_(garbage)
        for row, start in zip(rows, starts, strict=False):
            here = slice(int(start), int(start) + len(row.tokens))
            self.buffers.input_ids[here] = torch.tensor(row.tokens, dtype=torch.int32)
            self.buffers.positions[here] = torch.arange(row.start, row.start + len(row.tokens))
        return starts, forecast

    def _v2_batch(self, rows: Sequence[Row]) -> tuple[list[Row], int]:
        from vllm.v1.worker.gpu.input_batch import InputBatch
        from vllm.v1.worker.gpu.model_runner import sort_batch_req_ids

        by_name = {row.request.name: row for row in rows}
        drafts = {row.request.name: [0] * row.drafts for row in rows if row.drafts}
        ids = sort_batch_req_ids({name: row.forecast for name, row in by_name.items()}, drafts, 3)
        order = [by_name[name] for name in ids]
        if self.rng.random() < 0.3:
            self.dummy()
        starts, forecast = self._lay_out(order)
        n, n_rows = int(starts[-1]), len(order)
        n_padded, rows_padded = self.rng.choice(((n, n_rows), (min(n + 8, MAX_TOKENS), MAX_ROWS)))
        self.counts["padded"] += n_padded > n
        self.buffers.query_start_loc.fill_(n)
        self.buffers.query_start_loc[: n_rows + 1] = torch.from_numpy(starts)
        mapping = np.array([row.request.slot for row in order], np.intp)
        ahead = np.array([row.start + self.rng.choice((0, 2)) for row in order], np.int32)
        self.counts["ahead"] += int((ahead > [row.start for row in order]).any())
        dummy = InputBatch.make_dummy(n_rows, n, self._scratch)
        fields = vars(dummy) | {
            "req_ids": ids,
            "num_reqs_after_padding": rows_padded,
            "idx_mapping": torch.from_numpy(mapping),
            "idx_mapping_np": mapping,
            "num_tokens_after_padding": n_padded,
            "query_start_loc": self.buffers.query_start_loc[: rows_padded + 1],
            "query_start_loc_np": np.append(forecast, [n] * (rows_padded - n_rows)).astype(np.int32),
            "num_computed_tokens_np": ahead,
            "positions": self.buffers.positions[:n_padded],
            "input_ids": self.buffers.input_ids[:n_padded],
        }
        batch = InputBatch(**fields)
        tables = (self._block_table([row.request.number for row in order], rows_padded),)
        self.state.preprocess_state(batch, tables, self.kv, torch.zeros(MAX_ROWS, dtype=torch.int32))
        with current(self.worker):
            assert self.state.prepare_inputs(batch, None) == {"positions": "of the base"}
        return order, n_padded

    def _v1_batch(self, rows: Sequence[Row]) -> tuple[list[Row], int]:
        order = list(rows)
        starts, forecast = self._lay_out(order)
        n = int(starts[-1])
        gone: list[str | None] = [None, *[f"r{number}" for number in range(3)]]
        ids = [*[row.request.name for row in order], *gone]  # what condensing left behind the rows
        behind = torch.full((3,), n, dtype=torch.int32)
        table = self._block_table([row.request.number for row in order], MAX_ROWS)
        group = SimpleNamespace(get_device_tensor=lambda rows: table[:rows], block_size=BLOCK)
        runner = SimpleNamespace(
            input_batch=SimpleNamespace(num_reqs=len(order), req_ids=ids, block_table=[group]),
            query_start_loc=SimpleNamespace(gpu=torch.cat((torch.from_numpy(starts), behind)), np=forecast),
            positions=self.buffers.positions,
            input_ids=SimpleNamespace(gpu=self.buffers.input_ids),
            max_num_reqs=MAX_ROWS,
            kv_cache_config=self.kv,
        )
        self.worker.begin(v1_runner.batch_of(runner, n))
        return order, n

    def _block_table(self, numbers: Sequence[int], rows: int) -> torch.Tensor:
        table = torch.zeros(rows, 8, dtype=torch.int32)
        for row, number in enumerate(numbers):
            table[row] = torch.arange(8) + 8 * number
        return table

    def dummy(self) -> None:
        """A batch of nobody, whose rows stand for the request slots 0, 1, …; or a capture."""
        from vllm.v1.worker.gpu.input_batch import InputBatch

        batch = InputBatch.make_dummy(MAX_ROWS, 2 * MAX_ROWS, self.buffers)
        with current(self.worker):
            if self.rng.random() < 0.5:
                self.state.prepare_inputs(batch, None)
            else:
                self.state.prepare_dummy_inputs(MAX_ROWS, 2 * MAX_ROWS)
        hidden, residual = torch.zeros(2 * MAX_ROWS, D), torch.zeros(2 * MAX_ROWS, D)
        self.worker.run(LAYER, hidden, residual)
        assert not residual.any(), "a dummy batch was edited"
        assert getattr(adapter.report(self.worker, SimpleNamespace()), KEY, None) is None, "a dummy batch was reported"
        self.counts["dummies"] += 1

    # -- what must be ---------------------------------------------------------------------------------------------

    def _expect(self, order: Sequence[Row], n_padded: int) -> None:
        """Run the layer on zeros: each token has what its own request adds there, or nothing."""
        hidden, residual = torch.zeros(n_padded, D), torch.zeros(n_padded, D)
        self.worker.run(LAYER, hidden, residual)
        wanted = torch.zeros(n_padded)
        at = 0
        for row in order:
            request = row.request
            fed = request.tokens[: row.start] + row.tokens
            for position in range(row.start, row.start + len(row.tokens)):
                seen = Request(request.number, request.kind, request.prompt_len, fed, None, None)
                wanted[at] = (request.number + 1) * seen.due(position, fed[position])
                at += 1
        assert residual[:, 0].tolist() == wanted.tolist(), f"step {self.counts['steps']}: whose edits the rows got"
        self._expect_blocks(order)

    def _expect_blocks(self, order: Sequence[Row]) -> None:
        assert self.batch is not None
        table = self.batch.blocks()
        assert table is not None
        blocks = Blocks(table.blocks.numpy(), table.block_size, table.n_slots)
        for row, one in enumerate(order):
            stop = one.start + len(one.tokens)
            slots = blocks.slots(row, 0, stop).tolist()
            assert slots == [8 * one.request.number * BLOCK + p for p in range(stop)], "where the KV lies"

    def check_receipts(self) -> int:
        """What the journals say of all tokens in the end, whatever was drafted, rejected or computed twice on the way."""
        while self._late:
            self._deliver()
        checked = 0
        for request in self.requests:
            if request.journal is None or request.computed < len(request.tokens):
                continue
            n = len(request.tokens)
            assert request.journal.covers(request.computed_from, n), f"{request.name}: what was reported"
            due = [p for p in range(request.computed_from, n) if request.due(p, request.tokens[p])]
            assert fired_at(request.journal, 0, LAYER, n) == due, f"{request.name}: where the receipt says it fired"
            checked += 1
        return checked
