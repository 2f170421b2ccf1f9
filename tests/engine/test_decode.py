"""Steps in which nothing is new but positions and tokens: to the bit what a step is that is planned and told from scratch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editserver.engine.batch import StepBatch
from editserver.engine.kernel_plan import tell_tokens
from editserver.engine.wire import StepRecord, decode_step, encode_step, form_of, step_of
from editserver.engine.worker import EngineWorker
from interventions.program import Payload, Read
from interventions.selectors import ALL, Selector
from tests.engine.kernel_steps import LAYER, D, dictionaries, new_worker, random_step
from tests.engine.native_steps import SIMPLE, ThroughTheOp, op_in_front, served

KINDS = torch.float32, torch.bfloat16


@pytest.fixture(scope="module", autouse=True)
def _op_in_front() -> Iterator[None]:
    with op_in_front():
        yield


@cache
def payloads() -> tuple[tuple[Payload, int], ...]:
    """Random programs that the C++ op runs alone, and the lengths of their prompts."""
    found = []
    for seed in range(400):
        (part,) = random_step(seed, torch.float32, False, 1, plain=0.0).parts
        assert part.payload is not None
        assert part.payload.program is not None
        if {channel.read for channel in part.payload.program.layers[0].channels} <= set(SIMPLE):
            found.append((part.payload, part.prompt_len))
    assert len(found) > 20
    return tuple(found)


class Twins:
    """Two workers that know the same requests: one is served as an engine serves it, the other plans every step anew."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.worker, self.anew = ThroughTheOp(served(dtype)), new_worker(dtype)
        self.dtype, self.slots = dtype, dict[str, int]()
        self.next: dict[str, int] = {}
        """Position that each request feeds next."""
        self.decoded = self.edited = 0

    def admit(self, name: str, payload: Payload | None, prompt_len: int) -> None:
        self.next[name] = prompt_len
        if payload is not None:
            slots = [self.slots.setdefault(key, len(self.slots)) for key in payload.row_keys]
            for worker in (self.worker, self.anew):
                worker.add_request(name, payload, slots, prompt_len)

    def leave(self, name: str) -> None:
        del self.next[name]
        for worker in (self.worker, self.anew):
            worker.remove_request(name)

    def step(self, names: list[str], n_tokens: int, random: np.random.Generator) -> dict[str, StepRecord]:
        """A step of ``n_tokens`` of each, by both."""
        n = n_tokens * len(names)
        positions = np.concatenate([np.arange(self.next[name], self.next[name] + n_tokens) for name in names])
        ids = random.integers(0, 6, n).astype(np.int32)
        streams = [torch.from_numpy(random.normal(size=(n, D)).astype(np.float32) * 3).to(self.dtype) for _ in range(2)]
        mine, others = ([x.clone() for x in streams] for _ in range(2))
        batch = StepBatch(
            list(names),
            np.arange(64),
            torch.arange(64),
            torch.arange(0, n + 1, n_tokens, dtype=torch.int32),
            n,
            torch.from_numpy(np.append(positions, 7)),
            torch.from_numpy(np.append(ids, np.int32(3))),
            lambda: None,
        )
        self.worker.idle_step()
        self.worker.begin(batch)
        self.decoded += self.worker._decodes is not None
        self.worker.run(LAYER, *mine)
        self.anew.begin_step(list(names), batch.query_start.numpy(), positions, ids)
        self.anew.run(LAYER, *others)
        for one, other in zip(mine, others, strict=True):
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
        finished = self.worker.finish()
        told, wanted = decode_step(finished() if finished else {}), self.anew.end_step()
        assert told == wanted
        assert list(told) == list(wanted)
        self.edited += any(record.fired.strip(b"\0") for record in told.values())
        assert self.worker.finish() is None
        for name in names:
            self.next[name] += n_tokens
        return told


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(KINDS))
def test_steps_that_go_on_are_the_steps_planned_anew(seed: int, dtype: torch.dtype) -> None:
    """Requests with and without programs come, go, come again under a name that was there, change places, and are computed
    again; in between they decode."""
    random = np.random.default_rng(seed)
    twins, known = Twins(dtype), payloads()
    names: list[str] = []
    for _ in range(24):
        event = random.random()
        if len(names) < 2 or (event < 0.12 and len(names) < 6):
            name = f"r{random.integers(8)}"
            if name in names:
                twins.leave(name)
                names.remove(name)
            payload, prompt_len = known[random.integers(len(known))]
            twins.admit(name, payload if random.random() < 0.8 else None, prompt_len)
            names.insert(int(random.integers(len(names) + 1)), name)
        elif event < 0.2:
            twins.leave(names.pop(int(random.integers(len(names)))))
        elif event < 0.26:
            random.shuffle(names)
        elif event < 0.3:
            twins.next[names[0]] = int(random.integers(0, 9))
        elif event < 0.36:
            twins.step(names, 2, random)
        elif event < 0.42:
            twins.step(names[: int(random.integers(1, len(names) + 1))], 1, random)
        twins.step(names, 1, random)


def test_what_the_property_above_says_is_not_empty() -> None:
    random = np.random.default_rng(0)
    twins = Twins(torch.bfloat16)
    for i, (payload, prompt_len) in enumerate(payloads()[:20]):
        twins.admit(f"r{i}", payload, prompt_len)
    twins.admit("plain", None, 4)
    for _ in range(10):
        twins.step(["plain", *(f"r{i}" for i in range(20))], 1, random)
    assert twins.decoded == 8, "from the third step on"
    assert twins.edited == 10
    assert not twins.worker.asked


