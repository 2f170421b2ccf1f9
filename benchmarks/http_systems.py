"""Servers over HTTP, and vLLM's own load generator (what ``vllm bench serve`` runs) in front of them."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any

from benchmarks.engine_process import ROOT, surroundings
from benchmarks.payloads import interventions
from benchmarks.processes import Family
from benchmarks.scenarios import EDITSERVER, Load, Scenario
from benchmarks.systems import Bench, prompts

NAME = "model"


class HttpSystem:
    """``editserver serve`` or vLLM's OpenAI server, on a port of this machine."""

    def __init__(self, name: str, bench: Bench) -> None:
        self.name = name
        self._port = _free_port()
        flags = [
            "--host",
            "127.0.0.1",
            "--port",
            str(self._port),
            "--served-model-name",
            NAME,
            "--max-model-len",
            "1024",
            "--dtype",
            bench.dtype,
        ]
        flags += ["--gpu-memory-utilization", "0.2", "--max-num-seqs", "256", "--disable-uvicorn-access-log"]
        flags += ["--enforce-eager"] if bench.eager else []
        if name == EDITSERVER:
            saes = [part for one in bench.sources.values() for part in ("--sae", f"{one.id}={one.path}")]
            saes += ["--full-encode", "none"]  # no request asks for it
            command = ["-m", "editserver.cli.main", "serve", str(bench.model), *saes, *flags]
        else:
            command = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(bench.model), *flags]
        self._log = bench.logs / f"http-{name}.log"
        environment = surroundings("editserver" if name == EDITSERVER else "") | {"PYTHONWARNINGS": "ignore"}
        with self._log.open("wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, *command], env=environment, cwd=ROOT, stdout=out, stderr=out
            )
        self.family = Family(self._process.pid)
        self._checked: set[str] = set()

    def wait_ready(self, timeout: float = 1200.0) -> dict[str, str]:
        """Block until it answers.

        Raises:
            RuntimeError: it died or does not answer; the message has the end of its log.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health", timeout=5):
                    return {}
            except (urllib.error.URLError, OSError):
                died = self._process.poll() is not None
                if died or time.monotonic() > deadline:
                    tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-25:])
                    says = "died" if died else "does not answer"
                    raise RuntimeError(f"{self.name} {says}\nthe end of {self._log}:\n{tail}") from None
                time.sleep(0.3)

    def run(self, scenario: Scenario, load: Load, salt: int) -> dict[str, Any]:
        """One run: seconds, and the median time to first token in seconds. The prompts are others for every ``salt``.

        Raises:
            RuntimeError: a request failed.
        """
        # Every system gets the same prompts, which no system has seen: nothing is answered from a prefix cache.
        texts = prompts(scenario, salt)
        bodies = [interventions(load, request) if self.name == EDITSERVER else {} for request in range(len(texts))]
        if load.id not in self._checked and bodies[0]:
            self._check_receipt(scenario, texts[0], bodies[0])
            self._checked.add(load.id)
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            result = asyncio.run(self._generate(scenario, texts, bodies))
        wrong = [error for error in result["errors"] if error]
        generated = sum(result["output_lens"])
        if wrong or generated != len(texts) * scenario.max_tokens:
            raise RuntimeError(f"{self.name}, {scenario.id}/{load.id}: {generated} tokens; {wrong[:1]}")
        return {"seconds": result["duration"], "ttft": statistics.median(result["ttfts"])}

    def _check_receipt(self, scenario: Scenario, text: list[int], body: dict[str, Any]) -> None:
        """One request outside the measurement, whose receipt says that every token but the first was edited."""
        asked = {"model": NAME, "prompt": text, "max_tokens": scenario.max_tokens, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}/v1/completions",
            json.dumps(asked | body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            receipt = json.load(answer)["interventions"]["receipt"]
        due = len(text) + scenario.max_tokens - 2
        if [entry["fired"] for entry in receipt] != [due] * len(body["interventions"]):
            raise RuntimeError(
                f"{scenario.id}: {due} tokens were to be edited by each intervention; the receipt says {receipt}"
            )

    async def _generate(
        self, scenario: Scenario, texts: list[list[int]], bodies: list[dict[str, Any]]
    ) -> dict[str, Any]:
        from vllm.benchmarks.datasets import SampleRequest
        from vllm.benchmarks.serve import TaskType, benchmark

        requests = [
            SampleRequest(text, len(text), scenario.max_tokens, request_overrides=body)
            for text, body in zip(texts, bodies, strict=True)
        ]
        base = f"http://127.0.0.1:{self._port}"
        result: dict[str, Any] = await benchmark(
            task_type=TaskType.GENERATION,
            endpoint_type="openai",
            api_url=f"{base}/v1/completions",
            base_url=base,
            model_id=NAME,
            model_name=NAME,
            tokenizer=None,
            input_requests=requests,
            logprobs=None,
            request_rate=float("inf"),
            burstiness=1.0,
            disable_tqdm=True,
            num_warmups=0,
            profile=False,
            selected_percentile_metrics=["ttft"],
            selected_percentiles=[99.0],
            ignore_eos=True,
            goodput_config_dict={},
            max_concurrency=scenario.concurrency or None,
            lora_modules=None,
            extra_headers=None,
            extra_body={"temperature": 0.0},
            ready_check_timeout_sec=0,
        )
        return result

    def close(self) -> None:
        """Stop it and what it started."""
        self.family.release()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        self.family.end()
        self._process.wait()


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
