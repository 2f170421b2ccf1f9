"""The measurement behind ``kernels.py``: per model width a graph without editing and one with it, checked, then timed in turns."""

from __future__ import annotations

import json
import platform
import statistics
import time
import traceback
from collections.abc import Iterable
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
from editserver.engine.triton import step as step_module
from editserver.engine.triton.step import Stages

GOALS = {("8B", "decode", 16, 8): 0.99, ("8B", "decode", 256, 8): 0.97}
"""(Shape, phase, programs, latents) → least ratio."""

CLOSE = 2**-8
"""Largest error against float64, of ‖h‖: what the last bit of bfloat16 makes of it."""


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


@dataclass
class Result:
    """One line of the table; times in milliseconds."""

    shape: str
    phase: str
    programs: int
    latents: int
    tokens: int
    vanilla: float
    edited: float
    ratio: float
    us_per_layer: float


@dataclass(frozen=True)
class Settings:
    """What the command line says; ``seconds``: no new measurement is begun after that, ``each``: for one of them."""

    device: torch.device
    shapes: tuple[Shape, ...]
    sizes: Sizes
    seconds: float
    each: float
    stages: Stages
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
            "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or "CPU",
            "cuda": torch.version.cuda,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
            "stages": asdict(settings.stages),
            "lanes": step_module.MOST_LANES,
            "decode": {k: str(v) for k, v in step_module.DECODE.items()},
            "prompt": {k: str(v) for k, v in step_module.PROMPT.items()},
            "checks": {},
            "results": [],
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
        print(f"{self.report['device']}; torch {self.report['torch']}, triton {self.report['triton']}")
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
        editing = Editing(shape, most, max(sizes.programs), max(sizes.latents), device, self.settings.stages)
        self.report["memory"][shape.name] = {"bytes": editing.step.n_bytes}
        for phase in ("decode", "prompt"):
            for programs in sizes.programs:
                each = 1 if phase == "decode" else sizes.prompts[programs]
                name = f"{shape.name} {phase} {programs}"
                if self.late:
                    self.report["skipped"].append([name])
                else:
                    loop = Loop(shape, programs * each, weights, x)
                    self._attempt(name, partial(self._batch, name, phase, editing, loop, each))
        if shape.name in ("8B", TINY.name):
            loop = Loop(shape, sizes.widths[0], weights, x)
            self._attempt(f"{shape.name} widths", partial(self._widths, editing, loop))

    def _graphs(self, editing: Editing, loop: Loop, decode: bool) -> tuple[Replay, Replay]:
        """Without and with the armed layers; captured while nothing is planned."""
        editing.give(0, 0, 0)
        device = self.settings.device
        armed = partial(loop.run, editing.armed, partial(editing.step.run, decode=decode))
        return Replay(loop.run, device), Replay(armed, device)

    def _batch(self, name: str, phase: str, editing: Editing, loop: Loop, each: int) -> None:
        decode, programs = phase == "decode", len(loop.x) // each
        vanilla, armed = self._graphs(editing, loop, decode)
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
            without, with_ = in_turns((vanilla, armed), self.settings.each)
            per_layer = (with_ - without) * 1e3 / len(editing.armed)
            line = (editing.shape.name, phase, programs if latent_count else 0, latent_count, len(loop.x))
            self.report["results"].append(asdict(Result(*line, without, with_, without / with_, per_layer)))
            print(in_columns(self.report["results"][-1].values()), flush=True)

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
            without, with_ = in_turns((vanilla, armed), self.settings.each)
            line = {"latents wide": n_features, "vanilla ms": without, "edited ms": with_, "ratio": without / with_}
            line |= {"rows of one request and layer ms": statistics.median(admissions)}
            self.report["widths"].append(line)

    def summary(self) -> list[str]:
        """What is said at the end."""
        report = self.report
        lines = [
            f"{line['latents wide']:>7} latents wide: step {line['vanilla ms']:.3f} → {line['edited ms']:.3f} ms, ratio "
            f"{line['ratio']:.4f}; rows of one request and layer in {line['rows of one request and layer ms']:.3f} ms"
            for line in report["widths"]
        ]
        for line in report["results"]:
            goal = GOALS.get((line["shape"], line["phase"], line["programs"], line["latents"]))
            if goal is not None:
                met = "met" if line["ratio"] >= goal else "MISSED"
                batch = f"{line['shape']} {line['phase']}, {line['programs']} programs of {line['latents']} latents"
                lines.append(f"goal {met}: {batch}: ratio {line['ratio']:.4f}, at least {goal}")
        lines += [f"skipped for lack of time: {' '.join(map(str, what))}" for what in report["skipped"]]
        lines += [f"WRONG: {name}" for name, _ in report["wrong"]]
        versions = f"torch {report['torch']} (CUDA {report['cuda']}), triton {report['triton']}"
        lines.append(f"{report['device']}; {versions}; {report['seconds']:.0f} s; {self.settings.out}")
        return lines


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
    armed()
    idle = torch.equal(loop.residual, residual) and torch.equal(loop.hidden, hidden)
    found["idle is vanilla, bit for bit"] = bool(idle)
    editing.give(programs, latents, each)
    layer = editing.armed[0]
    ours = [(hidden.clone(), residual.clone()) for _ in range(2)]
    for variant, streams in zip((True, False), ours, strict=True):
        editing.step.edit(layer, *streams, variant)
    found["decode variant is prompt variant, bit for bit"] = all(map(torch.equal, *ours))
    h = (hidden.float() + residual.float()).to(hidden.dtype)
    some = h[: min(64, len(h))]
    want = editing.expected(layer, some, each)
    got = ours[0][0][: len(some)].float() + ours[0][1][: len(some)].float()
    error = (got.double() - (some.double() + want)).norm(dim=1) / (some.double().norm(dim=1) + want.norm(dim=1))
    found["largest error against float64, of ‖h‖"] = float(error.max())
    found["it is as small as bfloat16 allows"] = bool((error <= CLOSE).all())
    found["tokens edited"] = int((editing.step.dose[0, : len(some)] > 0).sum())
    found["every token is edited"] = found["tokens edited"] == len(some)
    armed()
    once = loop.residual.clone()
    armed()
    found["a replay repeats its bits"] = bool(torch.equal(once, loop.residual))
    found["edited differs from vanilla"] = bool(not torch.equal(once, residual))
    return found


def in_columns(values: Iterable[Any]) -> str:
    """A row of the table: a column is ten wide."""
    return "".join(f"{v:10.3f}" if isinstance(v, float) else f"{str(v)[:9]:>10}" for v in values)


def of(names: list[str] | None, tiny: bool) -> tuple[Shape, ...]:
    """Shapes by name; None: all."""
    return (TINY,) if tiny else tuple(shape for shape in SHAPES.values() if names is None or shape.name in names)
