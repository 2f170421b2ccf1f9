"""One vLLM engine in a process of its own, told over a socket what to run and answering with seconds.

Vanilla and armed engines must not share a process: loading a plugin wraps classes for good. And a peer's engine runs under
another interpreter, whose vLLM is another version; so this module imports neither vLLM nor anything of ours before it
knows what it is to be, and what goes over the socket are plain values.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from benchmarks.processes import Family

ROOT = Path(__file__).resolve().parent.parent
ROOM, BARE = ROOT / "benchmarks" / "room", "BENCHMARKS_BARE"
KEY, CONFIG = "BENCHMARK_SOCKET_KEY", "config.json"


@dataclass(frozen=True)
class Batch:
    """Requests that are sent at once to an engine with an empty prefix cache.

    ``payloads`` are editserver's, ``vectors`` vllm-lens's (per request layers and their float32 rows); either may be empty.
    """

    prompts: list[list[int]]
    max_tokens: int
    payloads: list[bytes | None] = field(default_factory=list)
    vectors: list[tuple[list[int], bytes]] = field(default_factory=list)


@dataclass(frozen=True)
class Ran:
    """One batch's time, and what shows that the work was done.

    Attributes:
        seconds: from the first request to the last token.
        step: the median of what a step took, from the third token of the slowest request on: prompts have been computed.
        edited: tokens that the requests' first intervention changed at layer 15, by editserver's receipts.
        read: tokens that were inspected or judged by rules.
        accepted, drafted: drafts of speculation.
        tokens: the generated ones of each request.
    """

    seconds: float
    step: float
    edited: int
    read: int
    accepted: int
    drafted: int
    tokens: list[list[int]]


def surroundings(plugin: str) -> dict[str, str]:
    """Environment of a system that loads this plugin of vLLM, if any, and this tree's code.

    Every system has the room for Python's frames that editserver gives itself (:mod:`editserver.engine.frames`), as a plugin:
    without, a step of vanilla may take longer, and editing would seem to make it faster. ``BENCHMARKS_BARE=1``: as installed.

    On a CPU, vLLM (0.30 to 0.32) cannot load what it saves when it compiles ahead of time ("no attribute 'finalize_loading'"), and
    compiles anew at every start; without, Inductor's cache serves it.
    """
    bare = os.environ.get(BARE) == "1"
    plugins = (plugin, "" if bare else "room")
    paths = (str(ROOT), "" if bare else str(ROOM), os.environ.get("PYTHONPATH"))
    return os.environ | {
        "VLLM_PLUGINS": ",".join(filter(None, plugins)),
        "VLLM_USE_AOT_COMPILE": os.environ.get("VLLM_USE_AOT_COMPILE", "0"),
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


class EngineProcess:
    """An engine behind a socket."""

    def __init__(self, python: Path, plugins: str, config: dict[str, Any], log: Path) -> None:
        """Start it with ``python`` and vLLM's ``plugins``; ``config`` goes to ``LLM``, what it says into ``log``."""
        self._folder = tempfile.TemporaryDirectory(prefix="bench-")
        address, key = f"{self._folder.name}/socket", secrets.token_hex(16)
        self._listener = Listener(address, "AF_UNIX", authkey=key.encode())
        Path(self._folder.name, CONFIG).write_text(json.dumps(config), encoding="utf-8")
        environment = surroundings(plugins) | {KEY: key, "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
        self._log = log
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                [str(python), "-m", "benchmarks.engine_process", address],
                env=environment,
                cwd=ROOT,
                stdout=out,
                stderr=out,
            )
        self.family = Family(self._process.pid)
        self._pipe: Connection | None = None

    def wait_ready(self, timeout: float = 1200.0) -> dict[str, str]:
        """Block until the engine answers; its versions.

        Raises:
            RuntimeError: it died or does not answer; the message has the end of its log.
        """
        self._listener._listener._socket.settimeout(1.0)  # type: ignore[attr-defined]
        deadline = time.monotonic() + timeout
        while self._pipe is None:
            try:
                self._pipe = self._listener.accept()
            except TimeoutError:
                self._check(deadline)
        versions: dict[str, str] = self._answer(deadline)
        return versions

    def run(self, batch: Batch) -> Ran:
        """Generate ``batch.max_tokens`` tokens for every prompt, all at once, from an empty prefix cache."""
        assert self._pipe is not None
        self._pipe.send(vars(batch))
        return Ran(**self._answer(time.monotonic() + 600))

    def close(self) -> None:
        """Stop the engine."""
        self.family.release()
        if self._pipe is not None and self._process.poll() is None:
            self._pipe.send(None)
        self.family.end(30.0 if self._pipe is not None else 0.0)
        self._process.wait()
        self._listener.close()
        self._folder.cleanup()

    def _answer(self, deadline: float) -> Any:
        assert self._pipe is not None
        try:
            while not self._pipe.poll(1.0):
                self._check(deadline)
            return self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.wait(10)
            self._check(0.0)

    def _check(self, deadline: float) -> None:
        died = self._process.poll() is not None
        if died or time.monotonic() > deadline:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-25:])
            raise RuntimeError(f"an engine {'died' if died else 'does not answer'}\nthe end of {self._log}:\n{tail}")


