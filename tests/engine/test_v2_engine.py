"""vLLM's V2 model runner, for real: what is promised of the engine holds on it as on V1's.

The promises of :mod:`tests.engine.promises`, each in a process of their own that has that runner
(:mod:`tests.engine.v2_machine`); any other test of an engine can be run there the same way.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from interventions.reference import ReferenceExecutor
from tests.engine import promises
from tests.engine.elsewhere import cases_in, run_elsewhere
from tests.engine.test_compile_cache import FOUND, PROMPT, SAVED, assert_reference, difference, steering
from tests.engine.tiny import Job, Result, run_all, write_model

pytestmark = pytest.mark.engine

PROMISES = cases_in(promises)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_elsewhere("tests.engine.v2_machine", PROMISES, tmp_path_factory.mktemp("v2"))


@pytest.mark.parametrize("name", PROMISES)
def test_the_promise_holds_on_the_v2_runner(outcomes: dict[str, str], name: str) -> None:
    assert outcomes[name] == ""


ENGINES = ("auto", "device")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Result]]:
    """The tiny model with torch.compile, armed at layer 1, edited by the CPU's engine and by the device's, whose kernels are
    interpreted. Each is asked: plain, edited, plain, edited at a layer that is not armed."""
    folder = write_model(tmp_path_factory.mktemp("compiled"))
    payloads = [None, steering(1).to_bytes().hex(), None, steering(2).to_bytes().hex()]
    requests = [(PROMPT, payload) for payload in payloads]
    jobs = [Job(str(folder), [1], requests, v2=True, engine=engine) for engine in ENGINES]
    caches = {"VLLM_CACHE_ROOT": str(folder / "vllm"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    return folder, dict(zip(ENGINES, run_all(jobs, folder / "started", caches), strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_compiled_graphs_call_the_op_on_the_v2_runner_and_answer_as_the_reference_does(
    compiled: tuple[Path, dict[str, Result]], engine: str
) -> None:
    from transformers import AutoModelForCausalLM

    folder, result = compiled[0], compiled[1][engine]
    assert result.runner == "vllm.v1.worker.cpu.model_runner"
    assert SAVED.search(result.log) or FOUND.search(result.log), "it was compiled"
    (handshake,) = result.handshakes
    assert (handshake["ok"], handshake["armed"]) == (True, [1])
    assert (handshake["device"] is not None) == (engine == "device")
    reference = ReferenceExecutor(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    for i, payload in enumerate((None, steering(1), None)):
        assert_reference(reference, result, i, payload)
    assert result.answers[0] == result.answers[2], "bit for bit, and shared with nobody who is edited"
    assert difference(result, 0, 1) >= 0.1
    assert result.fired[1]["1"] == len(PROMPT) + 4 - 2
    assert "the program touches the layers [2], armed are [1]" in result.answers[3]["error"]
