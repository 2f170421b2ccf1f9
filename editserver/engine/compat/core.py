"""The engine core's side: salts, bank slots, and the way of the step records back to the API process.

* ``EngineCore.preprocess_add_request`` (vllm/v1/engine/core.py:1089) is the one funnel that HTTP, offline use and every
  data-parallel engine pass through: the salt is set there, before block hashes are computed.
* ``Scheduler.add_request``, ``_free_request`` and ``finish_requests`` (vllm/v1/core/sched/scheduler.py:2616, :2714, :2649)
  bound the life of a request: bank rows are held exactly that long. A request whose rows do not fit waits for others.
* ``Scheduler.update_from_output`` (:2026) turns the runner's output into per-request outputs; records ride along in
  ``kv_transfer_params``, the one open field of that struct, and are taken out again by
  ``OutputProcessor.process_outputs`` (vllm/v1/engine/output_processor.py:651) before anybody sees them. There, too, the
  request's tokens are known for good: what was done to rejected drafts, or behind a token that ended the request, is cut off
  the records. All but the last of a request's tokens were fed and are its own, whatever else was fed.
"""

from __future__ import annotations

import copy
import functools
from collections import defaultdict, deque
from typing import Any

from editserver.engine.abilities import Abilities, Room
from editserver.engine.bank import BankLedger
from editserver.engine.compat.kv_groups import whole_group
from editserver.engine.compat.one_behind import judged
from editserver.engine.compat.reserved import abilities_of
from editserver.engine.config import EngineConfig
from editserver.engine.journal import Journal
from editserver.engine.salt import edit_salt, plain_salt
from editserver.engine.wire import KEY, StepRecord, decode_records, decode_step, encode_records
from interventions.program import Payload

SLOTS = "editserver_slots"
"""Bank slots of the payload's ``row_keys``, added to ``extra_args`` by the core for the workers."""

SHORT_BYTES, KNOWN_BYTES = 1 << 13, 1 << 16
"""Of payloads up to the first of these sizes 1024 are kept decoded, of those up to the second 128, and none beyond: vectors,
which many requests may bring."""

ABILITIES = "editserver_abilities"
"""Where an ``EngineCore`` keeps what a device's engine can do."""

FORGETFUL = (
    "with speculative decoding, rules and gates over a sequence need a KV cache that keeps every token, and this model's does "
    "not (sliding windows or recurrent states alone)"
)
"""What a request with either is told on such a server."""

STAGED = (
    "with pipeline parallelism, rules and gates over a sequence are not served, as their evidence may lie at another stage "
    "(a server with --pipeline-parallel-size 1 serves them)"
)
"""Likewise on one whose layers are shared out."""


class CoreState:
    """What one scheduler knows about edited requests."""

    def __init__(self, config: EngineConfig, abilities: Abilities | None) -> None:
        self.ledger = BankLedger(config.bank_rows)
        self.room = Room(abilities) if abilities is not None else None
        self.waiting: deque[Any] = deque()
        self.pending: dict[str, list[StepRecord]] = defaultdict(list)

    def acquire(self, request_id: str, payload: Payload) -> list[int] | None:
        """Bank slots of the payload's ``row_keys``; None where they, or a device's tables, are too full of others."""
        if self.room is not None and not self.room.enter(request_id, payload):
            return None
        slots = self.ledger.acquire(request_id, payload.row_keys)
        if slots is None and self.room is not None:
            self.room.leave(request_id)
        return slots

    def release(self, request_id: str) -> bool:
        """Give back what the request holds; False when it held nothing."""
        if self.room is not None:
            self.room.leave(request_id)
        return self.ledger.release(request_id)


def payload_of(sampling_params: Any) -> Payload | None:
    """The payload that a request carries, or None."""
    extra = getattr(sampling_params, "extra_args", None)
    if not extra or KEY not in extra:
        return None
    data = extra[KEY]
    if not isinstance(data, bytes):
        raise ValueError(f"extra_args[{KEY!r}] must be the bytes of a compiled payload, got {type(data).__name__}")
    if len(data) <= SHORT_BYTES:
        return _short(data)
    return _known(data) if len(data) <= KNOWN_BYTES else Payload.from_bytes(data)


# Payloads are immutable; one admission asks for the same one several times, and many requests may edit alike.
_short = functools.lru_cache(maxsize=1024)(Payload.from_bytes)
_known = functools.lru_cache(maxsize=128)(Payload.from_bytes)


