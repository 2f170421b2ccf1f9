"""One vLLM engine in a process of its own, told over a pipe what to run and answering with seconds.

Vanilla and armed engines must not share a process: loading the plugin wraps classes for good.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any


def _serve(pipe: Connection, armed: bool, engine_args: dict[str, Any]) -> None:
    os.environ["VLLM_PLUGINS"] = "editserver" if armed else ""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    llm = LLM(**engine_args)
    if armed:
        for answer in llm.collective_rpc("editserver_handshake"):
            assert answer["ok"], answer
    pipe.send("ready")
    while True:
        job = pipe.recv()
        if job is None:
            llm.llm_engine.engine_core.shutdown()
            return
        prompts, payloads, max_tokens = job
        params = [
            SamplingParams(
                temperature=0.0,
                max_tokens=max_tokens,
                ignore_eos=True,
                detokenize=False,
                extra_args={"editserver": payload} if payload else None,
            )
            for payload in payloads
        ]
        llm.reset_prefix_cache()
        start = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        seconds = time.perf_counter() - start
        journals = [j for o in outputs if (j := getattr(o.outputs[0], "editserver", None)) is not None]
        edited = sum(journal.stats(0, 15, 1 << 30).fired for journal in journals if journal.payload.program)
        stop = len(prompts[0]) + max_tokens
        read = sum(len(journal.readings(0, 0, stop)) for journal in journals if journal.payload.reads)
        read += sum(len(trace.held) - 1 for journal in journals if (trace := journal.rules) is not None)
        pipe.send((seconds, edited, read))


class EngineProcess:
    """A vanilla or an armed engine; :meth:`run` returns (seconds, tokens edited at layer 15, tokens read or judged by rules)."""

    def __init__(self, armed: bool, **engine_args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, armed, engine_args))
        self._process.start()
        child.close()

    def wait_ready(self) -> None:
        """Block until the engine answers; raises ``EOFError`` when it died instead."""
        assert self._pipe.recv() == "ready"

    def run(
        self, prompts: Sequence[list[int]], payloads: Sequence[bytes | None], max_tokens: int
    ) -> tuple[float, int, int]:
        """Generate ``max_tokens`` tokens for every prompt, all at once, from an empty prefix cache."""
        self._pipe.send((list(prompts), list(payloads), max_tokens))
        result: tuple[float, int, int] = self._pipe.recv()
        return result

    def close(self) -> None:
        """Stop the engine."""
        self._pipe.send(None)
        self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.terminate()
