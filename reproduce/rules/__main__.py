"""``make reproduce-rules``: run the study, print its tables, write results and the tables of its page."""

from __future__ import annotations

from reproduce.command import Command
from reproduce.rules.run import run
from reproduce.rules.settings import FULL, QUICK
from reproduce.rules.tables import tables

COMMAND = Command("rules", tables)


def main() -> None:
    """Parse the command line and run."""
    given = COMMAND.parser(
        "Rules over SAE features: multi-hop questions, indirect cues, unsafe requests.", "few questions and texts"
    ).parse_args()
    sizes = QUICK if given.quick else FULL
    COMMAND.carry_out(given, lambda: run(sizes, given.cache), sizes == FULL)


if __name__ == "__main__":
    main()
