"""All cells of the study, each kept in the cache as soon as it is done, so that an interrupted run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from reproduce.app.cell import NEUTRAL, run_cell
from reproduce.app.data import SETS, WHEEL_SHA256, Labelled, load
from reproduce.app.settings import MAIN_LAYER, SIDE_LAYERS, SUFFIX, Settings
from reproduce.model import Runner
from sae_weights.cache import cache_root
from sae_weights.catalogue import resolve
from sae_weights.sae import SAE

PROTOCOL = 1
"""Raise when a cell is measured differently, so that kept ones are not mixed with new ones."""


def cells(sizes: Settings) -> Iterator[tuple[Labelled, int]]:
    """Set and seed of every cell; all sets of one seed before the next, so that a partial run is balanced."""
    for seed in range(sizes.seeds):
        for labelled in SETS[: sizes.sets]:
            yield labelled, seed


def layers_of(labelled: Labelled, sizes: Settings) -> tuple[int, ...]:
    """The layers at which a set is edited."""
    return tuple(sorted((MAIN_LAYER, *SIDE_LAYERS))) if sizes.side and labelled is SETS[0] else (MAIN_LAYER,)


def fingerprint(sizes: Settings, saes: Mapping[int, SAE]) -> str:
    """Names what cells depend on besides set and seed."""
    facts = {
        "protocol": PROTOCOL,
        "sizes": {name: value for name, value in sizes.as_dict().items() if name not in ("seeds", "sets")},
        "trials": {str(layer): [trial.label + trial.by for trial in sizes.trials(layer)] for layer in saes},
        "saes": {str(layer): sae.digest for layer, sae in saes.items()},
        "texts": WHEEL_SHA256,
        "neutral": hashlib.sha256(NEUTRAL.read_bytes()).hexdigest(),
        "suffix": SUFFIX,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def run(sizes: Settings, cache: Path | None = None, console: Console | None = None) -> dict[str, Any]:
    """The results of every cell, computed or read from ``cache`` (a folder below the cache of the machine if None).

    Raises:
        DataError: the labelled texts cannot be fetched.
    """
    wanted = {layer for labelled in SETS[: sizes.sets] for layer in layers_of(labelled, sizes)}
    saes = {layer: resolve(f"smollm2-135m/l{layer}")[1] for layer in sorted(wanted)}
    folder = (cache or cache_root() / "reproduce-app") / fingerprint(sizes, saes)
    folder.mkdir(parents=True, exist_ok=True)
    found, model = [], None
    texts: dict[str, dict[str, list[str]]] = {}
    todo = list(cells(sizes))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console or Console(stderr=True)) as bar:
        task = bar.add_task("loading", total=len(todo))
        for labelled, seed in todo:
            path = folder / f"{labelled.name}-{seed}.json"
            if not path.is_file():
                if model is None:
                    model = Runner.bundled(getattr(torch, sizes.dtype))
                if labelled.name not in texts:
                    texts[labelled.name] = load(labelled)
                head = f"{labelled.name}, seed {seed}"

                def say(step: str, head: str = head) -> None:
                    bar.update(task, description=f"{head}: {step}")

                chosen = {layer: saes[layer] for layer in layers_of(labelled, sizes)}
                cell = run_cell(*model, chosen, labelled, texts[labelled.name], seed, sizes, say)
                _keep(path, cell)
            found.append(json.loads(path.read_text()))
            bar.advance(task)
    return {"settings": sizes.as_dict(), "saes": {str(n): sae.digest for n, sae in saes.items()}, "cells": found}


def _keep(path: Path, cell: Mapping[str, Any]) -> None:
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(cell, indent=1) + "\n")
    part.replace(path)
