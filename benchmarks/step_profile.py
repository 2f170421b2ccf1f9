"""Where an edited step's time goes on a CPU: µs per part, for the loads that `make bench` measures.

No model runs. The engine of a worker is driven as an armed model drives it, with hidden states of random numbers in bf16;
between the parts of a step the caches are swept, as the model's own weights sweep them. Loads take turns, round by round.

* plan: `begin`, what happens before the forward pass;
* op: the custom op of all armed layers, through PyTorch's dispatcher. With `--python` it is Python's, and the compiled edit is
  shown by itself: kernel;
* records: `finish`, and their encoding for the core;
* core: their decoding, and encoding for the API process;
* api: decoding, and entry in the journals.

The admission table has the parts of one request's arrival: the payload is decoded once by the worker, its rows are put
into the bank, and the next step finds the tables of all residents renewed.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from editserver.engine.config import EngineConfig
    from editserver.engine.worker import EngineWorker
    from interventions.program import Payload

LAYERS = (10, 15, 20)
D_MODEL, N_FEATURES = 576, 4608
MODEL_STEP_US = 45_000.0
"""vLLM's own decode step at 16 requests of SmolLM2-135M, two cores of an EPYC (Zen 4): what a percent is a percent of."""


@dataclass(frozen=True)
class Load:
    """One kind of step: ``n_tokens`` of each of ``n_requests``, which edit ``n_latents`` at each layer, or inspect."""

    name: str
    n_requests: int
    n_tokens: int
    n_latents: int
    inspect: int = 0


LOADS = (
    Load("16, nothing edited", 16, 1, 0),
    Load("16 x 1", 16, 1, 1),
    Load("16 x 8", 16, 1, 8),
    Load("16 x 32", 16, 1, 32),
    Load("64 x 8", 64, 1, 8),
    Load("256 x 8", 256, 1, 8),
    Load("16, inspect 8", 16, 1, 0, inspect=8),
    Load("16 x 512 tokens, 8", 16, 512, 8),
)
PARTS = ("plan", "op", "kernel", "records", "core", "api")


class Clock:
    """Adds up time by part; a part that runs within another is not counted in that one."""

    now: Callable[[], int] = staticmethod(time.thread_time_ns)
    """In ns: the thread's CPU time, or the wall clock's where several threads work."""

    def __init__(self) -> None:
        self.us: dict[str, float] = defaultdict(float)

    @contextmanager
    def of(self, part: str, *, within: str = "") -> Iterator[None]:
        """Count what runs inside as ``part``."""
        start = self.now()
        try:
            yield
        finally:
            took = (self.now() - start) / 1e3
            self.us[part] += took
            if within:
                self.us[within] -= took


def payloads(load: Load, digests: dict[int, str]) -> list[Payload | None]:
    """What each request carries: latents of its own at every layer."""
    from interventions.program import Channel, LayerProgram, Op, Payload, Program, Read, ReadKind, feature_key
    from interventions.selectors import ALL

    add = Op(1.0, 0.05, -math.inf, math.inf, False, 0, 0)
    made: list[Payload | None] = []
    for request in range(load.n_requests):
        first = request * max(load.n_latents, load.inspect)
        wanted = [(first + i) * 7 % N_FEATURES for i in range(max(load.n_latents, load.inspect))]
        if load.inspect:
            made.append(Payload(None, (Read(digests[15], 15, tuple(wanted), 0, ALL),), None))
        elif load.n_latents:
            layers = [
                LayerProgram(
                    layer,
                    tuple(Channel(ReadKind.LATENT, key, (add,)) for key in sorted(feature_key(d, f) for f in wanted)),
                )
                for layer, d in digests.items()
            ]
            program = Program(tuple(layers), (ALL,), {})
            made.append(Payload(program, (), program.digest()))
        else:
            made.append(None)
    return made


