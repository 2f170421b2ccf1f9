"""The measurement behind ``kernels.py``: per model width a graph without editing and one with it, checked, then timed in turns."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import statistics
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton

from benchmarks.gpu.editing import SEED, Editing
from benchmarks.gpu.loop import SHAPES, TINY, Loop, Shape, make_weights
from benchmarks.gpu.replays import Replay, in_turns
from editserver import __version__
from editserver.engine.triton import step as step_module
from editserver.engine.triton.step import Stages

GOALS = {("8B", phase, n, 8): least for phase in ("decode", "served") for n, least in ((16, 0.99), (256, 0.97))}
"""(Shape, phase, programs, latents) → least ratio."""

CLOSE = 2**-8
"""Largest error against float64, of ‖h‖ + ‖Δ‖: what the last bit of bfloat16 makes of it."""

QUIET = 8.0
"""‖h‖ of the tokens that are checked, about: of the size of the edits, or they would drown in that last bit."""


@dataclass(frozen=True)
class Sizes:
    """How many programs, of how many latents, with how many tokens each in a batch of prompts; for the widths of dictionaries
    (programs, latents, widths)."""

    programs: tuple[int, ...]
    latents: tuple[int, ...]
    prompts: dict[int, int]
    widths: tuple[int, int, tuple[int, ...]]


FULL = Sizes((1, 16, 256), (1, 8, 64), {1: 2048, 16: 512, 256: 32}, (16, 8, (4096, 16384, 65536, 131072)))
SMALL = Sizes((1, 3), (1, 2), {1: 5, 3: 3}, (2, 2, (16, 64)))


@dataclass(frozen=True)
class Compared:
    """Steps without and with editing, in turns.

    Attributes:
        vanilla, edited: medians, in milliseconds.
        ratio, low, high: vanilla / edited, round by round: median, 5th and 95th percentile.
    """

    vanilla: float
    edited: float
    ratio: float
    low: float
    high: float

    @classmethod
    def of(cls, vanilla: Sequence[float], edited: Sequence[float]) -> Compared:
        """From the milliseconds of as many rounds."""
        ratios = sorted(v / e for v, e in zip(vanilla, edited, strict=True))
        tail, middle = len(ratios) // 20, statistics.median
        return cls(middle(vanilla), middle(edited), middle(ratios), ratios[tail], ratios[-1 - tail])


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    shape: str
    phase: str
    programs: int
    latents: int
    tokens: int
    vanilla: float
    edited: float
    ratio: float
    low: float
    high: float
    us_per_layer: float


@dataclass(frozen=True)
class Settings:
    """What the command line says; ``seconds``: no new measurement is begun after that, ``each``: for one of them; ``ahead``: as
    of :class:`~editserver.engine.triton.step.Stages`."""

    device: torch.device
    shapes: tuple[Shape, ...]
    sizes: Sizes
    seconds: float
    each: float
    ahead: bool
    out: Path


class Bench:
    """All measurements of one run.

    Attributes:
        report: what goes into the JSON; ``wrong`` in it: what does not hold on this device, and what failed.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.began = settings, time.perf_counter()
        device = settings.device
        on_gpu = device.type == "cuda"
        self.report: dict[str, Any] = {
            "device": device_of_this_machine() if on_gpu else platform.processor() or "CPU",
            "cuda": torch.version.cuda,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
            "editserver": f"{__version__}, kernels {digest_of_kernels()}",
            "ahead": settings.ahead,
            "lanes": step_module.MOST_LANES,
            "decode": {k: str(v) for k, v in step_module.DECODE.items()},
            "prompt": {k: str(v) for k, v in step_module.PROMPT.items()},
            "checks": {},
            "results": [],
            "served": [],
            "served without": None,
            "memory": {},
            "widths": [],
            "wrong": [],
            "skipped": [],
        }

    @property
    def late(self) -> bool:
        """Whether nothing new should be begun."""
        return time.perf_counter() - self.began > self.settings.seconds

    def run(self) -> bool:
        """Measure and print everything; whether all that must hold does."""
        torch.manual_seed(SEED)
        self.save()  # where that is not possible, it is said before anything is measured
        for line in self.made_with():
            print(line)
        print(in_columns(Result.__annotations__), flush=True)
        for shape in self.settings.shapes:
            with torch.no_grad():
                self._attempt(shape.name, partial(self._shape, shape))
        self.save()
        for line in self.summary():
            print(line)
        return not self.report["wrong"]

    def _attempt(self, name: str, measure: partial[None]) -> None:
        """What fails is reported, and the next one begun: machines with a GPU are not at hand every day."""
        try:
            measure()
        except Exception:
            self._wrong(name, traceback.format_exc())
        self.save()

    def _wrong(self, name: str, what: str) -> None:
        self.report["wrong"].append([name, what[-4000:]])
        print(f"WRONG: {name}: {what.strip().splitlines()[-1]}", flush=True)

    def save(self) -> None:
        """What there is so far."""
        self.report["seconds"] = time.perf_counter() - self.began
        self.settings.out.write_text(json.dumps(self.report, indent=1))

    def _shape(self, shape: Shape) -> None:
        sizes, device = self.settings.sizes, self.settings.device
        if self.late:
            self.report["skipped"].append([shape.name])
            return
        weights = make_weights(shape, device)
        most = max(n * each for n, each in sizes.prompts.items())
        x = torch.randn(most, shape.d, device=device, dtype=torch.bfloat16)
        stages = Stages(False, False, False, self.settings.ahead)
        editing = Editing(shape, most, max(sizes.programs), max(sizes.latents), device, stages)
        self.report["memory"][shape.name] = {"bytes": editing.step.n_bytes}
        for phase in ("decode", "served", "prompt"):
            self._attempt(f"{shape.name} {phase}", partial(self._phase, phase, shape, editing, weights, x))
        if shape.name in ("8B", TINY.name):
            loop = Loop(shape, sizes.widths[0], weights, x)
            self._attempt(f"{shape.name} widths", partial(self._widths, editing, loop))

    def _phase(
        self, phase: str, shape: Shape, editing: Editing, weights: Sequence[tuple[torch.Tensor, ...]], x: torch.Tensor
    ) -> None:
        used = self._served(shape) if phase == "served" and not self.late else editing
        for programs in self.settings.sizes.programs:
            each = self.settings.sizes.prompts[programs] if phase == "prompt" else 1
            name = f"{shape.name} {phase} {programs}"
            if self.late:
                self.report["skipped"].append([name])
            else:
                loop = Loop(shape, programs * each, weights, x)
                self._attempt(name, partial(self._batch, name, phase, used, loop, each))

    def _served(self, shape: Shape) -> Editing:
        """With every launch of a server that encodes no whole dictionary; without those of rules where msgspec is missing."""
        sizes = self.settings.sizes
        most, stages = max(sizes.programs), Stages(ahead=self.settings.ahead)
        made = partial(Editing, shape, most, most, max(sizes.latents), self.settings.device, stages)
        try:
            return made(rules=True)
        except ImportError as error:
            self.report["served without"] = f"the three launches of rules: {error}"
            return made()

    def _graphs(self, editing: Editing, loop: Loop, decode: bool) -> tuple[Replay, Replay]:
        """Without and with the armed layers; captured while nothing is planned."""
        editing.give(0, 0, 0)
        device = self.settings.device
        armed = partial(loop.run, editing.armed, partial(editing.step.run, decode=decode))
        return Replay(loop.run, device), Replay(armed, device)

    def _batch(self, name: str, phase: str, editing: Editing, loop: Loop, each: int) -> None:
        programs = len(loop.x) // each
        vanilla, armed = self._graphs(editing, loop, phase != "prompt")
        latents = self.settings.sizes.latents
        found = self.report["checks"][name] = check(editing, loop, vanilla, armed, each, latents[1])
        for what, holds in found.items():
            if holds is False:
                self._wrong(name, f"not so: {what}; {found}")
        for latent_count in (0, *latents):
            if self.late:
                self.report["skipped"].append([name, latent_count])
                continue
            editing.give(programs if latent_count else 0, latent_count, each)
            spent = Compared.of(*in_turns((vanilla, armed), self.settings.each))
            per_layer = (spent.edited - spent.vanilla) * 1e3 / len(editing.armed)
            line = (editing.shape.name, phase, programs if latent_count else 0, latent_count, len(loop.x))
            result = asdict(Result(*line, **asdict(spent), us_per_layer=per_layer))
            self.report["served" if phase == "served" else "results"].append(result)
            print(in_columns(result.values()), flush=True)

    def _widths(self, editing: Editing, loop: Loop) -> None:
        """Programs out of dictionaries of several widths: the step, and bringing one request's rows."""
        programs, latents, widths = self.settings.sizes.widths
        if self.late:
            self.report["skipped"].append(["widths"])
            return
        vanilla, armed = self._graphs(editing, loop, True)
        device, bank = editing.device, editing.step.bank
        whole = torch.randn(max(widths), loop.shape.d, dtype=torch.bfloat16, device=device).cpu()
        for n_features in widths:
            editing.give(programs, latents, 1)
            random, admissions = np.random.default_rng(1), []
            for layer in editing.armed:
                for slots in editing.slots[layer]:
                    features = torch.from_numpy(np.sort(random.choice(n_features, latents, replace=False)))
                    began = time.perf_counter()
                    rows = torch.nn.functional.normalize(whole[features].float(), dim=1)
                    gate = torch.tensor([0.0, 0.05, 1.0, 0.0]).repeat(latents, 1)
                    bank.put(torch.from_numpy(slots), rows, rows, gate)
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    admissions.append((time.perf_counter() - began) * 1e3)
            line = {"latents wide": n_features} | asdict(Compared.of(*in_turns((vanilla, armed), self.settings.each)))
            line |= {"rows of one request and layer ms": statistics.median(admissions)}
            self.report["widths"].append(line)

    def summary(self) -> list[str]:
        """What is said at the end."""
        report = self.report
        lines = [
            f"{line['latents wide']:>7} latents wide: step {line['vanilla']:.3f} → {line['edited']:.3f} ms, "
            f"{with_spread(line)}; rows of one request and layer in {line['rows of one request and layer ms']:.3f} ms"
            for line in report["widths"]
        ]
        for line in (*report["results"], *report["served"]):
            goal = GOALS.get((line["shape"], line["phase"], line["programs"], line["latents"]))
            if goal is not None:
                met = "met" if line["ratio"] >= goal else "MISSED"
                batch = f"{line['shape']} {line['phase']}, {line['programs']} programs of {line['latents']} latents"
                lines.append(f"goal {met}: {batch}: {with_spread(line)}, at least {goal}")
        if report["served without"]:
            lines.append(f"served, without {report['served without']}")
        lines += [f"skipped for lack of time: {' '.join(map(str, what))}" for what in report["skipped"]]
        lines += [f"WRONG: {name}" for name, _ in report["wrong"]]
        return [*lines, *self.made_with(), f"{report['seconds']:.0f} s; {self.settings.out}"]

    def made_with(self) -> list[str]:
        """Device and versions."""
        report = self.report
        versions = (
            f"torch {report['torch']} (CUDA {report['cuda']}), triton {report['triton']}, Python {report['python']}"
        )
        return [f"{report['device']}; {versions}; editserver {report['editserver']}"]


