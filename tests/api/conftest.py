"""One real server for all HTTP tests: ``editserver serve demo`` in its own process, as a user starts it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from sae_weights.formats import load_sae, save_saelens
from sae_weights.hook import Hook
from sae_weights.knowledge import FILE, Context, Feature, KnowledgeStore
from sae_weights.sae import SAE

MODEL = "smollm2-135m-instruct"
D_MODEL = 576
N_FEATURES = 128
RELU, TOPK = "probe/l15", "probe/topk-l20"
ARMED = [10, 15, 20]
START_S = 600


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    log: Path

    def client(self, **kwargs: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, **kwargs)


def make_probes(folder: Path) -> dict[str, Path]:
    """Two small dictionaries with random unit decoder rows: a ReLU one at layer 15, a TopK one at layer 20."""
    made = {}
    for name, architecture, layer, k in ((RELU, "relu", 15, None), (TOPK, "topk", 20, 8)):
        rows = torch.randn(N_FEATURES, D_MODEL, generator=torch.Generator().manual_seed(layer))
        rows /= rows.norm(dim=1, keepdim=True)
        sae = SAE.from_tensors(
            architecture=architecture,
            hook=Hook("resid_post", layer),
            W_enc=rows,
            W_dec=rows,
            b_dec=torch.zeros(D_MODEL),
            gate={"b_enc": torch.zeros(N_FEATURES)},
            k=k,
        )
        made[name] = save_saelens(sae, folder / name.replace("/", "-"))
    know_probe(made[RELU])
    return made


def know_probe(folder: Path) -> None:
    """Knowledge of the ReLU probe's features 3 (everything), 4 (statistics alone) and 5 (a label alone)."""
    sae = load_sae(folder)
    context = Context((" of", " the", " probe"), (0.0, 1.5, 7.0), 2, "brown")
    known = Feature(
        3,
        "a probe direction",
        "hand",
        density=0.5,
        max_activation=7.0,
        mean_activation=2.5,
        quantiles={"0.5": 2.0, "0.9": 5.0},
        contexts=(context,),
        promoted=((" satellite", 0.5),),
        suppressed=((" the", -0.25),),
        neighbours=((5, 0.75), (4, 0.5)),
        words=("probe", "sonde"),
        topics=("spacecraft",),
    )
    path = folder / FILE
    with KnowledgeStore.create(path, sae_digest=sae.digest, n_features=sae.n_features, meta={"tokens": 1000}) as writer:
        writer.add([known, Feature(4, density=0.25), Feature(5, 'C++\'s "operator*" AND others', "automatic")])


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def start_server(folder: Path, *flags: str, model: str = "demo", env: dict[str, str] | None = None) -> Iterator[Server]:
    """``editserver serve demo`` with ``flags``; its log goes to ``folder``. Stopped at the end."""
    port = free_port()
    log = folder / f"server-{port}.log"
    command = [sys.executable, "-m", "editserver.cli.main", "serve", model, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, *flags], stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})}
        )
    server = Server(f"http://127.0.0.1:{port}", log)
    try:
        deadline = time.monotonic() + START_S
        while not _healthy(server):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server did not start; its log ends with\n{log.read_text()[-4000:]}")
            time.sleep(0.5)
        yield server
        assert process.poll() is None, f"the server died during the tests:\n{log.read_text()[-4000:]}"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _healthy(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server that the tests share: eager, prefix caching with small blocks, probes beside the bundled SAEs."""
    folder = tmp_path_factory.mktemp("server")
    probes = make_probes(folder)
    flags = [part for name, path in probes.items() for part in ("--sae", f"{name}={path}")]
    flags += ["--arm-layers", "10,15,20", "--library", str(folder / "library"), "--enforce-eager"]
    flags += ["--block-size", "32", "--max-model-len", "1024", "--max-body-mib", "2"]
    flags += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    with start_server(folder, *flags) as running:
        yield running


@pytest.fixture(scope="session")
def http(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="session")
def chat(http: httpx.Client) -> Callable[..., httpx.Response]:
    """POST one short greedy chat; fields may be overridden or added."""

    def post(**fields: Any) -> httpx.Response:
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "Tell me about Paris."}],
            "temperature": 0,
            "max_tokens": 12,
            "ignore_eos": True,
        }
        return http.post("/v1/chat/completions", json={k: v for k, v in (body | fields).items() if v is not ...})

    return post


def sse(response: httpx.Response) -> list[Any]:
    """Decoded data of the server-sent events; ``[DONE]`` as that string."""
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]
    return [event if event == "[DONE]" else json.loads(event) for event in events]