class Scene:
    """A worker, its core and its API in one process, with the requests of one load resident."""

    def __init__(self, load: Load, config: EngineConfig) -> None:
        import torch

        from editserver.engine import native
        from editserver.engine.bank import BankLedger
        from editserver.engine.journal import Journal
        from editserver.engine.worker import EngineWorker

        self.load = load
        n = load.n_requests * load.n_tokens
        self.worker = EngineWorker(config, D_MODEL, torch.bfloat16, n)
        if native.load():
            self.worker.give_jobs()
        self.ledger = BankLedger(config.bank_rows)
        made = payloads(load, {source.layer: source.digest for source in config.saes})
        self.names = [f"request-{i}" for i in range(load.n_requests)]
        self.journals = {name: Journal(one) for name, one in zip(self.names, made, strict=True) if one is not None}
        for name, one in zip(self.names, made, strict=True):
            if one is not None:
                self.admit(name, one)
        self.query_start = torch.arange(0, n + 1, load.n_tokens, dtype=torch.int32)
        self.ids = torch.full((n,), 5, dtype=torch.int32)
        self.positions = torch.zeros(n, dtype=torch.int64)
        self.start = 1
        generator = torch.Generator().manual_seed(0)
        self.residual = (torch.randn(n, D_MODEL, generator=generator) * 4).bfloat16()
        self.hidden = torch.randn(n, D_MODEL, generator=generator).bfloat16()
        self.cores = {name: journal.payload.to_bytes() for name, journal in self.journals.items()}

    def admit(self, name: str, payload: Payload) -> None:
        """As the scheduler and the worker do it."""
        slots = self.ledger.acquire(name, payload.row_keys)
        assert slots is not None, "the bank is too small for this load"
        self.worker.add_request(name, payload, slots, 1)

    def step(self, clock: Clock, sweep: Callable[[], None]) -> None:
        """One forward pass and its way back."""
        import numpy as np
        import torch

        import editserver.engine.worker
        from editserver.engine import op
        from editserver.engine.batch import StepBatch
        from editserver.engine.wire import decode_records, decode_step, encode_records, encode_step

        load, worker = self.load, self.worker
        n, rows = load.n_requests * load.n_tokens, np.arange(load.n_requests)
        self.positions[:] = torch.arange(self.start, self.start + load.n_tokens).repeat(load.n_requests)
        batch = StepBatch(
            list(self.names),
            rows,
            torch.from_numpy(rows),
            self.query_start,
            n,
            self.positions,
            self.ids,
            lambda: None,
        )
        streams = [(self.hidden.clone(), self.residual.clone()) for _ in LAYERS]
        op.install(worker)
        sweep()
        with clock.of("plan"):
            worker.begin(batch)
        engine: Any = editserver.engine.worker
        kernel = engine.edit_tokens

        def timed(*args: object) -> Any:
            with clock.of("kernel", within="op"):
                return kernel(*args)

        engine.edit_tokens = timed
        for layer, (hidden, residual) in zip(LAYERS, streams, strict=True):
            sweep()
            with clock.of("op"):
                torch.ops.editserver.edit.default(hidden, residual, layer)  # as compiled graphs call it
        engine.edit_tokens = kernel
        sweep()
        with clock.of("records"):
            finished = worker.finish()
            told = encode_step(finished() if finished is not None else {})
        sweep()
        with clock.of("core"):
            sent = {name: encode_records([record]) for name, record in decode_step(told).items()}
        assert len(sent) == len(self.journals)
        sweep()
        with clock.of("api"):
            for name, data in sent.items():
                for record in decode_records(data):
                    self.journals[name].add(record)
        self.start += load.n_tokens

    def check(self) -> float:
        """What was timed did happen; µs that the journals took to enter what they had put off."""
        clock = Clock()
        with clock.of("entry"):
            covered = [journal.covers(1, self.start) for journal in self.journals.values()]
        assert all(covered)
        for journal in self.journals.values():
            if journal.payload.program is not None:
                assert journal.stats(0, LAYERS[0], self.start).fired == self.start - 1
        return clock.us["entry"]


