"""The op's C++ part: it does what Python does, to the bit, or asks it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editserver.engine import native
from editserver.engine.compat import parallel
from editserver.engine.kernel_cpu import A
from editserver.engine.kernel_plan import EDIT, RAN, SHARE
from editserver.engine.worker import EngineWorker
from interventions.program import Payload, Read
from interventions.selectors import ALL
from tests.engine.kernel_steps import LAYER, D, Step, dictionaries, new_worker, random_step
from tests.engine.native_steps import SIMPLE, ThroughTheOp, op_in_front, served


@pytest.fixture(scope="module", autouse=True)
def _op_in_front() -> Iterator[None]:
    with op_in_front():
        yield


@settings(max_examples=120, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
    st.integers(1, 6),
)
def test_a_step_through_the_op_is_the_step_of_python(seed: int, dtype: torch.dtype, split: bool, n_parts: int) -> None:
    step = random_step(seed, dtype, split, n_parts)
    python = step.run(new_worker(dtype))
    worker = ThroughTheOp(served(dtype))
    through = step.run(worker)
    assert torch.equal(through.hidden.view(torch.uint8), python.hidden.view(torch.uint8))
    if split:
        assert through.residual is not None
        assert python.residual is not None
        assert torch.equal(through.residual.view(torch.uint8), python.residual.view(torch.uint8))
    assert through.records == python.records
    programs = [part.payload.program for part in step.parts if part.payload is not None]
    kinds = {channel.read for program in programs if program for channel in program.layers[0].channels}
    alone = not kinds or (dtype is not torch.float16 and kinds <= set(SIMPLE))
    assert worker.asked == ([] if alone else [LAYER]), kinds


def test_requests_that_come_and_go_are_edited_by_their_own_programs() -> None:
    """One engine, step upon step: what it wrote down for other residents is never used again."""
    worker, alone = ThroughTheOp(served(torch.bfloat16)), 0
    for seed in range(60):
        step = random_step(seed, torch.bfloat16, True, 1 + seed % 4)
        python, through = step.run(new_worker(torch.bfloat16)), step.run(worker)
        assert torch.equal(through.hidden, python.hidden)
        assert torch.equal(through.stream, python.stream)
        assert through.records == python.records
        alone += not worker.asked and not torch.equal(through.stream, step.stream)
        worker.asked.clear()
    assert alone > 2


def test_a_mixed_batch_was_edited_without_python() -> None:
    """What the property above says of ``asked`` is not empty: such steps exist, and they edit."""
    n = 0
    for seed in range(200):
        step = random_step(seed, torch.bfloat16, True, 3, plain=0.4)
        worker = ThroughTheOp(served(torch.bfloat16))
        done = step.run(worker)
        n += not worker.asked and not torch.equal(done.stream, step.stream)
    assert n > 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_which_thread_edits_a_token_changes_no_bit(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    threads, several = torch.get_num_threads(), 0
    engine = served(dtype)
    for seed in range(400):
        step = random_step(seed, dtype, seed % 3 > 0, 1 + seed % 6, plain=0.2)
        if not simple(step):
            continue
        alone = step.run(ThroughTheOp(engine))
        with monkeypatch.context() as patched:
            patched.setattr(native, "THREAD_FLOATS", 1)
            torch.set_num_threads(3)
            try:
                together = step.run(ThroughTheOp(engine))
            finally:
                torch.set_num_threads(threads)
        assert torch.equal(together.hidden.view(torch.uint8), alone.hidden.view(torch.uint8))
        assert torch.equal(together.stream.view(torch.uint8), alone.stream.view(torch.uint8))
        assert together.records == alone.records
        assert engine.jobs is not None
        several += engine.jobs.table[LAYER, RAN] == 3 and not torch.equal(alone.stream, step.stream)
    assert several > 5


@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="this PyTorch has no OpenMP, nor has the op then")
def test_the_op_has_no_openmp_of_its_own() -> None:
    """Its threads are those of the runtime that PyTorch loaded: a second one would have others, beside vLLM's pinned ones."""
    built = Path(native._built()).read_bytes()
    assert b"GOMP_parallel" in built or b"__kmpc_fork_call" in built
    assert not any(name in built for name in (b"libgomp", b"libomp", b"libiomp"))


