"""What can be read and edited: architecture × format, from the two registries."""

from __future__ import annotations

from collections.abc import Sequence

from .architectures import ARCHITECTURES, Architecture
from .formats import FORMATS, Format

EXACT_BY_ROW = "edit exact"
EXACT_BY_FULL_ENCODE = "edit exact, full encode"
READ_ONLY = "read"
REFUSED = "refused"

_MARKS = {EXACT_BY_ROW: "R", EXACT_BY_FULL_ENCODE: "F", READ_ONLY: "r", REFUSED: "✗"}


def status(architecture: Architecture, of: Format) -> str | None:
    """What a server does with this architecture in this format; None where the format never holds it."""
    if architecture.name not in of.architectures:
        return None
    if architecture.execution == "sequence":
        return REFUSED
    if not of.edited or architecture.several_places:
        return READ_ONLY
    return EXACT_BY_ROW if architecture.row_separable else EXACT_BY_FULL_ENCODE


def coverage_table() -> str:
    """Markdown: one line per architecture, one column per format, and the formats' legend."""
    columns: Sequence[Format] = FORMATS
    head = "| architecture | execution | approximate | " + " | ".join(str(i + 1) for i in range(len(columns))) + " |"
    rule = "| --- | --- | --- |" + " :-: |" * len(columns)
    lines = [head, rule]
    for name, architecture in sorted(ARCHITECTURES.items()):
        cells = [status(architecture, one) for one in columns]
        marks = ["" if cell is None else mark(architecture, cell) for cell in cells]
        execution = {"row": "row by row", "dictionary": "full encode", "sequence": "refused"}[architecture.execution]
        if architecture.several_places:
            execution = "read only"
        approximate = "calibrated threshold" if architecture.thresholdable else ""
        lines.append(f"| {architecture.title} (`{name}`) | {execution} | {approximate} | " + " | ".join(marks) + " |")
    return "\n".join(lines)


def mark(architecture: Architecture, cell: str) -> str:
    """The table's sign for a status; ``~`` is added where a calibrated threshold is offered as an approximation."""
    return _MARKS[cell] + ("~" if architecture.thresholdable and cell != READ_ONLY else "")


def formats_table() -> str:
    """Markdown: number, name, what lies on disk, and where the layout is defined."""
    lines = ["| | format | on disk | defined by |", "| --- | --- | --- | --- |"]
    for i, one in enumerate(FORMATS):
        lines.append(f"| {i + 1} | {one.title} (`{one.name}`) | {one.files} | {one.reference} |")
    return "\n".join(lines)


def reasons_table() -> str:
    """Markdown: the architectures that are refused, and why."""
    refused = [form for form in ARCHITECTURES.values() if form.execution == "sequence"]
    return "\n".join(f"- {form.title} (`{form.name}`): {form.why_not}." for form in refused)
