"""``make reproduce-app``: run the study, print its tables, write results, picture and the tables of its page."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from reproduce.app.data import DataError
from reproduce.app.plot import draw
from reproduce.app.run import run
from reproduce.app.settings import FULL, QUICK
from reproduce.app.tables import tables
from reproduce.page import refresh

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.json"
PICTURE = HERE.parents[1] / "docs" / "images" / "app.png"
PAGE = HERE.parents[1] / "docs" / "reproduce-app.md"


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        "make reproduce-app", description="What it costs to take a concept away: mask, range, attenuate, APP."
    )
    parser.add_argument(
        "--quick", action="store_true", help="one set, one seed, few texts: whether it works, no result"
    )
    parser.add_argument("--tables", action="store_true", help="print the tables of the recorded run; measure nothing")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the model (default bfloat16, as served)")
    parser.add_argument("--threads", type=int, help="of the CPU (default: all cores)")
    parser.add_argument("--cache", type=Path, help="folder of finished cells (default: below the cache of the machine)")
    given = parser.parse_args()
    if given.tables:
        print(tables(json.loads(RESULTS.read_text())))
        return
    if given.threads:
        torch.set_num_threads(given.threads)
    sizes = QUICK if given.quick else FULL
    if given.dtype:
        sizes = replace(sizes, dtype=given.dtype)
    try:
        results = run(sizes, given.cache)
    except DataError as error:
        sys.exit(f"reproduce-app: {error}")
    shown = tables(results)
    print(shown)
    if sizes != FULL:
        return
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    draw(results, PICTURE)
    refresh(PAGE, shown)
    print(f"written: {RESULTS.name}, {PICTURE.name}, {PAGE.name}")


if __name__ == "__main__":
    main()
