"""vLLM in a process of its own, started as a test says and asked what it says: ``python -m tests.engine.engine_process``.

For starts that a session's one engine cannot be: several workers, adapters, quantised weights, several workers on the V2 runner.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":  # workers, too, import this module before they import vLLM
    from tests.engine import v2_machine

REPOSITORY = Path(__file__).parents[2]
BLOCK = 32
PREEMPTIONS = "preemptions"
"""The step that says how often a request was preempted so far."""


@dataclass(frozen=True)
class Asked:
    """One request: a compiled payload's bytes, and the folder of a LoRA adapter.

    ``leaves_after``: its client leaves when it has so many tokens.
    """

    prompt: Sequence[int]
    payload: bytes | None = None
    max_tokens: int = 4
    salt: str | None = None
    adapter: str | None = None
    leaves_after: int | None = None


@dataclass
class Answered:
    """One answer; ``top`` are the log-probabilities of the five likeliest tokens, per step."""

    tokens: list[int]
    top: list[dict[int, float]]
    cached: int
    journal: Any
    """The request's ``Journal``, or None."""
    error: tuple[str, str] | None = None
    """Code and message of what ended the request."""

    def differs(self, other: Answered) -> float:
        """Largest difference of a log-probability at the first step."""
        mine, theirs = self.top[0], other.top[0]
        return max((abs(mine[t] - theirs[t]) for t in mine.keys() & theirs.keys()), default=float("inf"))


@dataclass(frozen=True)
class Start:
    """One engine and what happens to it.

    ``steps`` are lists of requests (one batch; the answers are their result), :data:`PREEMPTIONS`, and names of methods of
    every worker (each worker's reply); or what was raised, as text. ``additional`` is editserver's configuration as a dict.
    """

    model: str
    additional: dict[str, Any]
    steps: Sequence[Sequence[Asked] | str]
    engine: Mapping[str, Any] = field(default_factory=dict)