def _salted(request: Any, config: EngineConfig | None) -> None:
    payload = payload_of(request.sampling_params)
    if config is None:
        if payload is not None:
            raise ValueError("this server was not started with editserver: it cannot run interventions")
        return
    if payload is None:
        request.cache_salt = plain_salt(request.cache_salt)
        return
    if request.prompt_token_ids is None or getattr(request, "resumable", False):
        raise ValueError(
            "interventions need a prompt of tokens: prompt embeddings and streaming input are not supported"
        )
    layers = {lp.layer for lp in payload.program.layers} if payload.program else set()
    layers |= {read.layer for read in payload.reads}
    layers |= set(payload.program.rules.layers) if payload.program and payload.program.rules else set()
    if unarmed := layers - set(config.armed):
        raise ValueError(f"the program touches the layers {sorted(unarmed)}, armed are {list(config.armed)}")
    if len(payload.row_keys) > config.bank_rows:
        raise ValueError(f"the request needs {len(payload.row_keys)} rows, the bank has {config.bank_rows}")
    rules = payload.program.rules if payload.program else None
    if rules is not None and len(rules.propositions) > config.propositions:
        raise ValueError(
            f"the request's rules have {len(rules.propositions)} propositions, at most {config.propositions}"
        )
    if payload.program is None:
        request.cache_salt = plain_salt(request.cache_salt)
        return
    if any(selector.inside for selector in (*payload.program.selectors, *(read.selector for read in payload.reads))):
        raise ValueError("mentions inside the prompt must be resolved to positions before a request is sent")
    prompt_len = len(request.prompt_token_ids) if payload.program.needs_prompt_len else None
    request.cache_salt = edit_salt(request.cache_salt, payload.program.digest(), prompt_len)


def _able(request: Any, abilities: Abilities | None) -> None:
    """A device's engine is never asked for what it does not do: whoever comes past the API is refused here."""
    if abilities is not None and (payload := payload_of(request.sampling_params)) is not None:
        abilities.check(payload)


def _listens(sampling_params: Any) -> bool:
    """Whether the request has rules, or a gate that remembers."""
    payload = payload_of(sampling_params)
    return payload is not None and payload.program is not None and payload.program.listens


def _wrap_core(engine_core: Any) -> None:
    original = engine_core.preprocess_add_request

    @functools.wraps(original)
    def preprocess_add_request(self: Any, request: Any) -> Any:
        config = EngineConfig.of(self.vllm_config)
        _salted(request, config)
        if not hasattr(self, ABILITIES):
            setattr(self, ABILITIES, None if config is None else abilities_of(self.vllm_config, config))
        _able(request, getattr(self, ABILITIES))
        prepared = original(self, request)
        listens = _listens(request.sampling_params)
        if listens and self.vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ValueError(STAGED)  # as below
        if listens and whole_group(self.scheduler.kv_cache_config) is None:
            if self.vllm_config.speculative_config is not None:
                raise ValueError(FORGETFUL)  # the API has refused it before, with a code
            prepared[0].skip_reading_prefix_cache = True  # nothing keeps what was heard along with the KV
        return prepared

    engine_core.preprocess_add_request = preprocess_add_request


def _state(scheduler: Any) -> CoreState | None:
    state: CoreState | None = scheduler.__dict__.get(KEY)
    if state is None:
        config = EngineConfig.of(scheduler.vllm_config)
        if config is None:
            return None
        state = scheduler.__dict__[KEY] = CoreState(config, abilities_of(scheduler.vllm_config, config))
    return state


