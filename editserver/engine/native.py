"""The op of the CPU's engine in C++, where a compiler is at hand: what is due at each layer, ready before the model runs.

Between two armed layers a model sweeps all caches, so a step pays for every line of code and every object that an op goes
through. Arithmetic is the same kernel's in either way (:func:`editserver.engine.kernel_cpu.edit_tokens`); what goes away is
Python: the op of a layer that has nothing to do, or edits that need their own rows only, never enters the interpreter.
Readings, rules, gates, whole dictionaries and agreement between ranks are Python's business as before.

torch.compile on a CPU needs a C++ compiler anyway. Where there is none, or ``EDITSERVER_NATIVE_OP=0``, ops are Python's.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import math
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from editserver.engine.kernel_cpu import BY_TOKEN, A, edit_block
from editserver.engine.kernel_plan import ASK, AT, DUE, JOB_COLUMNS, NOTHING, RAN, ROWS, SHARE, TYPE, WIDTH
from sae_weights.cache import cache_root

logger = logging.getLogger("vllm.editserver")

SOURCE = Path(__file__).with_name("native_op.cpp")
SETTING = "EDITSERVER_NATIVE_OP"

TYPES = {torch.float32: 6, torch.bfloat16: 15}
"""c10/core/ScalarType.h."""

THREAD_FLOATS = 1 << 15
"""As many numbers of rows are worth waking a thread for: some 20 µs of reading them."""

Array = npt.NDArray[Any]


class Jobs:
    """What is due at every layer in the step that comes: memory that the C++ op reads, at addresses that do not change.

    Outside of a step everything is due that Python says: nothing, or to be asked.

    Attributes:
        table: int64 ``[layers, JOB_COLUMNS]``.
        due: int64 ``[layers]``: as :meth:`know` was told.
    """

    def __init__(self, armed: Collection[int], width: int, dtype: torch.dtype) -> None:
        self.armed = tuple(armed)
        self._place = {layer: i for i, layer in enumerate(self.armed)}
        self._arguments = np.zeros((len(self.armed), len(A)), np.int64)
        self._written = [memoryview(row.data) for row in self._arguments]
        """Its rows: a number enters in a tenth of numpy's time."""
        self.table = np.zeros((max(self.armed, default=-1) + 1, len(JOB_COLUMNS)), np.int64)
        self.table[:, DUE] = ASK
        self.table[:, WIDTH] = width
        self.table[:, TYPE] = TYPES.get(dtype, -1)
        for layer, place in self._place.items():
            self.table[layer, AT] = address(self._arguments[place])
        self.due = np.full(len(self.table), ASK)
        self._kept: list[Array] = []

    def say(self, due: int) -> None:
        """The same at every layer."""
        self.table[:, DUE] = due

    def always(self, layer: int, arguments: Mapping[int, int | Array]) -> None:
        """What the kernel is given at ``layer`` in every step. An array stands for its address, and is kept from going away."""
        row = self._arguments[self._place[layer]]
        for column, value in arguments.items():
            row[column] = address(value) if isinstance(value, np.ndarray) else value
        self._kept += [value for value in arguments.values() if isinstance(value, np.ndarray)]

    def know(self, due: Mapping[int, int], arguments: Mapping[int, Mapping[int, int]]) -> None:
        """What is due at each layer in steps with the same residents; the rest of the kernel's arguments where that is EDIT.

        What stands at addresses among them has to stay there until the next :meth:`know`, or :meth:`say`.
        """
        self.due[:] = NOTHING
        for layer, what in due.items():
            self.due[layer] = what
        for layer, given in arguments.items():
            row = self._written[self._place[layer]]
            for column, value in given.items():
                row[column] = value
            a_token = row[A.d] * row[A.channels] / max(row[A.residents], 1)
            self.table[layer, SHARE] = max(1, math.ceil(THREAD_FLOATS / max(a_token, 1)))

    def begin(self, tokens: int, rows: int) -> None:
        """A step of ``tokens`` planned tokens, the last of them in row ``rows`` - 1 of the batch."""
        self._arguments[:, A.n] = tokens
        self.table[:, ROWS] = rows
        self.table[:, RAN] = 0
        self.table[:, DUE] = self.due

    @property
    def alone(self) -> bool:
        """Whether nothing is due, by what :meth:`know` was told, that Python has to be asked for."""
        return not (self.due == ASK).any()

    @property
    def ran(self) -> set[int]:
        """Layers whose edit was done without Python since :meth:`begin`."""
        return {layer for layer in self.armed if self.table[layer, RAN]}


