"""vLLM on a tiny random model in a process of its own: ``python -m tests.engine.tiny`` reads a job, writes what happened.

For what a session's one engine cannot show: starts without the plugin, with other armed layers, sharing a compile cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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
    ``unarm`` takes the splice out again after the first handshake. An engine in this process (``own_core`` False) does not
    survive a request that it refuses: ask for that last.
    """

    model: str
    armed: Sequence[int] | None
    requests: Sequence[tuple[Sequence[int], str | None]]
    eager: bool = False
    unarm: Sequence[int] = ()
    own_core: bool = False
    max_tokens: int = 4


@dataclass
class Result:
    """What the process saw. ``answers[i]`` is ``{"tokens", "top": [{token: logprob}], "reason"}`` or ``{"error"}``."""

    answers: list[dict[str, Any]] = field(default_factory=list)
    handshakes: list[dict[str, Any]] = field(default_factory=list)
    fired: list[dict[str, int]] = field(default_factory=list)
    editserver_modules: list[str] = field(default_factory=list)
    op_registered: bool = False
    log: str = ""

    def top(self, i: int) -> list[dict[int, float]]:
        """Log-probabilities of the most likely tokens, per step."""
        return [{int(token): value for token, value in step.items()} for step in self.answers[i]["top"]]


def run(job: Job, out: Path, environment: Mapping[str, str]) -> Result:
    """Start, ask, stop; raises with the end of the log when the process fails."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    env = clean | {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(job.own_core)),
        "VLLM_LOGGING_LEVEL": "INFO",
        "PYTHONPATH": str(REPOSITORY),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.tiny", str(out)],
        input=json.dumps(asdict(job)),
        capture_output=True,
        text=True,
        env=env | dict(environment),
        cwd=out.parent,
        timeout=400,
        check=False,
    )
    log = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"the server process ended with {done.returncode}:\n{log[-4000:]}")
    return Result(**(json.loads(out.read_text()) | {"log": log}))


def _main(out: Path) -> None:
    from vllm import LLM, SamplingParams

    job = Job(**json.load(sys.stdin))
    additional: dict[str, Any] = {}
    if job.armed is not None:
        from editserver.engine.config import EngineConfig

        additional = {"editserver": EngineConfig(tuple(job.armed), bank_rows=64).as_dict()}
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
    if job.unarm:
        model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model
        for index in job.unarm:
            layer = model.model.layers[index]
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
