"""``editserver demo``: a real server, the same chat plain and edited, and what was edited; then it keeps serving."""

from __future__ import annotations

import json
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from editserver.demo.model import MODEL_NAME, DemoModelError, cache_root, ensure_demo_model
from editserver_client import ChatResponse, Client, EditFeatures, EditserverError, Inspect, RuleReceipt
from editserver_client.features import AddFeature, SetFeature
from sae_weights.catalogue import BUNDLED_FOLDER
from sae_weights.knowledge import FILE, KnowledgeStore

SAE_ID = "smollm2-135m/l15"
MAX_TOKENS = 90
TOP_FEATURES = 6
START_S = 900
STOP_S = 20


class DemoError(RuntimeError):
    """The demo cannot go on; the message says why."""


@dataclass(frozen=True)
class Scene:
    """What is asked and which latent is edited how: the entry ``demo`` of the knowledge beside the bundled SAE."""

    prompt: str
    feature: int
    op: str
    value: float
    label: str

    @classmethod
    def read(cls, folder: Path) -> Scene:
        """Raises :class:`DemoError` if the bundled SAE or its entry ``demo`` is missing."""
        path = folder / FILE
        try:
            with KnowledgeStore.open(path) as store:
                raw = store.meta["demo"]
            op = raw.get("op", "add")
            if op not in ("add", "set"):
                raise ValueError(f"op {op!r}")
            return cls(raw["prompt"], int(raw["feature"]), op, float(raw["value"]), str(raw.get("label") or ""))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DemoError(f"{path} does not say what the demo edits ({error!r}); reinstall editserver") from error

    @property
    def edit(self) -> EditFeatures:
        """The intervention."""
        change = {"add": AddFeature, "set": SetFeature}[self.op](self.feature, self.value)
        return EditFeatures(SAE_ID, [change])


def show(port: int = 8000, once: bool = False, flags: Sequence[str] = ()) -> int:
    """Run the demo on ``port``; the exit code. ``flags`` go to ``editserver serve demo``."""
    console = Console()
    try:
        scene = Scene.read(BUNDLED_FOLDER / SAE_ID)
        ensure_demo_model()
        with _serving(console, port, flags) as server:
            with Client(f"http://127.0.0.1:{port}", timeout=300) as client:
                _side_by_side(console, client, scene)
            if not once:
                _keep_serving(console, scene, port, server)
    except (DemoError, DemoModelError, EditserverError) as error:
        console.print(Text(f"editserver demo: {error}", style="red"))
        return 1
    except KeyboardInterrupt:
        console.print("stopped")
    return 0


