"""A pytest plugin (``-p tests.engine.async_machine``): as :mod:`tests.engine.v2_machine`, with asynchronous scheduling.

vLLM turns it off on a CPU, where it gains nothing. The scheduler, the queue of two batches and the runner's late outputs are
there all the same: a step is scheduled and run before the tokens of the one before it are known to the scheduler.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.engine.v2_machine import _fast_sampling, _ran_on_the_v2_runner

__all__ = ["_fast_sampling", "_ran_on_the_v2_runner"]


def _switch_on() -> None:
    from vllm.platforms.cpu import CpuPlatform

    update = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: type[Any], vllm_config: Any) -> None:
        update(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


_switch_on()


@pytest.fixture(autouse=True)
def _scheduled_ahead(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "engine" in request.fixturenames:
        engine: Any = request.getfixturevalue("engine")
        assert engine.scheduler.vllm_config.scheduler_config.async_scheduling
        assert type(engine.scheduler).__name__ == "AsyncScheduler"
        assert engine.core.batch_queue is not None
