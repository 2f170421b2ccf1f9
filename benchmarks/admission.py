"""What it takes to admit one edited request, beyond a plain one: µs in the engine core and in the worker.

A real engine with its core in this process serves one request after the other, plain and edited in turns. Timed are the
functions through which a request comes in: ``EngineCore.preprocess_add_request`` (the salt), ``Scheduler.add_request``
(slots in the row bank), ``EngineWorker.add_request`` (rows are read from the dictionary and uploaded) and the plan of its
first step, in which the tables of the resident programs are built anew.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.engine_process import ROOT, surroundings
from benchmarks.results import PARTS

BANK_ROWS = 1024
"""Less than the requests of one run hold together: rows of the one before are gone when they are wanted again."""


def measure(model: Path, dtype: str, cache: Path, n_requests: int, log: Path) -> dict[str, dict[str, list[float]]]:
    """``{"plain" or "edited": {part: [µs of each request]}}``, in a process of its own.

    Raises:
        RuntimeError: the engine could not be started; the message has the end of its log.
    """
    environment = surroundings("editserver") | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, "-m", "benchmarks.admission", str(model), dtype, str(cache), str(n_requests)]
    with log.open("wb") as out:
        done = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=out, check=False)
    lines = [line for line in done.stdout.decode().splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise RuntimeError(f"the engine for admission ended with {done.returncode}\nthe end of {log}:\n{tail}")
    result: dict[str, dict[str, list[float]]] = json.loads(lines[-1])
    return result


def _measure_here(model: str, dtype: str, cache: Path, n_requests: int) -> dict[str, dict[str, list[float]]]:
    from vllm import LLM, SamplingParams

    from benchmarks.payloads import payload
    from benchmarks.scenarios import SCENARIOS
    from benchmarks.systems import prompts, write_dictionaries
    from editserver.engine.config import EngineConfig
    from editserver.engine.worker import EngineWorker

    scenario = SCENARIOS["admission"]
    (load,) = scenario.loads
    sources = write_dictionaries(cache, [scenario])
    config = EngineConfig((10, 15, 20), tuple(sources.values()), bank_rows=BANK_ROWS)
    llm = LLM(
        model,
        dtype=dtype,  # type: ignore[arg-type]
        enforce_eager=True,
        max_model_len=1024,
        gpu_memory_utilization=0.2,
        enable_prefix_caching=False,
        additional_config={"editserver": config.as_dict()},
    )
    core: Any = llm.llm_engine.engine_core.engine_core
    clock = _Clock()
    clock.wrap(core, "preprocess_add_request", "preprocess")
    clock.wrap(core.scheduler, "add_request", "scheduler")
    clock.wrap(EngineWorker, "add_request", "rows")
    clock.wrap(EngineWorker, "begin_step", "plan")
    (prompt,) = prompts(scenario)[:1]
    took: dict[str, dict[str, list[float]]] = {kind: defaultdict(list) for kind in ("plain", "edited")}
    for request in range(-4, n_requests):  # a few to warm up
        for kind in ("plain", "edited"):
            data = payload(load, request % n_requests, sources) if kind == "edited" else None
            params = SamplingParams(
                temperature=0.0, max_tokens=1, detokenize=False, extra_args={"editserver": data} if data else None
            )
            with clock.reading() as parts:
                llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
            if request >= 0:
                for part in PARTS:
                    took[kind][part].append(1e6 * parts[part])
    return took


class _Clock:
    """Adds up the seconds spent in wrapped functions."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = defaultdict(float)

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Replace ``owner.name`` by itself, timed as ``part``."""
        original: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self._spent[part] += time.perf_counter() - start

        setattr(owner, name, timed)

    @contextmanager
    def reading(self) -> Iterator[dict[str, float]]:
        """The seconds by part of what happens inside."""
        self._spent.clear()
        yield self._spent


if __name__ == "__main__":
    print(json.dumps(_measure_here(*sys.argv[1:3], Path(sys.argv[3]), int(sys.argv[4]))), flush=True)