def _serve(address: str) -> None:
    key = os.environ.pop(KEY).encode()
    engine_args = json.loads(Path(address).with_name(CONFIG).read_text(encoding="utf-8"))
    import torch
    import vllm
    from vllm import LLM

    llm = LLM(**engine_args)
    if "editserver" in engine_args.get("additional_config", {}):
        for answer in llm.collective_rpc("editserver_handshake"):
            assert answer["ok"], answer
    pipe = Client(address, "AF_UNIX", authkey=key)
    pipe.send({"vllm": vllm.__version__, "torch": torch.__version__})
    while (job := pipe.recv()) is not None:
        pipe.send(_run(llm, Batch(**job)))
    llm.llm_engine.engine_core.shutdown()


def _run(llm: Any, batch: Batch) -> dict[str, Any]:
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0.0, max_tokens=batch.max_tokens, ignore_eos=True, detokenize=False, extra_args=extra
        )
        for extra in _extra_args(batch)
    ]
    prompts = [{"prompt_token_ids": prompt} for prompt in batch.prompts]
    llm.reset_prefix_cache()
    accepted, drafted = _drafts(llm)
    start = time.perf_counter()
    with _steps(llm) as ended:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    periods = [after - before for before, after in itertools.pairwise(ended)][-max(1, batch.max_tokens - 2) :]
    accepted_after, drafted_after = _drafts(llm)
    journals = [j for o in outputs if (j := getattr(o.outputs[0], "editserver", None)) is not None]
    stop = len(batch.prompts[0]) + batch.max_tokens
    read = sum(len(journal.readings(0, 0, stop)) for journal in journals if journal.payload.reads)
    read += sum(len(trace.held) - 1 for journal in journals if (trace := journal.rules) is not None)
    return {
        "seconds": seconds,
        "step": statistics.median(periods) if periods else seconds,
        "edited": sum(journal.stats(0, 15, stop).fired for journal in journals if journal.payload.program),
        "read": read,
        "accepted": accepted_after - accepted,
        "drafted": drafted_after - drafted,
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
    }


@contextmanager
def _steps(llm: Any) -> Iterator[list[float]]:
    """When each step of the engine has been answered, in seconds."""
    ended: list[float] = []
    step = llm.llm_engine.step

    def timed(*args: Any, **kwargs: Any) -> Any:
        out = step(*args, **kwargs)
        ended.append(time.perf_counter())
        return out

    llm.llm_engine.step = timed
    try:
        yield ended
    finally:
        del llm.llm_engine.step


def _extra_args(batch: Batch) -> Sequence[dict[str, Any] | None]:
    if batch.vectors:
        import torch
        from vllm_lens import SteeringVector

        made = []
        for layers, data in batch.vectors:
            rows = torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(len(layers), -1)
            made.append({"apply_steering_vectors": [SteeringVector(activations=rows, layer_indices=layers)]})
        return made
    if batch.payloads:
        return [{"editserver": payload} if payload else None for payload in batch.payloads]
    return [None] * len(batch.prompts)


def _drafts(llm: Any) -> tuple[int, int]:
    """Accepted and proposed draft tokens so far."""
    if llm.llm_engine.vllm_config.speculative_config is None:
        return 0, 0
    counted = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    names = ("vllm:spec_decode_num_accepted_tokens", "vllm:spec_decode_num_draft_tokens")
    accepted, drafted = (int(counted.get(name, 0)) for name in names)
    return accepted, drafted


if __name__ == "__main__":
    _serve(sys.argv[1])
