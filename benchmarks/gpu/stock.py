"""Stock vLLM in a process of its own, with the plugin or without: told over a pipe what to generate, it answers with times.

Vanilla and armed engines must not share a process: loading the plugin wraps classes for good.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PLUGINS = "vllm.general_plugins"

ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # as `vllm serve` does
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # nothing is drawn; asked for on CUDA, it must be installed, and is compiled at start
    "VLLM_NO_USAGE_STATS": "1",
}
"""Of both engines, where nothing else is set."""


@dataclass(frozen=True)
class Ask:
    """One request: its tokens, how many to generate, and what it carries."""

    prompt: Sequence[int]
    max_tokens: int
    payload: bytes | None = None


@dataclass(frozen=True)
class Seen:
    """One run of requests that were sent at once.

    Attributes:
        seconds: from the first request to the last token.
        ttft, tpot: of each request, in seconds: to its first token, and between two later ones.
        cached: prompt tokens that came from the prefix cache, of all requests.
        edited, read: tokens at which an edit fired, summed over layers and interventions; tokens that were inspected, or judged
            by rules.
    """

    seconds: float
    ttft: list[float]
    tpot: list[float]
    cached: int
    edited: int
    read: int


@dataclass(frozen=True)
class Start:
    """What the engine is. ``seconds`` it took to start, ``kv_tokens`` that its cache holds, ``chosen``: what vLLM decided."""

    device: str
    vllm: str
    torch: str
    seconds: float
    kv_tokens: int
    runner: str
    chosen: dict[str, str]


class Broken(RuntimeError):
    """The engine did not start, or refused a run, or is gone; the message ends with its own."""


def announce(folder: Path) -> None:
    """Make vLLM see this repository's plugin where it is not installed: its entry point, in a folder on every process's path."""
    if any(one.name == "editserver" for one in importlib.metadata.entry_points(group=PLUGINS)):
        return
    from editserver import __version__

    told = folder / f"editserver-{__version__}.dist-info"
    told.mkdir(parents=True)
    (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: editserver\nVersion: {__version__}\n")
    (told / "entry_points.txt").write_text(f"[{PLUGINS}]\neditserver = editserver.engine.plugin:register\n")
    repository = str(Path(__file__).resolve().parents[2])
    own = [str(folder), repository]
    sys.path += own
    os.environ["PYTHONPATH"] = os.pathsep.join([*own, *filter(None, [os.environ.get("PYTHONPATH")])])


async def _engine(armed: bool, engine_args: dict[str, Any]) -> tuple[Any, Start]:
    began = time.perf_counter()
    import torch
    import vllm
    from vllm import AsyncEngineArgs, AsyncLLMEngine

    engine = AsyncLLMEngine.from_engine_args(AsyncEngineArgs(**engine_args))
    config = engine.vllm_config
    if armed:
        for answer in await engine.collective_rpc("editserver_handshake"):
            if not answer["ok"]:
                raise RuntimeError(str(answer))
    on_gpu = config.device_config.device_type == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else f"{config.device_config.device_type}, {os.cpu_count()} cores"
    cache, scheduler = config.cache_config, config.scheduler_config
    chosen = {
        "tokens of a batch": scheduler.max_num_batched_tokens,
        "scheduled ahead": scheduler.async_scheduling,
        "compiled": config.compilation_config.mode,
        "graphs": config.compilation_config.cudagraph_mode,
    }
    return engine, Start(
        device,
        vllm.__version__,
        torch.__version__,
        time.perf_counter() - began,
        int(cache.num_gpu_blocks or 0) * int(cache.block_size),
        "V2" if config.use_v2_model_runner else "V1",
        {name: str(getattr(value, "name", value)) for name, value in chosen.items()},
    )


async def _run(engine: Any, asks: Sequence[Ask], warm: bool, serial: int) -> Seen:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    if not warm:
        await _forget(engine)
    journals: list[Any] = []
    cached = 0

    async def one(number: int, ask: Ask) -> tuple[float, float]:
        nonlocal cached
        params = SamplingParams(
            temperature=0.0,
            max_tokens=ask.max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={"editserver": ask.payload} if ask.payload else None,
        )
        sent, first, n = time.perf_counter(), 0.0, 0
        output = None
        async for output in engine.generate({"prompt_token_ids": list(ask.prompt)}, params, f"{serial}-{number}"):
            first = first or time.perf_counter()
            n += len(output.outputs[0].token_ids)
        last = time.perf_counter()
        assert output is not None
        assert n == ask.max_tokens, f"{n} tokens of {ask.max_tokens}"
        cached += output.num_cached_tokens or 0
        journals.append((getattr(output.outputs[0], "editserver", None), ask))
        return first - sent, (last - first) / max(1, n - 1)

    began = time.perf_counter()
    # All of them end, whatever becomes of one: none may be left for the next run.
    outcomes = await asyncio.gather(*(one(number, ask) for number, ask in enumerate(asks)), return_exceptions=True)
    seconds = time.perf_counter() - began
    times: list[tuple[float, float]] = []
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
        times.append(outcome)
    edited, read = _told([(journal, ask) for journal, ask in journals if journal is not None])
    return Seen(seconds, [t for t, _ in times], [t for _, t in times], cached, edited, read)


async def _forget(engine: Any) -> None:
    """Empty the prefix cache, which vLLM does once no request holds a block any more."""
    for _ in range(100):
        if await engine.reset_prefix_cache():
            return
        await asyncio.sleep(0.02)
    raise RuntimeError("vLLM does not empty its prefix cache: blocks are held, and nobody runs")


def _told(journals: Sequence[tuple[Any, Ask]]) -> tuple[int, int]:
    """Tokens edited, and read, as the engine's records say."""
    edited = read = 0
    for journal, ask in journals:
        if journal.error is not None:
            raise journal.error
        fed, program = len(ask.prompt) + ask.max_tokens - 1, journal.payload.program
        for layer in program.layers if program else ():
            edited += journal.stats(0, layer.layer, fed).fired
        read += sum(len(journal.readings(i, 0, fed)) for i in range(len(journal.payload.reads)))
        read += len(journal.rules.held) - 1 if journal.rules is not None else 0
    return edited, read