def _wrap_scheduler(scheduler: Any) -> None:
    add_request, free_request = scheduler.add_request, scheduler._free_request
    finish_requests, update_from_output = scheduler.finish_requests, scheduler.update_from_output

    def admit(self: Any, state: CoreState, request: Any) -> bool:
        payload = payload_of(request.sampling_params)
        if payload is None:
            add_request(self, request)
            return True
        slots = state.acquire(request.request_id, payload)
        if slots is None:
            return False
        request.sampling_params = copy.copy(request.sampling_params)
        request.sampling_params.extra_args = {**request.sampling_params.extra_args, SLOTS: slots}
        add_request(self, request)
        return True

    def admit_waiting(self: Any, state: CoreState) -> None:
        while state.waiting and admit(self, state, state.waiting[0]):
            state.waiting.popleft()

    @functools.wraps(add_request)
    def _add_request(self: Any, request: Any) -> None:
        state = _state(self)
        if state is None:
            add_request(self, request)
            return
        edited = payload_of(request.sampling_params) is not None
        if (edited and state.waiting) or not admit(self, state, request):
            state.waiting.append(request)

    @functools.wraps(free_request)
    def _free_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        freed = free_request(self, request, *args, **kwargs)
        state = _state(self)
        if state is not None and state.release(request.request_id):
            admit_waiting(self, state)
        return freed

    @functools.wraps(finish_requests)
    def _finish_requests(self: Any, request_ids: Any, finished_status: Any) -> Any:
        state = _state(self)
        if state is None:
            return finish_requests(self, request_ids, finished_status)
        if isinstance(request_ids, str):
            request_ids = (request_ids,)
        gone = None if request_ids is None else set(request_ids)
        dropped = [r for r in state.waiting if gone is None or r.request_id in gone]
        for request in dropped:
            state.waiting.remove(request)
            request.status = finished_status
        for request_id in list(state.pending) if gone is None else gone:
            state.pending.pop(request_id, None)
        finished = finish_requests(self, gone, finished_status)
        admit_waiting(self, state)  # the first in the queue may be gone, and the next one fit
        return [*finished, *dropped]  # whose clients the caller tells; vLLM's scheduler never saw the dropped ones

    @functools.wraps(update_from_output)
    def _update_from_output(
        self: Any, scheduler_output: Any, model_runner_output: Any, *args: Any, **kwargs: Any
    ) -> Any:
        state = _state(self)
        told = getattr(model_runner_output, KEY, None)
        records = decode_step(told) if told else {}
        running = {request_id: self.requests[request_id] for request_id in records if request_id in self.requests}
        outputs = update_from_output(self, scheduler_output, model_runner_output, *args, **kwargs)
        if state is None:
            return outputs
        for request_id, request in running.items():
            record = records[request_id]
            own = request.num_tokens - 1 - record.start
            if own > 0:
                state.pending[request_id].append(record.cut(own))
        if state.pending:
            _attach(state, outputs)
            for request_id in [r for r in state.pending if r not in self.requests]:
                del state.pending[request_id]
        return outputs

    scheduler.add_request = _add_request
    scheduler._free_request = _free_request
    scheduler.finish_requests = _finish_requests
    scheduler.update_from_output = _update_from_output


def _attach(state: CoreState, outputs: Any) -> None:
    for client in outputs.values():
        for output in client.outputs:
            records = state.pending.pop(output.request_id, None)
            if records:
                output.kv_transfer_params = {**(output.kv_transfer_params or {}), KEY: encode_records(records)}


def _wrap_output_processor(processor: Any, request_state: Any) -> None:
    add_request, process_outputs = processor.add_request, processor.process_outputs
    new_completion_output = request_state._new_completion_output

    @functools.wraps(add_request)
    def _add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        add_request(self, request, *args, **kwargs)
        payload = payload_of(request.sampling_params)
        if payload is not None:
            self.request_states[request.request_id].editserver = Journal(payload)

    @functools.wraps(process_outputs)
    def _process_outputs(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        ended: dict[str, tuple[Journal, bool]] = {}
        due: list[Any] = []
        for output in engine_core_outputs:
            state = self.request_states.get(output.request_id)
            journal: Journal | None = getattr(state, KEY, None)
            params = output.kv_transfer_params
            if params and KEY in params:
                records = decode_records(params.pop(KEY))
                output.kv_transfer_params = params or None
                if journal is not None:
                    for record in records:
                        journal.add(record)
            if journal is None:
                due.append(output)
                continue
            if journal.ends_at is not None:
                ended[output.request_id] = journal, output.finish_reason is None
            due += judged(state, journal, output)
        processed = process_outputs(self, due, *args, **kwargs)
        for request_id, (journal, runs) in ended.items():
            if request_id in processed.reqs_to_abort:
                journal.stopped_before()  # a stop string was complete before the token that would have ended it
            elif runs:
                processed.reqs_to_abort.append(request_id)
        return processed

    @functools.wraps(new_completion_output)
    def _new_completion_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        completion = new_completion_output(self, *args, **kwargs)
        completion.editserver = getattr(self, KEY, None)
        return completion

    processor.add_request = _add_request
    processor.process_outputs = _process_outputs
    request_state._new_completion_output = _new_completion_output


def install() -> None:
    """Wrap the core's and the output processor's classes, once per process."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState

    if hasattr(EngineCore, KEY):
        return
    setattr(EngineCore, KEY, True)
    _wrap_core(EngineCore)
    _wrap_scheduler(Scheduler)
    _wrap_output_processor(OutputProcessor, RequestState)