def address(array: Array) -> int:
    """Where a contiguous array's numbers begin."""
    assert array.flags.c_contiguous
    where: int = array.__array_interface__["data"][0]
    return where


_LAYOUT = np.array([len(A), A.n, A.tokens, A.scratch, A.delta, *(BY_TOKEN.get(i, 0) for i in A)], np.int64)
"""``Layout`` in the C++ op's source."""

_library: ctypes.CDLL | None = None
"""The C++ op's, once it is loaded."""


def serve(jobs: Jobs | None) -> None:
    """The op looks at ``jobs`` from now on, which must stay; None: at nothing, and always asks Python."""
    if _library is None:
        return
    if jobs is None:
        _library.editserver_jobs(0, 0, 0, 0)
    else:
        _library.editserver_jobs(address(jobs.table), len(jobs.table), edit_block(), address(_LAYOUT))


@contextmanager
def aside(jobs: Jobs | None) -> Iterator[None]:
    """While this lasts every op comes to Python; afterwards ``jobs`` count again."""
    serve(None)
    try:
        yield
    finally:
        serve(jobs)


def load() -> bool:
    """Have the C++ op take the place of Python's, in this process for good; False where it cannot be built.

    It is built once for a source, a PyTorch and an interpreter: some seconds.
    """
    global _library
    if _library is not None:
        return True
    if os.environ.get(SETTING, "1") == "0":
        return False
    from editserver.engine import op

    try:
        path = _built()
        op.give_way()
        torch.ops.load_library(path)
        library = ctypes.CDLL(path)
    except (
        OSError,
        RuntimeError,
        subprocess.SubprocessError,
    ) as error:  # no compiler; a cache that must not be executed
        op.take_over()
        logger.warning(
            "editserver: edits go through Python, as the op's C++ part could not be built or loaded: %s", _why(error)
        )
        return False
    _library = library
    _library.editserver_jobs.argtypes = [ctypes.c_int64] * 4
    _library.editserver_jobs.restype = None
    return True


def _built() -> str:
    """Path of the shared object."""
    from torch.utils import cpp_extension

    what = (SOURCE.read_bytes(), torch.__version__.encode(), platform.machine().encode())
    folder = cache_root() / "native"
    built = folder / f"editserver_op_{hashlib.sha256(b'|'.join(what)).hexdigest()[:16]}.so"
    if built.exists():
        return str(built)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # ranks may build at once: the last one's stays
        compiler = shlex.split(cpp_extension.get_cxx_compiler())
        compiled, made = Path(scratch, "op.o"), Path(scratch, built.name)
        commands = (
            [
                *(*compiler, "-c", "-O2", "-std=c++20", "-fPIC"),
                *(["-fopenmp"] if torch.backends.openmp.is_available() else []),
                f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
                *(f"-I{path}" for path in cpp_extension.include_paths()),
                *(str(SOURCE), "-o", str(compiled)),
            ],
            # Without -fopenmp: OpenMP's threads are those of the runtime that PyTorch brought into the process, whose name differs
            # from build to build. A second one would have threads of its own.
            [
                *(*compiler, "-shared", str(compiled)),
                *(f"-L{path}" for path in cpp_extension.library_paths()),
                *("-lc10", "-ltorch_cpu", "-o", str(made)),
            ],
        )
        for command in commands:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        made.replace(built)
    return str(built)


def _why(error: Exception) -> str:
    said = error.stderr if isinstance(error, subprocess.CalledProcessError) else ""
    lines = [line for line in said.splitlines() if "error" in line]
    return lines[0] if lines else str(error)
