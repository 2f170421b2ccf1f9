"""The programs of the requests that a worker knows, as flat tables that a kernel can walk.

A request enters when it is first scheduled and leaves when it finishes; the tables change only then, never per step, and
only as far as that request goes. A request that comes back after preemption is still resident.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from editserver.engine.history import History
from editserver.engine.layer_table import LayerPart, LayerTable
from editserver.engine.read_table import ReadPart, ReadTable
from editserver.engine.rows import Dictionaries
from editserver.engine.rule_table import ResidentRules, RuleRun
from editserver.engine.selector_table import SelectorPart, SelectorTable
from editserver.engine.stack import Stack
from interventions.limits import MAX_GATES, MAX_SELECTORS
from interventions.program import LayerProgram, Payload, Read
from interventions.selectors import Selector

if TYPE_CHECKING:
    from editserver.engine.gates import Tracks

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Resident:
    """One request as the worker sees it.

    Attributes:
        slots: row key → slot of the bank.
        history: its tokens, where a selector looks back.
        tracks: (layer, gate number) → state of the gate, from the first step on; gone with the request.
        rules: the state of its rules; None without any.
    """

    request_id: str
    payload: Payload
    prompt_len: int
    slots: dict[str, int]
    history: History | None = None
    tracks: dict[tuple[int, int], Tracks] = field(default_factory=dict)
    rules: RuleRun | None = None

    @property
    def selectors(self) -> tuple[Selector, ...]:
        """The program's selectors, then one per inspection."""
        return self.payload.selectors

    @cached_property
    def edited(self) -> tuple[int, ...]:
        """The program's layers."""
        program = self.payload.program
        return tuple(lp.layer for lp in program.layers) if program else ()

    @cached_property
    def sequence_gates(self) -> tuple[tuple[int, int], ...]:
        """(layer, gate number) of all that records speak of."""
        layers = self.payload.program.layers if self.payload.program else ()
        return tuple((lp.layer, i) for lp in layers for i, gate in enumerate(lp.gates) if gate.over_sequence)

    def read_bit(self, read: int) -> np.uint64:
        """The selector bit of inspection ``read``."""
        program = self.payload.program
        return np.uint64(1) << np.uint64((len(program.selectors) if program else 0) + read)

    def layer(self, layer: int) -> LayerProgram | None:
        """The channels at ``layer``, if there are any."""
        program = self.payload.program
        return next((lp for lp in program.layers if lp.layer == layer), None) if program else None


@dataclass(frozen=True)
class _Parts:
    """One request's own part of every table, made once."""

    resident: Resident
    layers: dict[int, LayerPart]
    selectors: SelectorPart
    reads: dict[tuple[int, bool], ReadPart]

    @classmethod
    def of(cls, resident: Resident, dictionaries: Dictionaries) -> _Parts:
        """All of them."""
        layers, reads = _located(resident, dictionaries)
        return cls(resident, layers, SelectorPart.of(resident.selectors, resident.prompt_len), reads)


_LOCATED = "editserver_located"
"""Attribute of a payload that has been resident: the dictionaries and slots, and what :func:`_located` made of them."""


def _located(
    resident: Resident, dictionaries: Dictionaries
) -> tuple[dict[int, LayerPart], dict[tuple[int, bool], ReadPart]]:
    """What the request does at each layer, and lists there.

    Requests that edit alike share a payload, and their rows mostly lie where the last one's did: then this is made once.
    """
    payload, slots = resident.payload, resident.slots
    known = payload.__dict__.get(_LOCATED)
    if known is not None and known[0] is dictionaries and known[1] == slots:
        return known[2], known[3]
    layers = {
        lp.layer: LayerPart.of(resident, lp, dictionaries) for lp in (payload.program.layers if payload.program else ())
    }
    where = {(read.layer, read.after) for read in payload.reads}
    found = {place: ReadPart.of(resident, *place, dictionaries) for place in where}
    reads = {place: part for place, part in found.items() if part is not None}
    payload.__dict__[_LOCATED] = dictionaries, slots, layers, reads
    return layers, reads