def with_spread(line: Mapping[str, Any]) -> str:
    """The ratio of a line."""
    return f"ratio {line['ratio']:.4f} ({line['low']:.4f} to {line['high']:.4f})"


def device_of_this_machine() -> str:
    """Its name, memory and multiprocessors."""
    facts = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, {facts.multi_processor_count} multiprocessors"


def digest_of_kernels() -> str:
    """Of the code that is measured."""
    digest = hashlib.sha256()
    for path in sorted(Path(step_module.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def check(
    editing: Editing, loop: Loop, vanilla: Replay, armed: Replay, each: int, latents: int
) -> dict[str, bool | float | int]:
    """What must hold on this device (False: it does not): idle is bit-identical, both variants are, a replay is, and the edit
    is the definition's."""
    programs = len(loop.x) // each
    editing.give(0, 0, 0)
    vanilla()
    hidden, residual = loop.hidden.clone(), loop.residual.clone()
    vanilla()
    found: dict[str, bool | float | int] = {"vanilla repeats its bits": bool(torch.equal(loop.residual, residual))}
    plain = residual
    armed()
    idle = torch.equal(loop.residual, plain) and torch.equal(loop.hidden, hidden)
    found["idle is vanilla, bit for bit"] = bool(idle)
    editing.give(programs, latents, each)
    layer = editing.armed[0]
    norm = float((hidden.float() + residual.float()).norm(dim=1).mean())
    quieter = 2.0 ** round(math.log2(QUIET / norm))
    hidden, residual = hidden * quieter, residual * quieter
    ours = [(hidden.clone(), residual.clone()) for _ in range(2)]
    for variant, streams in zip((True, False), ours, strict=True):
        editing.step.edit(layer, *streams, variant)
    found["decode variant is prompt variant, bit for bit"] = all(map(torch.equal, *ours))
    h = (hidden.float() + residual.float()).to(hidden.dtype)
    some = h[: min(64, len(h))]
    want = editing.expected(layer, some, each)
    got = ours[0][0][: len(some)].float() + ours[0][1][: len(some)].float()
    lengths, deltas = some.double().norm(dim=1), want.norm(dim=1)
    error = (got.double() - (some.double() + want)).norm(dim=1) / (lengths + deltas)
    found["least ‖Δ‖ / ‖h‖"] = float((deltas / lengths).min())
    found["largest error against float64, of ‖h‖ + ‖Δ‖"] = float(error.max())
    found["it is as small as bfloat16 allows"] = bool((error <= CLOSE).all())
    found["tokens edited"] = int((editing.step.dose[0, : len(some)] > 0).sum())
    found["every token is edited"] = found["tokens edited"] == len(some)
    armed()
    once = loop.residual.clone()
    armed()
    found["a replay repeats its bits"] = bool(torch.equal(once, loop.residual))
    found["edited differs from vanilla"] = bool(not torch.equal(once, plain))
    return found


def in_columns(values: Iterable[Any]) -> str:
    """A row of the table; ratios have a digit more."""
    row = []
    for name, value in zip(Result.__annotations__, values, strict=True):
        digits = 4 if name in ("ratio", "low", "high") else 3
        shown = f"{value:.{digits}f}" if isinstance(value, float) else str(value)
        row.append(f"{shown:>{max(9, len(name)) + 1}}")
    return "".join(row)


def of(names: list[str] | None, tiny: bool) -> tuple[Shape, ...]:
    """Shapes by name; None: all."""
    return (TINY,) if tiny else tuple(shape for shape in SHAPES.values() if names is None or shape.name in names)