def test_a_thread_is_woken_for_work_that_is_worth_it() -> None:
    """Of 16 requests of 8 rows of 576 numbers each, two threads have their share; of one row each, none is woken."""
    jobs = native.Jobs((LAYER,), 576, torch.bfloat16)
    jobs.always(LAYER, {A.d: 576})
    for n_rows, shares in ((1, 1), (8, 2), (32, 8)):
        jobs.know({LAYER: EDIT}, {LAYER: {A.residents: 16, A.channels: 16 * n_rows}})
        assert -(-16 // int(jobs.table[LAYER, SHARE])) == shares


def simple(step: Step) -> bool:
    """Whether its programs need nothing but their own rows."""
    programs = [part.payload.program for part in step.parts if part.payload is not None]
    return {channel.read for program in programs if program for channel in program.layers[0].channels} <= set(SIMPLE)


def planned(worker: EngineWorker, reads: tuple[Read, ...] = ()) -> Step:
    """A batch of one request that edits, of rows in the bank alone, planned and not yet run."""
    for seed in range(10_000):
        step = random_step(seed, torch.bfloat16, True, 1, plain=0.0)
        (part,) = step.parts
        assert part.payload is not None
        assert part.payload.program is not None
        kinds = {channel.read for channel in part.payload.program.layers[0].channels}
        if (
            len(part.ids) > 1
            and kinds <= set(SIMPLE)
            and not torch.equal(step.run(new_worker(torch.bfloat16)).stream, step.stream)
        ):
            break
    payload = Payload(part.payload.program, reads, part.payload.digest)
    worker.add_request("a", payload, list(range(len(payload.row_keys))), part.prompt_len)
    query_start = np.array([0, len(part.ids)], np.int32)
    worker.begin_step(["a"], query_start, part.positions.numpy(), part.ids.to(torch.int32).numpy())
    return step


def test_readings_are_pythons_business() -> None:
    sae = next(iter(dictionaries()[1].values()))
    worker = ThroughTheOp(served(torch.bfloat16))
    step = planned(worker, (Read(sae.digest, LAYER, (1, 2), 0, ALL),))
    worker.run(LAYER, step.hidden, step.residual)
    assert worker.asked == [LAYER]
    assert worker.end_step()["a"].reads


def test_ranks_that_must_agree_are_asked_by_python() -> None:
    worker = ThroughTheOp(served(torch.bfloat16))
    agreed: list[int] = []
    worker.agree = lambda h: agreed.append(len(h))
    step = planned(worker)
    worker.run(LAYER, step.hidden, step.residual)
    assert worker.asked == [LAYER]
    assert agreed


@pytest.mark.parametrize("what", ["strides", "type", "length", "width"])
def test_tensors_that_do_not_fit_go_to_python(what: str) -> None:
    worker = ThroughTheOp(served(torch.bfloat16))
    step = planned(worker)
    assert step.residual is not None
    plain = step.hidden.clone(), step.residual.clone()
    given = {
        "strides": lambda x: torch.cat([x, x], 1)[:, :D],
        "type": lambda x: x.float(),
        "length": lambda x: x[: worker.plan.stop - 1],
        "width": lambda x: x[:, :-1].contiguous(),
    }[what]
    tensors = [given(x) for x in plain]
    if what != "strides":
        said = "dtypes match" if what == "type" else "do not carry the whole residual stream"
        with pytest.raises(RuntimeError, match=said):  # Python's, through C++
            worker.run(LAYER, *tensors)
        assert worker.asked == [LAYER]
        return
    worker.run(LAYER, *tensors)
    assert worker.asked == [LAYER]
    done = Step(step.parts, *plain).run(new_worker(torch.bfloat16))
    assert torch.equal(tensors[1], done.residual)


def test_nothing_is_edited_between_steps_and_dummies_are_counted() -> None:
    worker = ThroughTheOp(served(torch.bfloat16))
    step = planned(worker)
    tensors = step.hidden.clone(), step.residual.clone() if step.residual is not None else None
    worker.run(LAYER, *tensors)
    worker.end_step()
    for _ in range(2):
        again = step.hidden.clone(), step.residual.clone() if step.residual is not None else None
        worker.run(LAYER, *again)
        assert torch.equal(again[0], step.hidden)
        worker.idle_step()
    assert not worker.asked, "an idle op came to Python"
    worker.count_visits()
    worker.run(LAYER, *tensors)
    assert worker.visits == {LAYER: 1}
    worker.asked.clear()
    worker.run(LAYER, *tensors)
    assert not worker.asked, "an idle op came to Python once all was counted"


def test_ranks_that_are_compared_hear_every_op(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = served(torch.bfloat16)
    monkeypatch.setattr(parallel, "_difference", lambda *_: 0.5)
    hidden, residual, worst = torch.zeros(2, D).bfloat16(), torch.zeros(2, D).bfloat16(), dict[int, float]()
    with parallel._compared(worker, worst) as ran:
        worker.idle_step()
        torch.ops.editserver.edit(hidden, residual, LAYER)
    assert ran == {LAYER}
    assert worst == {LAYER: 0.5}
    asking = ThroughTheOp(worker)
    asking.run(LAYER, hidden, residual)
    assert not asking.asked, "idle ops come to Python for good"


def test_a_step_whose_op_did_not_run_is_an_error() -> None:
    worker = ThroughTheOp(served(torch.bfloat16))
    planned(worker)
    with pytest.raises(RuntimeError, match="did not run in this step"):
        worker.end_step()


def in_a_process(code: str, **environment: str) -> str:
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    return found.stdout + found.stderr


WITHOUT = """
import logging, torch
logging.basicConfig()
from editserver.engine import native, op
assert not native.load()
try:
    torch.ops.editserver.edit(torch.zeros(1, 2), torch.zeros(1, 2), 0)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize(
    "environment", [{native.SETTING: "0"}, {"CXX": "false"}, {"CXX": "no-such-compiler"}], ids=lambda e: "".join(e)
)
def test_without_it_ops_are_pythons(environment: dict[str, Any], tmp_path: Path) -> None:
    said = in_a_process(WITHOUT, EDITSERVER_CACHE=str(tmp_path), **environment)
    assert "an armed layer ran in a process that has no editserver engine" in said
    assert ("could not be built" in said) == (native.SETTING not in environment)


def test_a_build_that_cannot_be_loaded_leaves_ops_to_python(tmp_path: Path) -> None:
    in_a_process("from editserver.engine import native; assert native.load()", EDITSERVER_CACHE=str(tmp_path))
    (built,) = (tmp_path / "native").iterdir()
    built.write_bytes(b"no library")
    said = in_a_process(WITHOUT, EDITSERVER_CACHE=str(tmp_path))
    assert "an armed layer ran in a process that has no editserver engine" in said
    assert "could not be built" in said


def test_the_source_is_built_once(tmp_path: Path) -> None:
    code = "from editserver.engine import native; assert native.load()"
    in_a_process(code, EDITSERVER_CACHE=str(tmp_path))
    in_a_process(code, EDITSERVER_CACHE=str(tmp_path), CXX="no-such-compiler")
    (built,) = (tmp_path / "native").iterdir()
    assert built.suffix == ".so"
