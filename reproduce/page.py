"""The pages of the studies: what a command printed stands between two marks, and is put there by the command."""

from __future__ import annotations

from pathlib import Path

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def refresh(page: Path, written: str) -> None:
    """Put ``written`` between the marks of ``page``.

    Raises:
        ValueError: the page lacks them.
    """
    before, _, rest = page.read_text().partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"{page.name} lacks the marks {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n\n{written.strip()}\n\n{END}{after}")


def shown(page: Path) -> str:
    """What stands between the marks."""
    return page.read_text().partition(BEGIN)[2].partition(END)[0].strip()
