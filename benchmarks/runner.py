"""One run: start what a group of scenarios needs, let the systems take turns, keep every turn."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

from benchmarks.admission import measure
from benchmarks.http_systems import HttpSystem
from benchmarks.processes import Family
from benchmarks.results import PARTS
from benchmarks.rounds import BASELINE, turns
from benchmarks.scenarios import EDITSERVER, OLDER, VANILLA, Ask, Group, Load, Scenario
from benchmarks.systems import Bench, EngineSystem

PLAIN = Load("idle", "no request edits", Ask.NOTHING)


class System(Protocol):
    """Something that loads are put to."""

    family: Family

    def wait_ready(self) -> dict[str, str]: ...
    def run(self, scenario: Scenario, load: Load, salt: int) -> dict[str, Any]: ...
    def close(self) -> None: ...


@dataclass
class Plan:
    """What is to be measured.

    Attributes:
        systems: names of those that take part, vanilla first.
        starts: how often vanilla and editserver are started, each time in another order; peers only the first time.
        rounds: of each start that count; one more warms up.
        record: versions of every system that was started.
        failures: what could not be measured, and why.
    """

    scenarios: Sequence[Scenario]
    systems: Sequence[str]
    rounds: int
    starts: int = 1
    record: dict[str, dict[str, str]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def groups(self) -> list[tuple[Group, list[Scenario]]]:
        """Scenarios by the processes they need, in the order of :class:`Group`."""
        by_group = [(group, [s for s in self.scenarios if s.group is group]) for group in Group]
        return [(group, found) for group, found in by_group if found]

    def entries(self, scenario: Scenario) -> dict[str, tuple[str, Load]]:
        """Entry (``system/load``) → system and load."""
        return {
            f"{system}/{load.id}": (system, load)
            for load in scenario.loads
            for system in load.systems
            if system in self.systems
        }

    @property
    def n_turns(self) -> int:
        """Runs in all, warm-ups included; admission is one."""
        n = 0
        for one in self.scenarios:
            if one.group is Group.ADMISSION:
                n += 1
                continue
            for start in range(self.starts):
                entries = [e for e, (system, _) in self.entries(one).items() if system in self.taking_part(start)]
                n += (self.rounds * one.times + 1) * len(turns(entries, 0)) if entries else 0
        return n

    def taking_part(self, start: int) -> list[str]:
        """The systems of one start, in the order in which they are started: whoever is first finds memory in another state."""
        both = [name for name in self.systems if not start or name in (VANILLA, EDITSERVER)]
        shift = start % len(both)
        return [*both[shift:], *both[:shift]]


class Progress(Protocol):
    """What a run tells while it goes on."""

    def __call__(self, what: str, advance: int = 0) -> None: ...


def run(plan: Plan, bench: Bench, progress: Progress) -> Iterator[dict[str, Any]]:
    """The scenarios' parts of the record, group by group, each as soon as it is measured.

    What cannot be measured is noted in ``plan.failures``, and the next group goes on.
    """
    for group, scenarios in plan.groups():
        try:
            if group is Group.ADMISSION:
                for one in scenarios:
                    yield _admission(one, plan, bench, progress)
                continue
            yield from _group(group, scenarios, plan, bench, progress)
        except Exception as error:  # what was measured is worth keeping, and the other groups too
            plan.failures.append(f"{group}: {type(error).__name__}: {error}")


def _group(
    group: Group, scenarios: Sequence[Scenario], plan: Plan, bench: Bench, progress: Progress
) -> Iterator[dict[str, Any]]:
    """Every scenario as soon as it is measured, and again with each further start of the systems."""
    wanted = {system for one in scenarios for system, _ in plan.entries(one).values()} | {VANILLA}
    found = {one.id: _Found() for one in scenarios}
    for start in range(plan.starts):
        names = [name for name in plan.taking_part(start) if name in wanted]
        if start and EDITSERVER not in names:
            return
        with ExitStack() as running:
            systems = _start(group, names, plan, bench, progress, running)
            for one in scenarios:
                _scenario(one, plan, systems, progress, found[one.id])
                if found[one.id].rounds:
                    yield _described(one, found[one.id])


@dataclass
class _Found:
    """What a scenario has given so far.

    Attributes:
        entries: those that ran.
        starts: how many rounds each start had.
        said: the first tokens of each entry's answers, in the first start.
    """

    entries: dict[str, tuple[str, Load]] = field(default_factory=dict)
    rounds: list[list[dict[str, Any]]] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    said: dict[str, list[list[int]]] = field(default_factory=dict)


def _start(
    group: Group, names: Iterable[str], plan: Plan, bench: Bench, progress: Progress, running: ExitStack
) -> dict[str, System]:
    systems: dict[str, System] = {}
    for name in names:
        systems[name] = HttpSystem(name, bench) if group is Group.HTTP else EngineSystem(name, group, bench)
        running.callback(systems[name].close)
    for name, system in list(systems.items()):
        progress(f"{group}: {name} starts (the first time it compiles the model) …")
        try:
            versions = system.wait_ready()
        except RuntimeError as error:
            if name in (VANILLA, EDITSERVER):
                raise
            del systems[name]  # a peer that does not run here does not keep the others from running
            plan.failures.append(f"{group}: {name}: {error}")
        else:
            plan.record[name] = plan.record.get(name, {}) | versions
    return systems


def _scenario(scenario: Scenario, plan: Plan, systems: dict[str, System], progress: Progress, found: _Found) -> None:
    entries = {entry: one for entry, one in plan.entries(scenario).items() if one[0] in systems}
    if not entries:
        return
    known = {BASELINE: (VANILLA, PLAIN), **entries}
    said: dict[str, list[list[int]]] = {}
    salt = 1000 * len(found.starts)
    found.starts.append(0)
    n_rounds = plan.rounds * scenario.times
    for round_ in range(n_rounds + 1):
        order = []
        for entry in turns(list(entries), round_):
            system, load = known[entry]
            progress(f"{scenario.id}, round {round_} of {n_rounds}: {entry}", 0)
            salt += 1
            for name, other in systems.items():
                if name != system:
                    other.family.hold()
            systems[system].family.release()
            measured = systems[system].run(scenario, load, salt)
            said[entry] = measured.pop("first_tokens", [])
            order.append({"entry": entry} | {key: _rounded(value) for key, value in measured.items()})
            progress(f"{scenario.id}, round {round_} of {n_rounds}: {entry}", 1)
        if round_:  # the first one warms up
            found.rounds.append(order)
            found.starts[-1] += 1
    _check_edited(scenario, entries, said)
    found.entries |= entries
    found.said = said | found.said


def _check_edited(scenario: Scenario, entries: dict[str, tuple[str, Load]], said: dict[str, list[list[int]]]) -> None:
    """A peer that has no receipts has answered otherwise than it does unedited."""
    for entry, (system, load) in entries.items():
        if load.ask is Ask.VECTORS and said[entry] == said.get(f"{system}/idle", said[BASELINE]):
            raise RuntimeError(f"{scenario.id}: {entry} answered as if nothing had been edited")


def _described(scenario: Scenario, found: _Found) -> dict[str, Any]:
    loads, said = [], found.said
    for entry, (system, load) in found.entries.items():
        # A goal is editserver's; what others reach is only reported.
        goal = load.goal if system == EDITSERVER else None
        line: dict[str, Any] = {"entry": entry, "system": system, "load": load.id, "title": load.title, "goal": goal}
        ours = said.get(f"{EDITSERVER}/{load.id}")
        if system not in (EDITSERVER, OLDER) and load.ask is not Ask.NOTHING and ours:
            same = [a == b for a, b in zip(ours, said[entry], strict=True)]
            line["agreement"] = statistics.fmean(same)
        loads.append(line)
    return {
        "id": scenario.id,
        "short": scenario.short,
        "title": scenario.title,
        "quantity": scenario.quantity,
        "requests": scenario.n_requests,
        "tokens": scenario.tokens,
        "loads": loads,
        "starts": list(found.starts),
        "rounds": list(found.rounds),
    }


def _admission(scenario: Scenario, plan: Plan, bench: Bench, progress: Progress) -> dict[str, Any]:
    progress(f"{scenario.id}: an engine with its core in one process …")
    took = measure(bench.model, bench.dtype, bench.cache, scenario.n_requests, bench.logs / "admission.log")
    entries = plan.entries(scenario)
    (entry,) = entries
    totals = {kind: [sum(parts) for parts in zip(*(took[kind][p] for p in PARTS), strict=True)] for kind in took}
    rounds = [
        [
            {"entry": BASELINE, "milliseconds": _rounded(plain / 1e3)},
            {"entry": entry, "milliseconds": _rounded(edited / 1e3)}
            | {part: _rounded(took["edited"][part][i] / 1e3) for part in PARTS},
        ]
        for i, (plain, edited) in enumerate(zip(totals["plain"], totals["edited"], strict=True))
    ]
    progress(f"{scenario.id}: done", 1)
    return _described(scenario, _Found(entries, rounds, [len(rounds)]))


def _rounded(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value
