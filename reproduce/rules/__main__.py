"""``make reproduce-rules``: run the study, print its tables, write results and the tables of its page."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from reproduce.app.data import DataError
from reproduce.page import refresh
from reproduce.rules.run import run
from reproduce.rules.settings import FULL, QUICK
from reproduce.rules.tables import tables

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.json"
PAGE = HERE.parents[1] / "docs" / "reproduce-rules.md"


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        "make reproduce-rules",
        description="Rules over SAE features: multi-hop questions, indirect cues, unsafe requests.",
    )
    parser.add_argument("--quick", action="store_true", help="few questions and texts: whether it works, no result")
    parser.add_argument("--tables", action="store_true", help="print the tables of the recorded run; measure nothing")
    parser.add_argument("--threads", type=int, help="of the CPU (default: all cores)")
    parser.add_argument("--cache", type=Path, help="folder of finished cells (default: below the cache of the machine)")
    given = parser.parse_args()
    if given.tables:
        print(tables(json.loads(RESULTS.read_text())))
        return
    if given.threads:
        torch.set_num_threads(given.threads)
    sizes = QUICK if given.quick else FULL
    try:
        results = run(sizes, given.cache)
    except DataError as error:
        sys.exit(f"reproduce-rules: {error}")
    shown = tables(results)
    print(shown)
    if sizes != FULL:
        return
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    refresh(PAGE, shown)
    print(f"written: {RESULTS.name}, {PAGE.name}")


if __name__ == "__main__":
    main()
