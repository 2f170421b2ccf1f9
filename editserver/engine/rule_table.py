"""The rules of all resident requests at one layer, as the flat tables of :mod:`editserver.engine.kernel_rules`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from editserver.engine.kernel_rules import CLOSED_CONCLUSION, PROMPT_MEMORY
from editserver.engine.rows import Dictionaries
from interventions.program import GateKind, Program, parse_feature_key
from interventions.rules.code import Code, MemoryCode, MemoryKind, OpCode, RuleProgram

if TYPE_CHECKING:
    from editserver.engine.resident import Resident

Array = npt.NDArray[Any]
OPERANDS = {OpCode.NOT: 1, OpCode.AND: 2, OpCode.OR: 2, OpCode.XOR: 2}


def _cells_of(memory: MemoryCode) -> int:
    return 1 + (memory.window + 63) // 64 if memory.kind is MemoryKind.WINDOW else 1


class RuleRun:
    """One request's rules, and what its tokens so far have left behind.

    Attributes:
        program: the rules.
        cells: state, int64: of every memory, every latch, every action. A view into the cells of all residents.
        before: as it was before the latest step; likewise.
        next: position of the token that continues the state; -1 while a step is under way.
        first: position of the first token of the latest step: it continues ``before``.
        words: 64-bit words for the bits of all propositions, conclusions and actions.
    """

    def __init__(self, program: RuleProgram) -> None:
        self.program = program
        self.next = self.first = 0
        sizes = [_cells_of(memory) for memory in program.memories]
        self._memories = np.cumsum([0, *sizes]).tolist()
        self._actions = self._memories[-1] + len(program.conclusions)
        self.cells: Array = np.zeros(self._actions + len(program.actions), np.int64)
        self.before: Array = self.cells.copy()
        self.words = tuple(
            (len(part) + 63) // 64 for part in (program.propositions, program.conclusions, program.actions)
        )

    @classmethod
    def of(cls, program: Program | None) -> RuleRun | None:
        """None where there are no rules."""
        return cls(program.rules) if program is not None and program.rules is not None else None

    def go_to(self, position: int) -> int:
        """Bring the state to ``position``, or to where it is known before; how many tokens are missing from there on.

        A step may have run over drafts that were rejected: then the state before that step counts.
        """
        if self.next == position and position:
            return 0
        if self.next < 0 or self.first > position:
            self.cells[:] = 0
            return position
        self.cells[:] = self.before
        return position - self.first

    def memory_cell(self, number: int) -> int:
        """First cell of a memory."""
        return int(self._memories[number])

    def latch_cell(self, number: int) -> int:
        """Cell of a conclusion."""
        return int(self._memories[-1]) + number

    def action_cell(self, number: int) -> int:
        """Cell of an action."""
        return int(self._actions) + number


@dataclass(frozen=True)
class Whole:
    """Features of one request at one layer that need all activations of one SAE: latents, and columns of ``acts``."""

    digest: str
    features: Array
    columns: Array


@dataclass
class RuleTable:
    """Everything that rules read, decide and open at one layer; ``stage`` and ``gates`` as :func:`run_stage` takes them."""

    feature_ptr: Array
    feature_slot: Array
    feature_norm: Array
    n_columns: int
    wholes: dict[int, list[Whole]]
    """Resident index → what it needs of whole dictionaries."""
    n_words: int
    """Of the bits that are kept by KV slot."""
    pointers: Array
    stage: tuple[Array, ...]
    gates: Array
    depth: int

    @classmethod
    def build(
        cls, residents: Sequence[Resident], layer: int, dictionaries: Dictionaries, bases: Sequence[int]
    ) -> RuleTable | None:
        """The table of ``layer``, or None when rules neither decide nor open anything there.

        ``bases[i]`` is where the cells of resident i begin among those of all residents.
        """
        made = _Rows()
        for index, resident in enumerate(residents):
            if resident.rules is not None:
                made.add(index, resident, resident.rules, layer, dictionaries, bases[index])
            made.close()
        return made.table()


@dataclass
class _Rows:
    """A table in the making, row by row."""

    features: list[tuple[int, int]] = field(default_factory=list)
    feature_ptr: list[int] = field(default_factory=lambda: [0])
    wholes: dict[int, list[Whole]] = field(default_factory=dict)
    propositions: list[tuple[int, ...]] = field(default_factory=list)
    thresholds: list[float] = field(default_factory=list)
    terms: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    branches: list[tuple[int, ...]] = field(default_factory=list)
    branch_values: list[tuple[float, float]] = field(default_factory=list)
    memories: list[tuple[int, ...]] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    codes: list[tuple[int, int]] = field(default_factory=list)
    rules: list[tuple[int, ...]] = field(default_factory=list)
    conclusions: list[tuple[int, int]] = field(default_factory=list)
    actions: list[tuple[int, ...]] = field(default_factory=list)
    gates: list[tuple[int, int]] = field(default_factory=list)
    pointers: list[tuple[int, ...]] = field(default_factory=lambda: [(0,) * 6])
    depth: int = 1

    def add(
        self, index: int, resident: Resident, run: RuleRun, layer: int, dictionaries: Dictionaries, base: int
    ) -> None:
        """One request."""
        program = run.program
        columns: dict[str, int] = {}
        whole: dict[str, list[tuple[int, int]]] = {}
        for number, one in enumerate(program.propositions):
            if one.layer != layer:
                continue
            for key in one.features:
                if key in columns:
                    continue
                columns[key] = len(columns)
                digest, feature = parse_feature_key(key)
                if one.whole:
                    whole.setdefault(digest, []).append((feature, columns[key]))
                self.features.append((-1 if one.whole else resident.slots[key], dictionaries.input_norm(digest)))
            self._proposition(number, one.strict, one.threshold, [columns[key] for key in one.features], one)
        if whole:
            self.wholes[index] = [
                Whole(digest, *(np.array([pair[i] for pair in pairs], np.int64) for i in (0, 1)))
                for digest, pairs in whole.items()
            ]
        for number, memory in enumerate(program.memories):
            if memory.layer == layer:
                self._memory(program, number, memory, base + run.memory_cell(number))
        for rule in program.rules:
            if program.conclusions[rule.head].layer == layer:
                self.rules.append((rule.group, rule.head, *self._code(program, rule.body)))
        for number, conclusion in enumerate(program.conclusions):
            if conclusion.layer == layer:
                self.conclusions.append((number, base + run.latch_cell(number) if conclusion.latch else -1))
        for number, action in enumerate(program.actions):
            if program.conclusions[action.conclusion].layer == layer:
                self.actions.append((number, action.conclusion, action.tokens, base + run.action_cell(number)))
        edited = resident.layer(layer)
        for number, gate in enumerate(edited.gates if edited else ()):
            if gate.kind is GateKind.RULE:
                self.gates.append((number, gate.action))

    def close(self) -> None:
        """The request is complete."""
        self.feature_ptr.append(len(self.features))
        rows: Iterable[Sequence[Any]] = (
            self.propositions,
            self.memories,
            self.rules,
            self.conclusions,
            self.actions,
            self.gates,
        )
        self.pointers.append(tuple(len(part) for part in rows))

    def _proposition(self, number: int, strict: bool, threshold: float, columns: list[int], one: Any) -> None:
        if one.tree:
            first, last = len(self.branches), len(self.branches) + len(one.tree)
            for branch in one.tree:
                column = columns[branch.feature] if branch.feature >= 0 else -1
                self.branches.append((column, branch.strict, branch.then, branch.other))
                self.branch_values.append((branch.threshold, branch.value))
        else:
            first, last = len(self.terms), len(self.terms) + len(columns)
            self.terms += columns
            self.weights += one.weights
        self.propositions.append((number, strict, not one.tree, first, last))
        self.thresholds.append(threshold)

    def _memory(self, program: RuleProgram, number: int, memory: MemoryCode, cell: int) -> None:
        first = len(self.parts)
        for part in memory.parts:
            self.parts.append(self._code(program, part)[0])
        last = len(self.parts)
        self.parts.append(len(self.codes))
        numbers = (memory.least, memory.share, memory.window)
        self.memories.append((number, int(memory.kind), memory.over_prompt, *numbers, cell, first, last))

    def _code(self, program: RuleProgram, code: Code) -> tuple[int, int]:
        """Its first and last place among the codes."""
        first, height = len(self.codes), 0
        for op, argument in code:
            height += 1 - OPERANDS.get(OpCode(op), 0)
            self.depth = max(self.depth, height)
            if op == OpCode.MEMORY and program.memories[argument].over_prompt:
                op = PROMPT_MEMORY
            elif op == OpCode.CONCLUSION and program.conclusions[argument].closed:
                op = CLOSED_CONCLUSION
            self.codes.append((int(op), argument))
        return first, len(self.codes)

    def table(self) -> RuleTable | None:
        """All of it; None where it is empty."""
        if not any(self.pointers[-1]):
            return None
        pointers = np.array(self.pointers, np.int64)

        def rows(values: Sequence[Any], width: int) -> Array:
            return np.array(values, np.int64).reshape(-1, width)

        return RuleTable(
            np.array(self.feature_ptr, np.int64),
            np.array([slot for slot, _ in self.features], np.int64),
            np.array([norm for _, norm in self.features], np.int64),
            int(np.diff(self.feature_ptr).max()),
            self.wholes,
            (int(np.diff(pointers[:, 0]).max()) + 63) // 64,
            pointers,
            (
                rows(self.propositions, 5),
                np.array(self.thresholds, np.float32),
                np.array(self.terms, np.int64),
                np.array(self.weights, np.float32),
                rows(self.branches, 4),
                np.array(self.branch_values, np.float32).reshape(-1, 2),
                rows(self.memories, 9),
                np.array(self.parts, np.int64),
                rows(self.codes, 2),
                rows(self.rules, 4),
                rows(self.conclusions, 2),
                rows(self.actions, 4),
            ),
            rows(self.gates, 2),
            self.depth,
        )


@dataclass
class ResidentRules:
    """The rules of the resident requests, by layer, and their state.

    Attributes:
        tables: armed layer → its table, None where rules neither decide nor open anything.
        cells, before: the state of all, now and before the latest step; each request's run holds a view.
        prompt_len, n_propositions: int64 ``[residents]``.
        words: most 64-bit words that one request needs for propositions, memories, conclusions, actions.
    """

    tables: dict[int, RuleTable | None]
    cells: Array
    before: Array
    prompt_len: Array
    n_propositions: Array
    words: tuple[int, int, int, int]

    @classmethod
    def build(cls, residents: Sequence[Resident], armed: Sequence[int], dictionaries: Dictionaries) -> ResidentRules:
        """Tables of the resident requests; their states move into new cells."""
        runs = [resident.rules for resident in residents]
        if not any(runs):
            none = np.zeros(0, np.int64)
            return cls(dict.fromkeys(armed), none, none, none, none, (1, 1, 1, 1))
        sizes = [len(run.cells) if run else 0 for run in runs]
        bases = np.cumsum([0, *sizes]).tolist()
        cells, before = (np.zeros(bases[-1], np.int64) for _ in range(2))
        for base, run in zip(bases, runs, strict=False):
            if run is not None:
                here = slice(base, base + len(run.cells))
                cells[here], before[here] = run.cells, run.before
                run.cells, run.before = cells[here], before[here]
        programs = [run.program for run in runs if run is not None]
        parts = [(p.propositions, p.memories, p.conclusions, p.actions) for p in programs]
        words = [max(1, *((len(part[i]) + 63) // 64 for part in parts)) for i in range(4)]
        return cls(
            {layer: RuleTable.build(residents, layer, dictionaries, bases) for layer in armed},
            cells,
            before,
            np.array([resident.prompt_len for resident in residents], np.int64),
            np.array([len(run.program.propositions) if run else 0 for run in runs], np.int64),
            (words[0], words[1], words[2], words[3]),
        )
