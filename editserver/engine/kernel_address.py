"""Memory by its address, for compiled functions that are given numbers only (:mod:`numba`)."""

from __future__ import annotations

from typing import Any

from numba.core import cgutils, types
from numba.extending import intrinsic


@intrinsic
def pointer(context: Any, address: Any) -> Any:
    """The address as a pointer: tensors come as ``data_ptr()``, which costs less than a view of them as an array."""

    def generate(_: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.intp), generate
