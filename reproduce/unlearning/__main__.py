"""``make reproduce-unlearning``: measure every cell (resumable), then print and draw the tables."""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from reproduce.cells import keep, progress
from reproduce.model import Runner
from reproduce.page import refresh
from reproduce.unlearning import dilution, knowledge, report
from reproduce.unlearning.cells import ALPHA, Cell, all_cells, calibrated_gate
from reproduce.unlearning.edits import Runs
from reproduce.unlearning.knowledge import key
from reproduce.unlearning.material import Material, Sizes, fit, gather
from reproduce.unlearning.measure import measure
from reproduce.unlearning.passes import Passes
from sae_weights.catalogue import resolve

LAYERS = (10, 15, 20)
ATTACKED = 15
"""Layer of the dilution attack's edits."""
HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
PICTURE = HERE.parent.parent / "docs" / "images" / "unlearning.png"
PAGE = HERE.parent.parent / "docs" / "reproduce-unlearning.md"
WORK = HERE.parent.parent / "build" / "reproduce-unlearning"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m reproduce.unlearning", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="one layer, few targets, minutes; nothing is kept but its cells"
    )
    parser.add_argument("--tables", action="store_true", help="print the tables of the kept results; measure nothing")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="start no cell after so many; a later call goes on"
    )
    parser.add_argument("--threads", type=int, default=0, help="threads of the model (0: torch's choice)")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    out = WORK / "quick.json" if given.quick else RESULTS
    if not given.tables:
        found = run(given.quick, given.minutes)
        out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    results = json.loads(out.read_text())
    written = report.tables(results)
    print(written)
    if not given.quick:
        report.draw(results, PICTURE)
        refresh(PAGE, written)


def run(quick: bool, minutes: float = math.inf) -> dict[str, Any]:
    """All cells, each from its file where that is there already; those that ``minutes`` leave no time for are left out."""
    began = time.monotonic()
    sizes = Sizes(1, 8, 3, 24, 32, 2) if quick else Sizes()
    runner, tokenizer = Runner.bundled()
    runs = Runs(Passes(runner, tokenizer), {layer: resolve(f"smollm2-135m/l{layer}")[1] for layer in LAYERS})
    folder = WORK / f"{'quick' if quick else 'full'}-{_digest(sizes)}"
    folder.mkdir(parents=True, exist_ok=True)
    cells = all_cells(LAYERS, quick)
    lengths = dilution.PADDING[:3] if quick else dilution.PADDING
    console = Console(stderr=True)
    with progress(console) as bar:
        task = bar.add_task("what is known", total=len(cells) + 4)
        material = _material(runs, sizes, lambda text: bar.update(task, description=text, advance=1))
        jobs: list[tuple[str, Callable[[], dict[str, Any]]]] = [
            (c.name, functools.partial(_measured, runs, material, c)) for c in cells
        ]
        after = max(i for i, c in enumerate(cells[: len(cells) // 2]) if c.layer in (-1, ATTACKED)) + 1
        jobs.insert(after, ("dilution", functools.partial(dilution.attack, runs, material, ATTACKED, lengths)))
        for name, job in jobs:
            bar.update(task, description=name)
            file = folder / f"{name}.json"
            if not file.is_file():
                if time.monotonic() - began > 60 * minutes:
                    break
                keep(file, job())
                if not console.is_terminal:
                    print(f"{time.monotonic() - began:6.0f} s  {name}", file=sys.stderr, flush=True)
            bar.advance(task)
    done = {name: json.loads(file.read_text()) for name, _ in jobs if (file := folder / f"{name}.json").is_file()}
    return {
        "model": "SmolLM2-135M-Instruct",
        "measured": [len(done), len(jobs)],
        "knowledge": _facts(material),
        "gates": _calibrations(material),
        "cells": [report.summary(row) for name, row in done.items() if name != "dilution"],
        "dilution": done.get("dilution"),
    }


def _measured(runs: Runs, material: Material, cell: Cell) -> dict[str, Any]:
    return {"cell": cell.as_dict(), "metrics": measure(runs, material, cell)}


def _material(runs: Runs, sizes: Sizes, done: Callable[[str], None]) -> Material:
    known = knowledge.find(runs.passes, runs.plain(), sizes.targets_per_kind)
    done("questions and texts")
    material = gather(runs, known, sizes)
    done("probes, latents, calibration")
    fit(runs, material, sizes)
    done("cells")
    return material


def _facts(material: Material) -> dict[str, Any]:
    known = material.knowledge
    return {
        "asked": [[kind, attribute, *counts] for (kind, attribute), counts in known.asked.items()],
        "counts": known.counts,
        "targets": {t.name: len(material.asked[key(t)]) for t in known.targets},
        "questions": {
            "targets": sum(map(len, material.asked.values())),
            "in a chat": sum(map(len, material.chat.values())),
            "others": len(material.others),
            "others beside a target": sum(map(len, material.beside.values())),
        },
        "latents": {
            str(layer): {
                "known": len(at.latents.known),
                "unknown": len(at.latents.unknown),
                "best known score": at.latents.known_scores[0] if at.latents.known else None,
                "best unknown score": at.latents.unknown_scores[0] if at.latents.unknown else None,
                "every": len(at.every),
            }
            for layer, at in material.layers.items()
        },
    }


def _calibrations(material: Material) -> list[dict[str, Any]]:
    found = []
    for layer in material.layers:
        for kind in dilution.GATES:
            every = [calibrated_gate(material, layer, kind, key(t)) for t in material.knowledge.targets]
            found.append(
                {
                    "layer": layer,
                    "gate": kind,
                    "alpha": ALPHA,
                    "calibration sequences": every[0][1].n,
                    "held-out sequences": every[0][2].n,
                    "threshold": report.interval([f.threshold for _, f, _ in every]),
                    "false positives": report.interval([r.value for _, _, r in every]),
                }
            )
    return found


def _digest(sizes: Sizes) -> str:
    """Of the sizes and of what the measuring code does: results of other code are not taken for these."""
    digest = hashlib.sha256(repr(sizes).encode())
    for name in (
        "cells",
        "dilution",
        "edits",
        "entities",
        "knowledge",
        "material",
        "measure",
        "passes",
        "recall",
        "texts",
    ):
        tree = ast.parse((HERE / f"{name}.py").read_text())
        for node in ast.walk(tree):  # docstrings say nothing to the machine
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                node.body = [
                    n for n in node.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))
                ]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    main()
