"""Where there is no GPU, Triton's interpreter runs the kernels. It is asked for while they are imported and at no other time:
Triton decides then."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch

pytest.importorskip("triton.language")
before = os.environ.get("TRITON_INTERPRET")
os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"
try:
    from editserver.engine.triton import encode, rules, step  # noqa: F401
finally:
    del os.environ["TRITON_INTERPRET"]
    if before is not None:
        os.environ["TRITON_INTERPRET"] = before


@pytest.fixture(autouse=True)
def _quiet_interpreter() -> Iterator[None]:
    """NaN and infinity are computed with and then not chosen; NumPy would warn of it."""
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        yield
