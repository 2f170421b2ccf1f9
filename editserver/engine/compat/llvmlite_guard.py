"""Let vLLM's start and llvmlite live in one process.

Where a worker starts, vLLM looks through all loaded modules with ``hasattr(value, "__dict__")`` and ``vars(value).get``
(vllm/triton_utils/dispatcher.py:138). llvmlite's library object answers *every* attribute with a C function, ``__dict__``
included, and the start fails. Special names are never C functions, so it may as well say that it has none.
"""

from __future__ import annotations

import sys
from typing import Any


def install() -> None:
    """Make llvmlite's library object refuse special attribute names, if llvmlite is loaded. Idempotent."""
    ffi: Any = sys.modules.get("llvmlite.binding.ffi")
    wrapper = getattr(ffi, "_lib_wrapper", None)
    if wrapper is None or getattr(wrapper.__getattr__, "editserver", False):
        return
    original = wrapper.__getattr__

    def __getattr__(self: Any, name: str) -> Any:  # noqa: N807
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return original(self, name)

    __getattr__.editserver = True  # type: ignore[attr-defined]
    wrapper.__getattr__ = __getattr__