def decoding(dtype: torch.dtype = torch.bfloat16) -> tuple[Twins, np.random.Generator]:
    """Two requests that decode, for four steps by now."""
    twins, random = Twins(dtype), np.random.default_rng(1)
    for i, (payload, prompt_len) in enumerate(payloads()[:2]):
        twins.admit(f"r{i}", payload, prompt_len)
    for _ in range(4):
        twins.step(["r0", "r1"], 1, random)
    assert twins.decoded == 2
    return twins, random


def batch_of(twins: Twins) -> StepBatch:
    positions = torch.tensor([twins.next["r0"], twins.next["r1"]])
    ids, starts = torch.zeros(2, dtype=torch.int32), torch.arange(3, dtype=torch.int32)
    return StepBatch(["r0", "r1"], np.arange(2), torch.arange(2), starts, 2, positions, ids, lambda: None)


def test_a_step_that_goes_on_and_whose_op_did_not_run_is_an_error() -> None:
    for end in (EngineWorker.finish, EngineWorker.end_step):
        twins, _ = decoding()
        twins.worker.begin(batch_of(twins))
        assert twins.worker._decodes is not None
        with pytest.raises(RuntimeError, match="did not run in this step"):
            end(twins.worker)


def test_tensors_that_python_has_to_edit_are_told_all_the_same() -> None:
    twins, _ = decoding()
    batch, worker = batch_of(twins), twins.worker
    worker.begin(batch)
    assert worker._decodes is not None
    wide = [torch.ones(2, 2 * D).bfloat16()[:, :D] for _ in range(2)]
    plain = [x.contiguous() for x in wide]
    worker.run(LAYER, *wide)
    assert worker.asked == [LAYER]
    twins.anew.begin_step(["r0", "r1"], batch.query_start.numpy(), batch.positions.numpy(), batch.token_ids.numpy())
    twins.anew.run(LAYER, *plain)
    finished = worker.finish()
    assert finished is not None
    assert decode_step(finished()) == twins.anew.end_step()
    assert torch.equal(wide[1], plain[1])


def test_after_such_a_step_nothing_is_edited_until_the_next_one() -> None:
    twins, random = decoding()
    hidden, residual = torch.ones(2, D).bfloat16(), torch.ones(2, D).bfloat16()
    twins.worker.run(LAYER, hidden, residual)
    twins.worker.idle_step()
    twins.worker.run(LAYER, hidden, residual)
    assert torch.equal(residual, torch.ones(2, D).bfloat16())
    twins.worker.begin(batch_of(twins))
    twins.worker.idle_step()  # a dummy comes between
    twins.worker.run(LAYER, hidden, residual)
    assert torch.equal(residual, torch.ones(2, D).bfloat16())
    assert twins.worker.finish() is None
    twins.step(["r0", "r1"], 1, random)


@pytest.mark.parametrize("what", ["inspection", "mention"])
def test_requests_that_more_is_told_of_are_planned_anew(what: str) -> None:
    sae = next(sae for sae in dictionaries()[1].values() if sae.row_separable)
    twins, random = decoding()
    payload, _ = payloads()[0]
    assert payload.program is not None
    if what == "inspection":
        payload = Payload(None, (Read(sae.digest, LAYER, (1, 2), 0, ALL),), None)
    else:
        mention = Selector((), (), True, ends=((2,),))
        program = type(payload.program)(payload.program.layers, (mention,) * 3, payload.program.vectors)
        payload = Payload(program, (), program.digest())
    for worker in (twins.worker, twins.anew):
        slots = [twins.slots.setdefault(key, len(twins.slots)) for key in payload.row_keys]
        worker.add_request("more", payload, slots, 2, [1, 2])
    twins.next["more"] = 2
    before = twins.decoded
    for _ in range(5):
        twins.step(["r0", "more", "r1"], 1, random)
    assert twins.decoded == before


@given(
    st.lists(
        st.tuples(
            st.text(max_size=40),
            st.integers(0, 2**31),
            st.sets(st.integers(0, 69)) | st.just(set(range(70))),
        ),
        max_size=40,
        unique_by=lambda request: request[0],
    ),
    st.integers(0, 2**32 - 1),
)
def test_a_message_that_is_filled_in_is_the_message_of_its_records(
    requests: list[tuple[str, int, set[int]]], seed: int
) -> None:
    random = np.random.default_rng(seed)
    n = len(requests)
    fired = random.integers(0, 2**63, (70, n + 3)).astype(np.uint64) << np.uint64(1)
    dose = random.random((70, n + 3)).astype(np.float32)
    flags = random.integers(0, 4, (70, n + 3)).astype(np.uint8)
    layers = [sorted(chosen) for _, _, chosen in requests]
    forms = [form_of(name, len(chosen)) for name, _, chosen in requests]
    message = bytearray(step_of([form for form, _ in forms]))
    sizes = [len(form) for form, _ in forms]
    begins = np.cumsum([len(message) - sum(sizes), *sizes])[:-1]
    tell_tokens(
        np.array([position for _, position, _ in requests], np.int64),
        begins.astype(np.int64) + np.array([place for _, place in forms], np.int64),
        np.cumsum([0, *map(len, layers)], dtype=np.int32),
        np.array([layer for chosen in layers for layer in chosen], np.int32),
        fired,
        dose.view(np.uint32),
        flags,
        np.frombuffer(message, np.uint8),
    )
    wanted = {
        name: StepRecord(
            position,
            1,
            fired[chosen, t].tobytes(),
            dose[chosen, t].tobytes(),
            flags[chosen, t].tobytes(),
        )
        for t, ((name, position, _), chosen) in enumerate(zip(requests, layers, strict=True))
    }
    assert decode_step(bytes(message)) == wanted
    assert len(message) >= len(encode_step(wanted))