def run(starts: Sequence[Start], folder: Path, timeout: float = 1500, v2: bool = False) -> list[list[Any]]:
    """Results of the steps of each start, one start after the other; raises with the end of the log where one fails.

    ``v2``: on the V2 model runner, whose kernels Triton's interpreter runs (begin with the step "running", or it takes long).
    """
    clean = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    environment = clean | {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    if v2:
        environment |= {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
    given, out, log = folder / "starts.pickle", folder / "results.pickle", folder / "log.txt"
    given.write_bytes(pickle.dumps(list(starts)))
    command = [sys.executable, "-m", "tests.engine.engine_process", str(given), str(out)]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=folder, start_new_session=True
        )
    try:
        code = process.wait(timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # workers that outlived it, too
        process.wait()
    if code:
        raise RuntimeError(f"the process ended with {code}:\n{log.read_text()[-6000:]}")
    found: list[list[Any]] = pickle.loads(out.read_bytes())
    return found


class Extension:
    """Methods that every worker gets (``worker_extension_cls``)."""

    def running(self) -> list[str]:
        """The model runner's module, and the engine's class. From now on the V2 runner samples fast."""
        from editserver.engine import op

        if self.vllm_config.use_v2_model_runner:
            v2_machine.sample_in_one_block()
        return [type(self.model_runner).__module__, type(op.current()).__name__]

    def record(self) -> None:
        """Keep what this worker records, from now on."""
        from editserver.engine import op
        from editserver.engine.wire import decode_step, encode_records

        engine: Any = type(op.current())
        finish = engine.finish

        def finishing(self: Any) -> Any:
            made = finish(self)
            if made is None:
                return None
            records = made()  # of ranks that answer nobody, too
            _RECORDED.extend(encode_records([record]) for record in decode_step(records).values())
            return lambda: records

        engine.finish = finishing

    def records_digest(self) -> str:
        """Of everything that this worker recorded so far: fired bits, doses, readings, gates, rules. Starts anew."""
        found = hashlib.sha256(b"".join(_RECORDED)).hexdigest()
        _RECORDED.clear()
        return found

    def note_drafts(self) -> None:
        """Count the tokens that are drafted for requests, from now on."""
        execute = self.model_runner.execute_model

        def executing(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            _DRAFTED.append(sum(map(len, scheduled.scheduled_spec_decode_tokens.values())))
            return execute(scheduled, *args, **kwargs)

        self.model_runner.execute_model = executing

    def drafted(self) -> list[int]:
        """Steps with drafts, and their tokens."""
        return [sum(map(bool, _DRAFTED)), sum(_DRAFTED)]

    def prove(self) -> bool:
        """What the worker did at its start, once more."""
        from editserver.engine import op
        from editserver.engine.compat import parallel

        return parallel.prove(self.model_runner, op.current())

    def agrees(self) -> bool:
        """Whether it takes rank 0's stream."""
        from editserver.engine import op

        return op.current().agree is not None

    def round_off(self) -> int:
        """From now on, this rank's layers return a little more than rank 0's: as after another order of summation."""
        return self._distort(lambda rank: 1 + 3e-4 * rank)

    def share(self) -> int:
        """From now on, every rank's layers return its share alone: as if the last all-reduce were another layer's."""
        return self._distort(lambda rank: 0.3 + 0.4 * rank)

    def alone(self) -> None:
        """Decide alone, come what may."""
        from editserver.engine import op

        op.current().agree = None

    def break_down(self) -> None:
        """From now on, this worker fails when it has records to make, unless it is the one that answers."""
        from editserver.engine import op

        def finish() -> Any:
            raise RuntimeError("broken")

        if self.rank:
            op.current().finish = finish

    def watch(self) -> None:
        """Keep the stream before and behind every armed layer's op, which is Python's from now on."""
        from editserver.engine import native, op

        engine = op.current()
        engine.jobs = None
        native.serve(None)
        run = engine.run

        def watched(layer: int, hidden: Any, residual: Any) -> None:
            before = _stream(hidden, residual)
            run(layer, hidden, residual)
            _WATCHED.setdefault(layer, []).append((before, _stream(hidden, residual)))

        engine.run = watched

    def watched(self) -> dict[int, Any]:
        """Layer → the stream before and behind it, of all tokens that were computed since the last call, dummies' too."""
        import torch

        found = {
            layer: tuple(torch.cat(parts) for parts in zip(*seen, strict=True)) for layer, seen in _WATCHED.items()
        }
        _WATCHED.clear()
        return found

    def _distort(self, factor: Any) -> int:
        rank = self.rank % self.vllm_config.parallel_config.tensor_parallel_size
        for handle in _DISTORTIONS:
            handle.remove()
        by = factor(rank)
        layers = self.model_runner.get_model().model.layers
        _DISTORTIONS[:] = [layer.mlp.register_forward_hook(lambda _m, _i, out: out * by) for layer in layers]
        return rank


_DISTORTIONS: list[Any] = []
_RECORDED: list[bytes] = []
_DRAFTED: list[int] = []
_WATCHED: dict[int, list[Any]] = {}


def _stream(hidden: Any, residual: Any) -> Any:
    return hidden.clone() if residual is None else (hidden.float() + residual.float()).to(hidden.dtype)


def _serve(start: Start) -> list[Any]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    defaults: dict[str, Any] = {
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "block_size": BLOCK,
        "max_model_len": 256,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 256,
        "gpu_memory_utilization": 0.2,
        "kv_cache_memory_bytes": 1 << 26,
        "worker_extension_cls": "tests.engine.engine_process.Extension",
    }
    llm = LLM(start.model, additional_config={"editserver": start.additional}, **(defaults | dict(start.engine)))
    adapters: dict[str, int] = {}

    def adapter(folder: str | None) -> Any:
        if folder is None:
            return None
        number = adapters.setdefault(folder, len(adapters) + 1)
        return LoRARequest(Path(folder).name, number, folder)

    results: list[Any] = []

    def answers(step: Sequence[Asked]) -> list[Answered]:
        prompts = [
            {"prompt_token_ids": list(one.prompt)} | ({"cache_salt": one.salt} if one.salt else {}) for one in step
        ]
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=one.max_tokens,
                ignore_eos=True,
                detokenize=False,
                logprobs=5,
                extra_args={"editserver": one.payload} if one.payload else None,
            )
            for one in step
        ]
        if any(one.leaves_after for one in step):
            assert not any(one.adapter for one in step), "not made for adapters"
            return [answer_from(output) for output in _until_they_leave(llm.llm_engine, step, prompts, params)]
        lora = [adapter(one.adapter) for one in step] if any(one.adapter for one in step) else None
        outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=lora)
        return [answer_from(output) for output in outputs]

    preempted = _count_preemptions(llm.llm_engine.engine_core.engine_core.scheduler)
    for step in start.steps:
        try:
            if step == PREEMPTIONS:
                results.append(len(preempted))
            else:
                results.append(llm.collective_rpc(step) if isinstance(step, str) else answers(step))
        except Exception as error:
            results.append(f"{type(error).__name__}: {error}")
            llm.llm_engine.abort_request(list(llm.llm_engine.output_processor.request_states), internal=True)
    llm.llm_engine.engine_core.shutdown()
    return results


def _until_they_leave(engine: Any, step: Sequence[Asked], prompts: Sequence[Any], params: Sequence[Any]) -> list[Any]:
    """One batch; the last output of each request, of one whose client left the one it left at."""
    for name, (prompt, sampling) in enumerate(zip(prompts, params, strict=True)):
        engine.add_request(str(name), prompt, sampling)
    last: dict[str, Any] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            last[output.request_id] = output
            after = step[int(output.request_id)].leaves_after
            if after is not None and not output.finished and len(output.outputs[0].token_ids) >= after:
                engine.abort_request([output.request_id])
    return [last[str(name)] for name in range(len(step))]


def _count_preemptions(scheduler: Any) -> list[str]:
    """Ids of the requests that ``scheduler`` preempts from now on, as it does."""
    found: list[str] = []
    preempt = scheduler._preempt_request

    def preempting(request: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(request.request_id)
        return preempt(request, *args, **kwargs)

    scheduler._preempt_request = preempting
    return found


def answer_from(output: Any) -> Answered:
    choice = output.outputs[0]
    top = [{token: entry.logprob for token, entry in step.items()} for step in choice.logprobs]
    journal, error = getattr(choice, "editserver", None), None
    if journal is not None and journal.error is not None:
        error, journal.error = (journal.error.code, journal.error.message), None  # what a pickle can carry
    return Answered(list(choice.token_ids), top, output.num_cached_tokens or 0, journal, error)


def _main(given: Path, out: Path) -> None:
    starts: list[Start] = pickle.loads(given.read_bytes())
    results = []
    for start in starts:
        results.append(_serve(start))
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()
    out.write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    from tests.engine import engine_process  # the module that pickles name

    engine_process._main(*map(Path, sys.argv[1:]))
