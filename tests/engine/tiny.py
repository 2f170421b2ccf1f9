"""vLLM on a tiny random model in processes of their own: ``python -m tests.engine.tiny`` reads jobs, writes what happened.

For what a session's one engine cannot show: starts without the plugin, with other armed layers, sharing a compile cache.
Each job has its process, forked from one that has imported vLLM and nothing of ours: importing it is half of a start.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

D_MODEL, N_LAYERS, VOCAB = 128, 4, 256
REPOSITORY = Path(__file__).parents[2]


def write_model(folder: Path) -> Path:
    """A Llama with random weights, wide enough that its answers are not uniform; no tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        intermediate_size=256,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.15,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Job:
    """One start of a server and what is asked of it.

    ``armed`` None starts without editserver's configuration. ``requests`` are prompts with the hex of a payload or None.
    ``engine`` "device": edited by kernels, which :mod:`tests.engine.v2_machine` has interpreted. ``unarm`` takes the splice
    out again after the first handshake; what needs it then ends the engine: ask for that last.
    ``v2``: on the V2 model runner (:mod:`tests.engine.v2_machine`).
    ``environment``: variables of its process alone, which vLLM reads when it starts.
    """

    model: str
    armed: Sequence[int] | None
    requests: Sequence[tuple[Sequence[int], str | None]]
    eager: bool = False
    unarm: Sequence[int] = ()
    max_tokens: int = 4
    v2: bool = False
    engine: str = "auto"
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Result:
    """What the process saw. ``answers[i]`` is ``{"tokens", "top": [{token: logprob}], "reason"}`` or ``{"error"}``."""

    answers: list[dict[str, Any]] = field(default_factory=list)
    handshakes: list[dict[str, Any]] = field(default_factory=list)
    fired: list[dict[str, int]] = field(default_factory=list)
    editserver_modules: list[str] = field(default_factory=list)
    op_registered: bool = False
    runner: str = ""
    """Module of the model runner's class."""
    log: str = ""
    cached: list[str] = field(default_factory=list)
    """Files in the cache of torch.compile, after the process."""

    def top(self, i: int) -> list[dict[int, float]]:
        """Log-probabilities of the most likely tokens, per step."""
        return [{int(token): value for token, value in step.items()} for step in self.answers[i]["top"]]


def run_all(jobs: Sequence[Job], folder: Path, environment: Mapping[str, str]) -> list[Result]:
    """Start, ask, stop, one job after the other, all on the same runner; raises with the end of the log of one that fails.

    ``folder`` is made, and holds results and logs.
    """
    folder.mkdir(parents=True)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    env = clean | {
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # as vLLM sets it on a CPU, but when Inductor is imported already
        "TORCHINDUCTOR_CPP_DYNAMIC_THREADS": "1",
        "TORCHINDUCTOR_VEC_ISA_OK": "1",  # that g++ knows this CPU's instructions need not be tried out
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "INFO",
        "PYTHONPATH": str(REPOSITORY),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.tiny", str(folder)],
        input=json.dumps([asdict(job) for job in jobs]),
        capture_output=True,
        text=True,
        env=env | dict(environment),
        cwd=folder,
        timeout=400 * len(jobs),
        check=False,
    )
    if done.returncode:
        log = "".join(path.read_text(errors="replace") for path in sorted(folder.glob("*.log")))
        raise RuntimeError(f"a server process ended with {done.returncode}:\n{(done.stderr + log)[-4000:]}")
    found = []
    for number in range(len(jobs)):
        told, log = (folder / f"{number}.json").read_text(), (folder / f"{number}.log").read_text(errors="replace")
        found.append(Result(**(json.loads(told) | {"log": log})))
    return found


IMPORTED = ("vllm.entrypoints.llm", "vllm.v1.engine.core", "vllm.v1.worker.cpu_worker", "torch._inductor.compile_fx")


def _main(folder: Path) -> None:
    jobs = [Job(**job) for job in json.load(sys.stdin)]
    assert len({job.v2 for job in jobs}) == 1
    for name in ("tests.engine.v2_machine", *IMPORTED) if jobs[0].v2 else IMPORTED:
        importlib.import_module(name)
    from vllm import ModelRegistry
    from vllm.model_executor.models.llama import LlamaForCausalLM

    # Else vLLM would start a process that imports vLLM and looks at the class.
    ModelRegistry.register_model("LlamaForCausalLM", LlamaForCausalLM)
    cache = Path(os.environ.get("VLLM_CACHE_ROOT", folder)) / "torch_compile_cache"
    for number, job in enumerate(jobs):
        out = folder / f"{number}.json"
        child = os.fork()
        if not child:
            _become(job, out)
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(f"job {number} ended with {os.waitstatus_to_exitcode(status)}")
        told = json.loads(out.read_text())
        told["cached"] = sorted(str(path) for path in cache.rglob("*") if path.is_file())
        out.write_text(json.dumps(told))


def _become(job: Job, out: Path) -> NoReturn:
    """What the child does: never returns."""
    log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    code = 1
    try:
        os.environ.update(job.environment)
        _serve(job, out)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve(job: Job, out: Path) -> None:
    from vllm import LLM, SamplingParams

    additional: dict[str, Any] = {}
    if job.armed is not None:
        from editserver.engine.config import EngineConfig

        additional = {"editserver": EngineConfig(tuple(job.armed), bank_rows=64, engine=job.engine).as_dict()}
    llm = LLM(
        job.model,
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=job.eager,
        max_model_len=128,
        max_num_seqs=4,
        max_num_batched_tokens=128,
        gpu_memory_utilization=0.2,
        additional_config=additional,
    )
    result = Result()
    if job.armed is not None:
        result.handshakes += llm.collective_rpc("editserver_handshake")
    engine = llm.llm_engine
    runner = engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    result.runner = type(runner).__module__
    if job.unarm:
        for index in job.unarm:
            layer = runner.model.model.layers[index]
            layer.__class__ = type(layer).__bases__[0]
        result.handshakes += llm.collective_rpc("editserver_handshake")
    for prompt, payload in job.requests:
        params = SamplingParams(
            temperature=0,
            max_tokens=job.max_tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=5,
            extra_args={"editserver": bytes.fromhex(payload)} if payload else None,
        )
        try:
            completion = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0].outputs[0]
        except Exception as error:
            result.answers.append({"error": f"{type(error).__name__}: {error}"})
            result.fired.append({})
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
            continue
        top = [{str(token): entry.logprob for token, entry in step.items()} for step in completion.logprobs]
        result.answers.append({"tokens": list(completion.token_ids), "top": top, "reason": completion.finish_reason})
        journal = getattr(completion, "editserver", None)
        layers = range(N_LAYERS) if journal is not None else ()
        result.fired.append({str(layer): journal.stats(0, layer, 10**6).fired for layer in layers})
    result.editserver_modules = sorted(m for m in sys.modules if m.startswith("editserver"))
    result.op_registered = hasattr(torch.ops.editserver, "edit")
    out.write_text(json.dumps(asdict(result)))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
