"""The rows of a record as people read them: in a terminal, on a page, in the README."""

from __future__ import annotations

from itertools import groupby

from rich.console import Console
from rich.table import Table

from benchmarks.results import Record, Row, rows
from benchmarks.scenarios import EDITSERVER

NAMES = {"vllm-lens": "vllm-lens 1.3.0", "vanilla-0.30": "vLLM 0.30, no plugin"}
"""Systems other than editserver, as a table calls them."""


def title(row: Row) -> str:
    """The load, with the system in front unless it is editserver."""
    what = "armed, no request edits" if (row.system, row.load) == (EDITSERVER, "idle") else row.title
    return what if row.system == EDITSERVER else f"{NAMES.get(row.system, row.system)}: {what}"


def ratio(row: Row) -> str:
    """The median; for admission what it adds in ms."""
    return f"{row.compared.own:.2f} ms" if row.quantity == "milliseconds" else f"{row.compared.ratio:.3f}"


def ends(row: Row) -> tuple[str, str]:
    """Least and largest ratio over the rounds."""
    if row.quantity == "milliseconds":
        return "", ""
    return f"{row.compared.low:.3f}", f"{row.compared.high:.3f}"


def absolute(row: Row) -> tuple[str, str]:
    """What vanilla did, and what this system did: tok/s, or ms of a step or to the first token."""
    values = (row.compared.baseline, row.compared.own)
    if row.quantity == "throughput":
        first, second = (f"{row.tokens / seconds:.0f} tok/s" for seconds in values)
    elif row.quantity in ("ttft", "step"):
        first, second = (f"{1e3 * seconds:.1f} ms" for seconds in values)
    else:
        first, second = f"{values[0]:.2f} ms", f"{values[0] + values[1]:.2f} ms"
    return first, second


def goal(row: Row) -> str:
    """The goal, or nothing."""
    if row.goal is None:
        return ""
    return f"< {row.goal:g} ms" if row.quantity == "milliseconds" else f"≥ {row.goal:.2f}"


def verdict(row: Row) -> str:
    """Met, or missed and by how much."""
    if row.met is None:
        return ""
    if row.met:
        return "met"
    unit = f"{row.missed_by:.2f} ms" if row.quantity == "milliseconds" else f"{row.missed_by:.3f}"
    return f"missed by {unit}"


def show(record: Record, console: Console) -> None:
    """The record as one table."""
    table = Table(
        title=f"Against vanilla vLLM: {record['model']}, {record['machine']['cpu']}, {record['machine']['cores']} cores"
    )
    for heading in ("", "vanilla", "this", "ratio (median)", "min", "max", "goal", ""):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=bool(heading))
    for name, scenario in groupby(rows(record), lambda row: row.scenario_title):
        table.add_row(f"[bold]{name}[/bold]")
        for row in scenario:
            colour = {True: "green", False: "red", None: ""}[row.met]
            said = f"[{colour}]{verdict(row)}[/{colour}]" if colour else ""
            table.add_row(f"  {title(row)}", *absolute(row), ratio(row), *ends(row), goal(row), said)
    console.print(table)