@contextmanager
def _serving(console: Console, port: int, flags: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """The server as a process of its own; its log goes to the cache folder."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise DemoError(f"port {port} is in use; choose another: editserver demo --port {port + 1}")
    log = cache_root() / "demo-server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "editserver.cli.main", "serve", "demo", "--port", str(port), *flags]
    with log.open("wb") as out:
        # A session of its own: Ctrl-C reaches this process, which then stops the server in order.
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    terminate = signal.signal(signal.SIGTERM, _interrupt)
    try:
        _wait(console, server, port, log)
        yield server
    finally:
        signal.signal(signal.SIGTERM, terminate)
        server.terminate()
        try:
            server.wait(STOP_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


_STAGES = (
    ("Available routes", "opening the port"),
    ("init engine", "warming up"),
    ("GPU KV cache size", "compiling the model with its edit points (kept for the next start)"),
    ("CPU KV cache size", "compiling the model with its edit points (kept for the next start)"),
    ("Starting to load model", "loading the weights"),
    ("Initializing a V1 LLM engine", "starting the engine"),
)


def _wait(console: Console, server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    begin = time.monotonic()
    with Client(f"http://127.0.0.1:{port}", timeout=5) as client, console.status("starting vLLM") as status:
        while not client.health():
            if server.poll() is not None:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
                raise DemoError(f"the server stopped (exit code {server.returncode}); its log {log} ends with\n{tail}")
            waited = time.monotonic() - begin
            if waited > START_S:
                raise DemoError(f"the server did not start within {START_S} s; see {log}")
            text = log.read_text(errors="replace")
            stage = next((name for mark, name in _STAGES if mark in text), "starting vLLM")
            status.update(f"{stage} … {waited:.0f} s")
            time.sleep(0.5)
    console.print(f"server ready after {time.monotonic() - begin:.0f} s (log: {log})", style="dim", highlight=False)


def _side_by_side(console: Console, client: Client, scene: Scene) -> None:
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": MAX_TOKENS}
    with console.status("asking twice"):
        plain = client.chat(scene.prompt, **asked)
        inspect = Inspect(SAE_ID, top_k=TOP_FEATURES, features=[scene.feature], tokens="generated", after=True)
        edited = client.chat(scene.prompt, interventions=[scene.edit], inspect=inspect, **asked)
    label = f" ({scene.label})" if scene.label else ""
    console.print()
    console.print(Panel(Text(scene.prompt), title="asked twice", border_style="dim"))
    change = f"feature {scene.feature}{label}: {scene.op} {scene.value:g}"
    console.print(Text.assemble("the edit: ", (change, "magenta"), f" in {SAE_ID}"))
    width = max(30, console.width // 2 - 1)
    console.print(
        Columns(
            [
                Panel(Text(plain.text), title="plain", width=width),
                Panel(Text(edited.text), title="edited", width=width, border_style="magenta"),
            ]
        )
    )
    if plain.text == edited.text:
        console.print("The two answers are the same: this edit did not change the chosen tokens.", style="yellow")
    console.print(_receipt(edited))
    console.print(_features(edited, scene))


def _receipt(answer: ChatResponse) -> Table:
    table = Table(title="receipt: what was really edited", title_justify="left")
    for name in ("type", "layer", "tokens edited", "in prompt", "fired", "mean dose", "max dose"):
        table.add_column(name, justify="left" if name == "type" else "right", no_wrap=name == "type")
    for entry in answer.receipt.receipt if answer.receipt is not None else ():
        if isinstance(entry, RuleReceipt):
            continue  # the demo's own scenes have no rules
        numbers = (entry.layer, entry.tokens_edited, entry.prompt_tokens_edited, entry.fired)
        doses = ("" if dose is None else f"{dose:.2f}" for dose in (entry.dose_mean, entry.dose_max))
        table.add_row(entry.type, *(str(number) for number in numbers), *doses)
    return table


def _features(answer: ChatResponse, scene: Scene) -> Table:
    """The features with the largest mean activation over the answer, after the edit."""
    readings = answer.readings
    tokens = [] if readings is None or isinstance(readings, list) else readings.tokens
    total: dict[int, float] = defaultdict(float)
    best: dict[int, tuple[float, str]] = {}
    labels: dict[int, str] = {scene.feature: scene.label}
    for token in tokens:
        for feature in token.features:
            total[feature.index] += feature.activation
            best[feature.index] = max(best.get(feature.index, (0.0, "")), (feature.activation, token.token))
            labels.setdefault(feature.index, feature.label or "")
    table = Table(title=f"features of {SAE_ID} that fired in the edited answer", title_justify="left")
    table.add_column("feature", justify="right")
    table.add_column("label")
    table.add_column("mean activation", justify="right")
    table.add_column("strongest at")
    for index in sorted(total, key=lambda i: -total[i])[:TOP_FEATURES]:
        style = "magenta" if index == scene.feature else ""
        mean = f"{total[index] / max(1, len(tokens)):.2f}"
        table.add_row(str(index), Text(labels[index]), mean, Text(repr(best[index][1])), style=style)
    return table


def _keep_serving(console: Console, scene: Scene, port: int, server: subprocess.Popen[bytes]) -> None:
    body = {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": scene.prompt}],
        "interventions": [scene.edit.to_dict()],
    }
    command = f"curl localhost:{port}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
    console.print(f"\nStill serving on http://localhost:{port} (documentation: /docs). Ctrl-C stops it. Try:")
    console.print(Text(command), soft_wrap=True)
    code = server.wait()
    raise DemoError(f"the server stopped (exit code {code})")
