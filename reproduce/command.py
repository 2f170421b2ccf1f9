"""The command of a study: its options, and where its results go."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reproduce.cells import as_text
from reproduce.page import refresh
from reproduce.wheel import DataError

DOCS = Path(__file__).resolve().parents[1] / "docs"


@dataclass(frozen=True)
class Command:
    """``make reproduce-NAME``.

    Attributes:
        tables: results → the tables of the study's page.
        draw: draws its picture, if it has one, into the file given.
    """

    name: str
    tables: Callable[[Any], str]
    draw: Callable[[Any, Path], None] | None = None

    @property
    def results(self) -> Path:
        """Where a full run is recorded."""
        return Path(__file__).resolve().parent / self.name / "results.json"

    @property
    def page(self) -> Path:
        """Where its tables are shown."""
        return DOCS / f"reproduce-{self.name}.md"

    @property
    def picture(self) -> Path:
        """Where its picture is."""
        return DOCS / "images" / f"{self.name}.png"

    def parser(self, description: str, quick: str) -> argparse.ArgumentParser:
        """The options of every study; ``quick`` says what little runs under ``--quick``."""
        parser = argparse.ArgumentParser(f"make reproduce-{self.name}", description=description)
        parser.add_argument("--quick", action="store_true", help=f"{quick}: whether it works, no result")
        parser.add_argument(
            "--tables", action="store_true", help="print the tables of the recorded run; measure nothing"
        )
        parser.add_argument("--threads", type=int, help="of the CPU (default: all cores)")
        parser.add_argument(
            "--cache", type=Path, help="folder of finished cells (default: below the cache of the machine)"
        )
        return parser

    def carry_out(self, given: argparse.Namespace, measure: Callable[[], Mapping[str, Any]], full: bool) -> None:
        """Print the tables of what ``measure`` finds, or of the recorded run; record what a ``full`` run found."""
        if given.tables:
            print(self.tables(json.loads(self.results.read_text())))
            return
        if given.threads:
            torch.set_num_threads(given.threads)
        try:
            found = measure()
        except DataError as error:
            sys.exit(f"reproduce-{self.name}: {error}")
        shown = self.tables(found)
        print(shown)
        if not full:
            return
        written = [self.results, self.page]
        self.results.write_text(as_text(found))
        if self.draw is not None:
            self.draw(found, self.picture)
            written.insert(1, self.picture)
        refresh(self.page, shown)
        print(f"written: {', '.join(path.name for path in written)}")
