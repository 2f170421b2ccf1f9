"""All cells of the study: every set of texts with every seed."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from reproduce.app.cell import NEUTRAL, run_cell
from reproduce.app.data import SETS, WHEEL, Labelled, load
from reproduce.app.settings import MAIN_LAYER, SIDE_LAYERS, SUFFIX, Settings
from reproduce.cells import Say, measured
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
        "texts": WHEEL.sha256,
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
    model = functools.cache(lambda: Runner.bundled(getattr(torch, sizes.dtype)))
    texts: dict[str, dict[str, list[str]]] = {}

    def cell(labelled: Labelled, seed: int, say: Say) -> Any:
        if labelled.name not in texts:
            texts[labelled.name] = load(labelled)
        chosen = {layer: saes[layer] for layer in layers_of(labelled, sizes)}
        return run_cell(*model(), chosen, labelled, texts[labelled.name], seed, sizes, say)

    todo = {f"{one.name}-{seed}": functools.partial(cell, one, seed) for one, seed in cells(sizes)}
    found = list(measured(folder, todo, console).values())
    return {"settings": sizes.as_dict(), "saes": {str(n): sae.digest for n, sae in saes.items()}, "cells": found}