def _serve(pipe: Any, armed: bool, engine_args: dict[str, Any]) -> None:
    from editserver.engine.compat.version import below_server

    if below_server():  # edited with this runner alone, and compared with the same one
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    os.environ["VLLM_PLUGINS"] = "editserver" if armed else ""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)

    async def main() -> None:
        engine, start = await _engine(armed, engine_args)
        pipe.send(start)
        serial = 0
        while (job := await asyncio.to_thread(pipe.recv)) is not None:
            serial += 1
            try:
                answer: Any = await _run(engine, *job, serial)
            except Exception:  # of this run: the engine may do the next one
                answer = traceback.format_exc()
            pipe.send(answer)
        engine.shutdown()
        del engine  # while there is still something that its finaliser can call

    try:
        asyncio.run(main())
    except BaseException:
        pipe.send(traceback.format_exc())
        raise


class Engine:
    """Stock vLLM with the plugin (``armed``) or without, started on ``engine_args``; ``start`` says what it is."""

    def __init__(self, armed: bool, **engine_args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, armed, engine_args))
        self._process.start()
        child.close()
        try:
            self.start: Start = self._answer()
        except Broken:
            self.close()
            raise

    def run(self, asks: Sequence[Ask], *, warm: bool = False) -> Seen:
        """Send all requests at once; from an empty prefix cache unless ``warm``.

        Raises:
            Broken: a request was refused or failed, or the engine is gone.
        """
        try:
            self._pipe.send((list(asks), warm))
        except OSError as error:
            raise Broken(f"the engine's process has ended: {error}") from None
        seen: Seen = self._answer()
        return seen

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError):
            raise Broken("the engine's process ended without a word") from None
        if isinstance(answer, str):
            raise Broken(answer)
        return answer

    def close(self) -> None:
        """Stop the engine."""
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(timeout=60)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(timeout=30)
