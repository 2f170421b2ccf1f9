"""The device's engine inside a real vLLM: V2 model runner, asynchronous scheduling, the kernels under Triton's interpreter.

The promises of :mod:`tests.engine.promises`, each in the process of :mod:`tests.engine.device_machine`. By hand, the same for the
CPU's engine, whose scheduling vLLM never makes asynchronous: ``pytest -p tests.engine.async_machine tests/engine/promises.py``.
"""

from __future__ import annotations

import pytest

from tests.engine import promises
from tests.engine.elsewhere import cases_in, run_elsewhere

pytest.importorskip("triton.language")
pytestmark = pytest.mark.engine

PROMISES = cases_in(promises)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_elsewhere("tests.engine.device_machine", PROMISES, tmp_path_factory.mktemp("device"))


@pytest.mark.parametrize("name", PROMISES)
def test_the_promise_holds_on_the_device(outcomes: dict[str, str], name: str) -> None:
    assert outcomes[name] == ""
