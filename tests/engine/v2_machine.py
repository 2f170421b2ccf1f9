"""A pytest plugin (``-p tests.engine.v2_machine``): every engine that the run starts uses vLLM's V2 model runner, on a CPU.

vLLM's CPU backend has that runner where Triton can compile for CPUs. Here Triton's interpreter runs its kernels instead, on the
same tensors in the same order; the runner, its batches and its request states are vLLM's own, unchanged. Only the kernels
that walk the vocabulary behind the model take it in one block instead of 48: interpreted, they would be nine tenths of a test.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"


class _Interpreter:
    """What vLLM asks of a Triton backend before it uses Triton (vllm/triton_utils/importing.py:29)."""

    @staticmethod
    def is_active() -> bool:
        return True


def _take_the_interpreter_for_a_cpu_backend() -> None:
    from triton.backends import Backend, backends

    backends["cpu"] = Backend(compiler=None, driver=_Interpreter)
    from vllm.triton_utils import HAS_TRITON

    assert HAS_TRITON
    del backends["cpu"]  # Inductor would ask it to compile


_take_the_interpreter_for_a_cpu_backend()


@dataclass(frozen=True)
class _InOneBlock:
    """A kernel that is launched with ``prepare``d arguments."""

    kernel: Any
    prepare: Callable[[tuple[int, ...], tuple[Any, ...], dict[str, Any]], tuple[int, ...]]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            kwargs["BLOCK_SIZE"] = WHOLE_VOCABULARY
            self.kernel[self.prepare(grid, args, kwargs)](*args, **kwargs)

        return launch


WHOLE_VOCABULARY = 65_536


def _rows(grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    return grid


def _first_block_of_each_row(grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    args[2].fill_(float("-inf"))  # local_max of the blocks that are not launched
    return grid[0], 1


def sample_in_one_block() -> None:
    """Have this process's kernels that walk the vocabulary take it in one block."""
    import vllm.v1.worker.cpu.shm  # noqa: F401  (vLLM: "must be imported firstly")
    from vllm.v1.worker.gpu.sample import gumbel, logprob

    gumbel._gumbel_sample_kernel = _InOneBlock(gumbel._gumbel_sample_kernel, _first_block_of_each_row)
    logprob._topk_log_softmax_kernel = _InOneBlock(logprob._topk_log_softmax_kernel, _rows)
    logprob._ranks_kernel = _InOneBlock(logprob._ranks_kernel, _rows)


@pytest.fixture(scope="session", autouse=True)
def _fast_sampling() -> None:
    sample_in_one_block()


@pytest.fixture(autouse=True)
def _ran_on_the_v2_runner(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "engine" in request.fixturenames:
        runner: Any = request.getfixturevalue("engine").runner
        assert [c.__module__ for c in type(runner).__mro__[:2]] == [
            "vllm.v1.worker.cpu.model_runner",
            "vllm.v1.worker.gpu.model_runner",
        ]
