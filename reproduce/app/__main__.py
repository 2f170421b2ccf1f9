"""``make reproduce-app``: run the study, print its tables, write results, picture and the tables of its page."""

from __future__ import annotations

from dataclasses import replace

from reproduce.app.plot import draw
from reproduce.app.run import run
from reproduce.app.settings import FULL, QUICK
from reproduce.app.tables import tables
from reproduce.command import Command

COMMAND = Command("app", tables, draw)


def main() -> None:
    """Parse the command line and run."""
    parser = COMMAND.parser(
        "What it costs to take a concept away: mask, range, attenuate, APP.", "one set, one seed, few texts"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the model (default bfloat16, as served)")
    given = parser.parse_args()
    sizes = QUICK if given.quick else FULL
    if given.dtype:
        sizes = replace(sizes, dtype=given.dtype)
    COMMAND.carry_out(given, lambda: run(sizes, given.cache), sizes == FULL)


if __name__ == "__main__":
    main()