def admission(config: EngineConfig, rounds: int) -> list[tuple[str, float, float]]:
    """The parts of the arrival of one request with 63 rows (21 at each layer), next to 255 residents of 24: name, min, median."""
    from interventions.program import Payload

    scene = Scene(Load("", 255, 1, 8), config)
    (late,) = payloads(Load("", 1, 1, 21), {source.layer: source.digest for source in config.saes})
    assert late is not None
    data = late.to_bytes()
    us: dict[str, list[float]] = defaultdict(list)
    quiet = Clock()
    scene.step(quiet, lambda: None)
    for number in range(rounds):
        scene.step(quiet, lambda: None)
        clock, name = Clock(), f"late-{number}"
        with clock.of("payload decoded"):
            payload = Payload.from_bytes(data)
        slots = scene.ledger.acquire(name, payload.row_keys)
        assert slots is not None
        forget(scene.worker, slots)
        with clock.of("resident, rows in the bank"):
            scene.worker.add_request(name, payload, slots, 1)
        plan = Clock()
        with clock.of("tables, at the next step"):
            scene.worker.residents.refresh()
        clock.us["all"] = sum(clock.us.values())
        scene.worker.remove_request(name)
        scene.ledger.release(name)
        with plan.of("tables, after it left"):
            scene.worker.residents.refresh()
        for part, took in (clock.us | plan.us).items():
            us[part].append(took)
    return [(part, min(took), statistics.median(took)) for part, took in us.items()]


def forget(worker: EngineWorker, slots: list[int]) -> None:
    """The rows in ``slots`` must be read again."""
    for slot in slots:
        worker.bank._content[slot] = None


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="steps per load (default 30)")
    parser.add_argument("--loads", nargs="*", default=[], help="only loads whose name contains one of these")
    parser.add_argument("--warm", action="store_true", help="leave the caches alone")
    parser.add_argument("--python", action="store_true", help="without the op's C++ part")
    parser.add_argument(
        "--threads", type=int, default=1,
        help="of PyTorch, which the op's C++ part shares (default 1, whose own time is told; else the wall clock's)",
    )  # fmt: skip
    args = parser.parse_args(argv)

    if args.python:
        os.environ["EDITSERVER_NATIVE_OP"] = "0"

    import torch
    from rich.console import Console
    from rich.table import Table

    from benchmarks.dictionaries import write_random
    from editserver.engine.config import EngineConfig

    torch.set_num_threads(args.threads)
    if args.threads > 1:
        Clock.now = staticmethod(time.perf_counter_ns)
    swept = torch.zeros(0 if args.warm else 1 << 24)  # 64 MiB

    def sweep() -> None:
        swept.add_(1.0)

    loads = [one for one in LOADS if not args.loads or any(part in one.name for part in args.loads)]
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as scratch:
        sources = [write_random(Path(scratch), f"l{layer}", layer, D_MODEL, N_FEATURES) for layer in LAYERS]
        config = EngineConfig(LAYERS, tuple(sources))
        scenes = {load: Scene(load, config) for load in loads}
        taken: dict[Load, list[Clock]] = {load: [] for load in loads}
        for round_ in range(args.rounds + 2):
            for load, scene in scenes.items():
                if load.n_tokens > 1 and round_ % 4 != 1:
                    continue
                clock = Clock()
                scene.step(clock, sweep)
                if round_ > 1:
                    taken[load].append(clock)
        for load, scene in scenes.items():
            steps = (scene.start - 1) // load.n_tokens
            late = scene.check() / steps
            for clock in taken[load]:
                clock.us["api"] += late
        table = Table(title=f"µs per step, median (min), {len(LAYERS)} layers, d = {D_MODEL}")
        for heading in ("step", *PARTS, "all", "of 45 ms"):
            table.add_column(heading, justify="left" if heading == "step" else "right")
        for load, clocks in taken.items():
            cells = []
            for part in PARTS:
                us = [clock.us[part] for clock in clocks]
                cells.append(f"{statistics.median(us):.0f} ({min(us):.0f})")
            whole = statistics.median(sum(clock.us.values()) for clock in clocks)
            share = f"{whole / MODEL_STEP_US:.2%}" if load.n_tokens == 1 and load.n_requests == 16 else ""
            table.add_row(load.name, *cells, f"{whole:.0f}", share)
        console.print(table)
        table = Table(title="µs of one arrival: 63 rows, next to 255 requests of 24 rows")
        for heading in ("part", "min", "median"):
            table.add_column(heading, justify="left" if heading == "part" else "right")
        for part, least, median in admission(config, args.rounds):
            table.add_row(part, f"{least:.0f}", f"{median:.0f}")
        console.print(table)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
