"""A server that cannot edit says so before the first request, and never answers an edited request unedited (promise 6)."""

from __future__ import annotations

import pytest

from tests.engine.test_compile_cache import PROMPT, steering
from tests.engine.tiny import Job, Result, run_all, write_model

pytestmark = pytest.mark.engine

EDITED = steering(1).to_bytes().hex()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    """Of two servers."""
    folder = tmp_path_factory.mktemp("handshake")
    model, plain, edited = str(write_model(folder / "model")), (PROMPT, None), (PROMPT, EDITED)
    jobs = [
        Job(model, [1, 2], [plain, edited], eager=True, unarm=[1]),
        Job(model, None, [plain, edited, plain], eager=True),
    ]
    return run_all(jobs, folder / "started", {})


@pytest.fixture(scope="module")
def unspliced(results: list[Result]) -> Result:
    """Armed at layers 1 and 2; layer 1 then loses its splice. Asked: plain, edited at layer 1."""
    return results[0]


@pytest.fixture(scope="module")
def unconfigured(results: list[Result]) -> Result:
    """The plugin is installed, the server was started without its configuration. Asked: plain, edited, plain."""
    return results[1]


def test_the_handshake_counts_the_ops_that_the_model_really_calls(unspliced: Result) -> None:
    before, after = unspliced.handshakes
    assert (before["ok"], before["error"], before["armed"]) == (True, None, [1, 2])
    assert not after["ok"]
    assert after["error"] == "the compiled model does not call the edit op of layers [1]"


def test_a_step_whose_op_did_not_run_fails_instead_of_answering_unedited(unspliced: Result) -> None:
    plain, edited = unspliced.answers
    assert len(plain["tokens"]) == 4
    assert "the edit op of layers [1] did not run in this step" in edited["error"]


def test_a_server_without_configuration_refuses_programs_by_name(unconfigured: Result) -> None:
    before, edited, after = unconfigured.answers
    assert "this server was not started with editserver: it cannot run interventions" in edited["error"]
    assert before == after, "and answers the next request as before"
    assert len(after["tokens"]) == 4


def test_a_server_without_configuration_arms_nothing(unconfigured: Result, unspliced: Result) -> None:
    assert "editserver.engine.plugin" in unconfigured.editserver_modules
    assert "editserver.engine.op" not in unconfigured.editserver_modules
    assert "editserver: armed layers [1, 2] of LlamaForCausalLM" in unspliced.log
    assert "editserver: armed" not in unconfigured.log
