"""Write the tables of docs/saes.md anew from the registries of architectures and formats.

    python -m tools.sae_tables          rewrite the page
    python -m tools.sae_tables --check  fail if it is out of date

A table stands between ``<!-- NAME -->`` and ``<!-- /NAME -->``.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from sae_weights.coverage import coverage_table, formats_table, reasons_table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "saes.md"
TABLES = {"coverage": coverage_table, "formats": formats_table, "refused": reasons_table}


def rendered(page: str) -> str:
    """The page with every table made anew; ValueError if a marker is missing."""
    for name, table in TABLES.items():
        pattern = re.compile(rf"(<!-- {name} -->).*?(<!-- /{name} -->)", re.DOTALL)
        page, count = pattern.subn(lambda match, table=table: f"{match[1]}\n\n{table()}\n\n{match[2]}", page)
        if count != 1:
            raise ValueError(f"{PAGE}: expected one <!-- {name} --> … <!-- /{name} -->, found {count}")
    return page


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    made = rendered(page)
    if "--check" in sys.argv[1:]:
        sys.exit(0 if page == made else f"{PAGE} is out of date; run python -m tools.sae_tables")
    PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
