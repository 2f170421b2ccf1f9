"""A pytest plugin (``-p tests.engine.device_machine``): as ``async_machine``, and edited by the kernels of the device."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

from tests.engine.async_machine import _fast_sampling, _ran_on_the_v2_runner, _scheduled_ahead

__all__ = ["_fast_sampling", "_ran_on_the_v2_runner", "_scheduled_ahead"]

os.environ["EDITSERVER_ENGINE"] = "device"


@pytest.fixture(autouse=True)
def _edited_by_kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):  # computed with, and then not chosen
        yield
    if "engine" in request.fixturenames:
        from editserver.engine import op
        from editserver.engine.triton.worker import DeviceWorker

        assert isinstance(op.current(), DeviceWorker)
