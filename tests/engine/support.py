"""A real vLLM engine for tests: requests in JSON as a client writes them, answers with everything a promise is about."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from editserver.catalogue import OpenedSAE, ServedCatalogue, approximated, build_catalogue
from editserver.engine.config import EngineConfig
from editserver.engine.journal import Journal
from editserver.settings import DoseBound, Settings
from interventions.compile import Compiled, compile_request
from interventions.spec import parse_inspect, parse_interventions
from sae_weights import load_sae
from sae_weights.formats import Origin

BLOCK = 32
"""Tokens per KV block in the test engines (vLLM's default on CPU is 128)."""


@dataclass(frozen=True)
class Ask:
    """One request."""

    prompt: Sequence[int]
    interventions: Sequence[Mapping[str, Any]] = ()
    inspect: Any = None
    max_tokens: int = 8
    n: int = 1
    temperature: float = 0.0
    seed: int | None = None
    salt: str | None = None


@dataclass(frozen=True)
class Answer:
    """One choice of one request, with the log-probabilities of the sampled tokens and of the top 5 at each step."""

    token_ids: list[int]
    logprobs: list[float]
    top: list[dict[int, float]]
    cached: int
    journal: Journal | None
    compiled: Compiled

    def differs(self, other: Answer) -> float:
        """max |Δ log p| over the shared prefix of sampled tokens and the step at which they part."""
        worst = 0.0
        for mine, theirs, a, b in zip(self.token_ids, other.token_ids, self.top, other.top, strict=False):
            for token in a.keys() & b.keys():
                worst = max(worst, abs(a[token] - b[token]))
            if a.keys() != b.keys():
                worst = max(
                    worst,
                    *(abs(a.get(t, -20.0) - b.get(t, -20.0)) for t in a.keys() ^ b.keys() if t in (mine, theirs)),
                    0.0,
                )
            if mine != theirs:
                break
        return worst

    def same_bits(self, other: Answer) -> bool:
        """Token ids and every reported log-probability equal, bit for bit."""
        return self.token_ids == other.token_ids and self.top == other.top


@dataclass
class Engine:
    """vLLM with the engine core in this process, so that a test can count, step and reach in."""

    llm: Any
    catalogue: ServedCatalogue
    _serial: int = field(default=0)
    processes: bool = False
    """Whether the core runs in its own process, as in a server (then a test cannot reach in)."""

    @classmethod
    def start(
        cls,
        model: Path,
        saes: Mapping[str, Path | Origin],
        armed: Sequence[int],
        *,
        max_dose: DoseBound | None = None,
        bank_rows: int = 2048,
        approximate: Sequence[str] = (),
        full_encode: Sequence[str] | None = None,
        processes: bool = False,
        **engine_args: Any,
    ) -> Engine:
        """Start an armed engine on ``model`` with the SAEs ``{id: folder}``, those of ``approximate`` as stand-ins, those of
        ``full_encode`` (None: all) with the full-encode path.

        One process holds one armed model, so a second engine next to a first one needs ``processes``.
        """
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(processes))
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # pinned threads starve where cores are shared
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM, envs

        envs.disable_envs_cache()  # an engine that started earlier froze the variables above
        opened = []
        for name, place in saes.items():
            sae = place.open() if isinstance(place, Origin) else load_sae(place)
            assert sae.hook.edit_layer is not None
            opened.append(OpenedSAE(name, sae.hook.edit_layer, sae))
        sources = tuple(one.source() for one in approximated(opened, approximate))
        config = EngineConfig(tuple(armed), sources, tuple(saes if full_encode is None else full_encode), bank_rows)
        defaults: dict[str, Any] = {
            "dtype": "float32",
            "enforce_eager": True,
            "block_size": BLOCK,
            "gpu_memory_utilization": 0.3,
            "max_model_len": 1024,
            "max_num_seqs": 32,
            "seed": 0,
        }
        llm = LLM(str(model), **(defaults | engine_args), additional_config={"editserver": config.as_dict()})
        hf = llm.llm_engine.model_config.hf_text_config
        catalogue = build_catalogue(
            config,
            Settings(dose=max_dose or DoseBound()),
            d_model=hf.hidden_size,
            n_layers=hf.num_hidden_layers,
            vocab_size=hf.vocab_size,
            tokenizer=None if engine_args.get("skip_tokenizer_init") else llm.get_tokenizer(),
        )
        return cls(llm, catalogue, processes=processes)

    @property
    def core(self) -> Any:
        """vLLM's ``EngineCore``."""
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def scheduler(self) -> Any:
        """vLLM's scheduler."""
        return self.core.scheduler

    @property
    def runner(self) -> Any:
        """The worker's model runner."""
        return self.core.model_executor.driver_worker.worker.model_runner

    def compile(self, ask: Ask) -> Compiled:
        """The request's compiled form, as the API would make it."""
        parsed = parse_interventions(list(ask.interventions)), parse_inspect(ask.inspect)
        return compile_request(*parsed, self.catalogue).resolved(ask.prompt)

    def params(self, ask: Ask, compiled: Compiled) -> Any:
        """vLLM's sampling parameters for the request."""
        from vllm import SamplingParams

        payload = compiled.payload()
        carries = payload.program is not None or payload.reads
        return SamplingParams(
            temperature=ask.temperature,
            seed=ask.seed,
            max_tokens=ask.max_tokens,
            n=ask.n,
            ignore_eos=True,
            logprobs=5,
            skip_reading_prefix_cache=compiled.inspects_prompt or None,
            extra_args={"editserver": payload.to_bytes()} if carries else None,
        )

    def prompt(self, ask: Ask) -> dict[str, Any]:
        """vLLM's prompt for the request."""
        prompt: dict[str, Any] = {"prompt_token_ids": list(ask.prompt)}
        return prompt | ({"cache_salt": ask.salt} if ask.salt else {})

    def reset_cache(self) -> None:
        """Forget all cached prefixes."""
        assert self.llm.reset_prefix_cache()

    def run_all(self, asks: Sequence[Ask], *, cold: bool = False) -> list[list[Answer]]:
        """All requests in one batch (added before the first step); choices per request."""
        if cold:
            self.reset_cache()
        compiled = [self.compile(ask) for ask in asks]
        params = [self.params(a, c) for a, c in zip(asks, compiled, strict=True)]
        with self._held():
            self.llm.enqueue([self.prompt(a) for a in asks], params, use_tqdm=False)
        outputs = self.llm.wait_for_completion(use_tqdm=False)
        return [
            [answer_of(choice, output.num_cached_tokens, c) for choice in output.outputs]
            for output, c in zip(outputs, compiled, strict=True)
        ]

    def run(self, asks: Sequence[Ask], *, cold: bool = False) -> list[Answer]:
        """As :meth:`run_all`, the first choice of each."""
        return [choices[0] for choices in self.run_all(asks, cold=cold)]

    @contextmanager
    def _held(self) -> Iterator[None]:
        """No step is made of the requests that arrive inside before all of them are there.

        A core in this process waits by itself; one in a process of its own would begin with whoever is first, and bits
        change with the shape of a batch.
        """
        if self.processes:
            self.llm.llm_engine.engine_core.call_utility("pause_scheduler", "keep", False)
        yield
        if self.processes:
            self.llm.llm_engine.engine_core.call_utility("resume_scheduler")

    def stop(self) -> None:
        """Release the engine's memory."""
        import gc

        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        self.llm = None
        gc.collect()
        if not self.processes:
            cleanup_dist_env_and_memory()


def answer_of(choice: Any, cached: int | None, compiled: Compiled) -> Answer:
    """One completion output as an :class:`Answer`."""
    top = [{token: entry.logprob for token, entry in step.items()} for step in choice.logprobs]
    sampled = [step[token] for step, token in zip(top, choice.token_ids, strict=True)]
    return Answer(list(choice.token_ids), sampled, top, cached or 0, choice.editserver, compiled)


def prompt_of(seed: int, length: int, vocab: int = 40_000) -> list[int]:
    """A deterministic prompt of ordinary token ids; different seeds differ from the second token on."""
    generator = torch.Generator().manual_seed(seed)
    return [1, *torch.randint(200, vocab, (length - 1,), generator=generator).tolist()]