class ResidentSet:
    """The resident requests and their tables: as of the latest :meth:`refresh`, but for ``requests`` itself.

    Attributes:
        requests: by request id, in the order of their arrival.
        index: request id → resident index: the place in that order.
        layers: armed layer → its table; None where no resident program touches it.
        selectors: of all residents.
        dose, refuses: of all residents, bound on ||delta||/||h|| (inf: none), and whether exceeding it is an error.
        reads: layer → (resident index, inspection number, inspection).
        listed: (layer, after the edit) → those of them that :class:`ReadTable` holds.
        rules: of all residents.
        due: layers whose op must run in every step.
        remembers: whether anything about some request is kept along with the KV cache.
        version: goes up whenever the tables change.
    """

    def __init__(self, dictionaries: Dictionaries, armed: tuple[int, ...]) -> None:
        self.dictionaries = dictionaries
        self.armed = armed
        self.requests: dict[str, Resident] = {}
        self.index: dict[str, int] = {}
        self.version = 0
        self._tables = {layer: LayerTable() for layer in armed}
        self.layers: dict[int, LayerTable | None] = {}
        self.selectors = SelectorTable()
        self._dose, self._refuses = Stack(np.float32), Stack(np.bool_)
        self.dose, self.refuses = self._dose.rows, self._refuses.rows
        self.reads: dict[int, list[tuple[int, int, Read]]] = {}
        self.listed: dict[tuple[int, bool], ReadTable] = {}
        self.rules = ResidentRules.build([], armed, dictionaries)
        self.due: frozenset[int] = frozenset()
        self.remembers = False
        self._readers: set[str] = set()
        self._ruled: set[str] = set()
        self._parts: dict[str, _Parts] = {}
        self._placed: list[_Parts] = []
        """In the order of the tables."""
        self._stale = self._gone = False

    def add(self, resident: Resident) -> None:
        """A request that will be scheduled from now on (again, after a re-send)."""
        if len(resident.selectors) > MAX_SELECTORS:
            raise ValueError(f"{len(resident.selectors)} selectors in one request; the engine takes {MAX_SELECTORS}")
        program = resident.payload.program
        if program and any(len(lp.gates) > MAX_GATES for lp in program.layers):
            raise ValueError(f"more than {MAX_GATES} gates at a layer of one request")
        parts = _Parts.of(resident, self.dictionaries)
        self.remove(resident.request_id)  # it comes behind the others
        self.requests[resident.request_id], self._parts[resident.request_id] = resident, parts
        if resident.payload.reads:
            self._readers.add(resident.request_id)
        if resident.rules is not None:
            self._ruled.add(resident.request_id)
        self._stale = True

    def remove(self, request_id: str) -> None:
        """A request that finished or was aborted; unknown ids are ignored."""
        if self.requests.pop(request_id, None) is not None:
            del self._parts[request_id]
            self._readers.discard(request_id)
            self._ruled.discard(request_id)
            self._stale = self._gone = True

    @property
    def stale(self) -> bool:
        """Whether :meth:`refresh` has something to do."""
        return self._stale

    def refresh(self) -> None:
        """Bring the tables up to date if the set changed."""
        if not self._stale:
            return
        if self._gone:
            self._drop([self._parts.get(one.resident.request_id) is one for one in self._placed])
        self._push(list(itertools.islice(self._parts.values(), len(self._placed), None)))
        self._finish()
        self._stale = self._gone = False

    def _drop(self, stay: list[bool]) -> None:
        """Take those out of the tables who are not to stay."""
        tables: list[LayerTable | SelectorTable | Stack] = [*self._tables.values(), self.selectors]
        tables += self._dose, self._refuses
        self._placed = [one for one, stays in zip(self._placed, stay, strict=True) if stays]
        if not self._placed:
            for table in tables:
                table.clear()
            return
        which = np.array(stay, np.bool_)
        for table in tables:
            table.keep(which)

    def _push(self, arrived: list[_Parts]) -> None:
        if not arrived:
            return
        self._placed += arrived
        for layer, table in self._tables.items():
            table.push([parts.layers.get(layer) for parts in arrived])
        self.selectors.push([parts.selectors for parts in arrived])
        programs = [parts.resident.payload.program for parts in arrived]
        self._dose.push([np.array([np.inf if p is None else p.max_dose for p in programs], np.float32)])
        self._refuses.push([np.array([p is not None and p.refuse_over_dose for p in programs], np.bool_)])

    def _finish(self) -> None:
        # requests are in the order of the tables; of hundreds, nobody is looked at who has nothing to do here
        self.index = dict(zip(self.requests, range(len(self.requests)), strict=True))
        for table in self._tables.values():
            table.finish()
        self.layers = {layer: table or None for layer, table in self._tables.items()}
        self.selectors.finish()
        self.dose, self.refuses = self._dose.rows, self._refuses.rows
        if self._ruled or len(self.rules.prompt_len):
            residents = list(self.requests.values()) if self._ruled else []
            self.rules = ResidentRules.build(residents, self.armed, self.dictionaries)
        self.reads, self.listed = {layer: [] for layer in self.armed}, {}
        if self._readers:
            self._list_reads()
        self.due = frozenset(layer for layer in self.armed if self.layers[layer] or self.rules.tables[layer])
        self.remembers = bool(self._ruled) or any(table.listeners for table in self._tables.values())
        self.version += 1

    def _list_reads(self) -> None:
        readers = [(self.index[name], self._parts[name]) for name in self.requests if name in self._readers]
        for i, parts in readers:
            for number, read in enumerate(parts.resident.payload.reads):
                self.reads[read.layer].append((i, number, read))
        places = {place for _, parts in readers for place in parts.reads}
        found = {place: ReadTable.of([parts.reads.get(place) for parts in self._placed]) for place in places}
        self.listed = {place: table for place, table in found.items() if table is not None}

    @property
    def dose_addresses(self) -> tuple[int, int]:
        """Of ``dose`` and ``refuses``, until the next change."""
        return self._dose.at, self._refuses.at

    def columns(self, request_index: int, layer: int, after: bool) -> dict[int, tuple[int, int]]:
        """Inspection number → its columns of what :attr:`listed` says; those that need whole dictionaries are not there."""
        part = self._placed[request_index].reads.get((layer, after))
        return part.columns if part is not None else {}
