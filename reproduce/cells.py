"""The cells of a study, each kept in a file as soon as it is done, so that an interrupted run goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

Say = Callable[[str], None]
"""Tells whoever watches what a cell is doing."""


def measured(folder: Path, cells: Mapping[str, Callable[[Say], Any]], console: Console | None = None) -> dict[str, Any]:
    """Name → results (JSON) of every cell: from its file in ``folder`` where that is there, else measured and kept there."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    with progress(console) as bar:
        task = bar.add_task("loading", total=len(cells))
        for name, measure in cells.items():
            path = folder / f"{name}.json"

            def say(step: str, name: str = name) -> None:
                bar.update(task, description=f"{name}: {step}")

            if not path.is_file():
                say("")
                torch.manual_seed(0)  # whichever cells came before
                keep(path, measure(say))
            found[name] = json.loads(path.read_text())
            bar.advance(task)
    return found


def progress(console: Console | None = None) -> Progress:
    """A bar with what is being done, how many of how many, and the time; on stderr unless told otherwise."""
    columns = (TextColumn("{task.description:40}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    return Progress(*columns, TimeElapsedColumn(), console=console or Console(stderr=True))


def keep(path: Path, content: Any) -> None:
    """Write ``content`` as JSON, whole or not at all."""
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(as_text(content))
    part.replace(path)


def as_text(content: Any) -> str:
    """JSON as it is kept."""
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"
