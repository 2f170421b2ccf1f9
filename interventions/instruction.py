"""One op of a program before selectors are numbered and equal rows meet in one channel."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import numpy as np
from msgspec.structs import replace

from interventions.errors import InterventionError
from interventions.float32 import float32
from interventions.program import Channel, Gate, GateKind, LayerProgram, Op, OpKind, Program, ReadKind, UnitKind
from interventions.rules.code import RuleProgram
from interventions.selectors import Selector
from interventions.spec import FeatureEdit

_LARGEST_STATE = 1e6
"""Activations and norms of the residual stream stay below this (attention sinks reach some 10,000)."""
_LARGEST_DELTA = 1e18
"""Its square is still far inside float32."""
_LARGEST_LATENT, _LARGEST_EDITED_LATENT = 1e4, 1e6
"""The same for latents whose decoder multiplies up to three of them: activations, and what an edit may make of them."""


def rounded(value: float) -> float:
    """To the nearest float32 (``inf`` beyond its range), never -0.0."""
    return float32(value) + 0.0


class Instruction(msgspec.Struct, frozen=True, gc=False):
    """What :class:`~interventions.program.Op` says, with selector, scope and gates themselves in place of their numbers."""

    selector: Selector
    intervention: int
    alpha: float = 1.0
    beta: float = 0.0
    lo: float = -math.inf
    hi: float = math.inf
    only_if_active: bool = False
    kind: OpKind = OpKind.AFFINE
    strength: float = 0.0
    table: str = ""
    gamma: float = 0.0
    source: str = ""
    unit: UnitKind = UnitKind.ABSOLUTE
    mean: str = ""
    scope: Selector | None = None
    gates: tuple[Gate, ...] = ()

    @property
    def is_identity(self) -> bool:
        """Whether no value is changed by it."""
        if self.kind is OpKind.RANGE:
            return self.hi <= 0.0 or self.lo > self.hi
        if self.kind is OpKind.GAIN:
            return self.strength == 0.0
        changes = (self.alpha, self.beta, self.gamma, self.lo, self.hi)
        return changes == (1.0, 0.0, 0.0, -math.inf, math.inf)

    def reach(self, size: float, original: float = 0.0) -> float:
        """The largest |x| after it, of values up to ``size``, sources and units up to ``original``."""
        if self.kind is OpKind.RANGE:
            return size
        if self.kind is OpKind.GAIN:
            return size * max(1.0, self.strength - 1.0)
        unit = 1.0 if self.unit is UnitKind.ABSOLUTE else original
        size = abs(self.alpha) * size + abs(self.beta) * unit + abs(self.gamma) * original
        lowest, highest = min(max(-size, self.lo), self.hi), min(max(size, self.lo), self.hi)
        return max(abs(lowest), abs(highest))

    def renumbered(self, actions: Mapping[int, int]) -> Instruction:
        """The same behind gates that name their actions by other numbers."""
        if not self.gates or not any(gate.kind is GateKind.RULE for gate in self.gates):
            return self
        gates = (
            replace(gate, action=actions[gate.action]) if gate.kind is GateKind.RULE else gate for gate in self.gates
        )
        return replace(self, gates=tuple(gates))

    def op(self, selectors: Numbers, gates: Numbers) -> Op:
        """The op in a program that numbers selectors, and the gates of its layer, like this."""
        return Op(
            self.alpha,
            self.beta,
            self.lo,
            self.hi,
            self.only_if_active,
            selectors[id(self.selector)],
            self.intervention,
            self.kind,
            self.strength,
            self.table,
            self.gamma,
            self.source,
            self.unit,
            self.mean,
            -1 if self.scope is None else selectors[id(self.scope)],
            tuple(sorted({gates[id(gate)] for gate in self.gates})) if self.gates else (),
        )


def latent_instruction(edit: FeatureEdit, selector: Selector, intervention: int) -> Instruction:
    """One entry of an ``edit_features``."""
    value = (edit.value if edit.value is not None else 0.0) + 0.0
    plain = Instruction(selector, intervention, only_if_active=edit.only_if_active)
    if edit.op == "set":
        return replace(plain, alpha=0.0, beta=value)
    if edit.op == "scale":
        return replace(plain, alpha=value)
    if edit.op == "add":
        return replace(plain, beta=value)
    if edit.op == "clamp":
        low = -math.inf if edit.min is None else edit.min + 0.0
        high = math.inf if edit.max is None else edit.max + 0.0
        return replace(plain, lo=low, hi=high)
    return replace(plain, alpha=0.0)


Part = TypeVar("Part", bound=Hashable)
Numbers = Mapping[int, int]
"""``id`` of an object → its number. Instructions share their parts, which may be long: they are not hashed per op."""


def _numbered(parts: Iterable[Part], order: Callable[[Part], Any]) -> tuple[tuple[Part, ...], Numbers]:
    """The distinct parts, sorted, so that their order does not depend on that of the request; and their numbers."""
    objects = {id(part): part for part in parts}
    distinct = tuple(sorted(set(objects.values()), key=order))
    number = {part: i for i, part in enumerate(distinct)}
    return distinct, {at: number[part] for at, part in objects.items()}


@dataclass
class Draft:
    """The instructions of a request by layer, kind of read and row, and the vectors that they bring.

    Attributes:
        named: row keys of all instructions, no-ops included.
        n_instructions: no-ops included.
        gates: all that is added now is behind these as well (:meth:`behind`).
    """

    channels: dict[tuple[int, ReadKind, str], list[Instruction]] = field(default_factory=dict)
    vectors: dict[str, bytes] = field(default_factory=dict)
    named: set[str] = field(default_factory=set)
    n_instructions: int = 0
    gates: tuple[Gate, ...] = ()

    @contextmanager
    def behind(self, gates: tuple[Gate, ...]) -> Iterator[None]:
        """Everything that is added within is also behind ``gates``."""
        before, self.gates = self.gates, (*self.gates, *gates)
        try:
            yield
        finally:
            self.gates = before

    def add(
        self,
        layer: int,
        kind: ReadKind,
        key: str,
        instruction: Instruction,
        silent: bool = False,
        vectors: Mapping[str, bytes] | None = None,
    ) -> bool:
        """Count the instruction; keep it, and the ``vectors`` that it names, unless it changes nothing."""
        self.n_instructions += 1
        self.named.add(key)
        if instruction.source or instruction.mean or vectors:
            self.named.update(one for one in (instruction.source, instruction.mean, *(vectors or ())) if one)
        selects = bool(instruction.selector.ranges or instruction.selector.token_ids)
        if silent or instruction.is_identity or not selects:
            return False
        self.vectors.update(vectors or {})
        gated = replace(instruction, gates=(*instruction.gates, *self.gates)) if self.gates else instruction
        self.channels.setdefault((layer, kind, key), []).append(gated)
        return True

    def program(
        self,
        max_dose: float,
        refuse_over_dose: bool,
        rules: RuleProgram | None = None,
        actions: Mapping[int, int] | None = None,
    ) -> Program | None:
        """Everything that was kept, in canonical order; ``None`` if nothing was.

        Args:
            max_dose, refuse_over_dose: the server's policy.
            rules: what the gates of kind RULE follow; a program even where nothing is behind them.
            actions: number of an action in those gates → its number in ``rules``.

        Raises:
            InterventionError: ``invalid_intervention``: values beyond what float32 can carry.
        """
        if not self.channels and rules is None:
            return None
        for instructions in self.channels.values():
            instructions[:] = [one.renumbered(actions or {}) for one in instructions]
        kept = [one for instructions in self.channels.values() for one in instructions]
        parts = [part for one in kept for part in (one.selector, one.scope) if part is not None]
        selectors, number = _numbered(parts, lambda selector: selector)
        gates = {layer: self._gates(layer) for layer in {layer for layer, _, _ in self.channels}}
        layers: dict[int, list[Channel]] = {}
        for (layer, kind, row), instructions in sorted(self.channels.items(), key=lambda item: item[0]):
            self._check_reach(kind, row, instructions)
            ops = [one.op(number, gates[layer][1]) for one in instructions]
            if kind in (ReadKind.NONE, ReadKind.NORM):  # constants only add up: their order means nothing
                ops.sort(key=lambda op: (op.selector, op.beta, op.gates, op.intervention))
            layers.setdefault(layer, []).append(Channel(kind, row, tuple(ops)))
        return Program(
            layers=tuple(LayerProgram(layer, tuple(channels), gates[layer][0]) for layer, channels in layers.items()),
            selectors=selectors,
            vectors=dict(sorted(self.vectors.items())),
            max_dose=rounded(max_dose),
            refuse_over_dose=bool(refuse_over_dose) and math.isfinite(max_dose),
            rules=rules,
        )

    def _gates(self, layer: int) -> tuple[tuple[Gate, ...], Numbers]:
        """The distinct gates of the layer's instructions, and their numbers."""
        kept = [one for (at, _, _), instructions in self.channels.items() if at == layer for one in instructions]
        return _numbered([gate for one in kept for gate in one.gates], msgspec.msgpack.encode)

    def _check_reach(self, kind: ReadKind, row: str, instructions: Sequence[Instruction]) -> None:
        """Refuse a channel whose delta could leave what float32 can square, so that no norm overflows to infinity."""
        factor, reach = 1.0, 0.0
        if kind is ReadKind.NONE:
            factor = norm(np.frombuffer(self.vectors[row], "<f4"))
        elif kind is ReadKind.NORM:
            factor = _LARGEST_STATE
        elif kind is ReadKind.JOINT:
            reach = _LARGEST_LATENT
        else:
            reach = _LARGEST_STATE
        original = reach
        bound = _LARGEST_EDITED_LATENT if kind is ReadKind.JOINT else _LARGEST_DELTA
        for one in instructions:
            reach = one.reach(reach, original)
            if reach * factor > bound:
                message = f"the edit could be of size {reach * factor:.3g}, beyond what float32 arithmetic can carry"
                param = f"interventions[{one.intervention}]"
                raise InterventionError("invalid_intervention", f"{param}: {message}", param)


def norm(row: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> float:
    """Euclidean norm, correctly rounded, so that every machine derives the same unit vector."""
    return math.sqrt(math.fsum((row.astype(np.float64) ** 2).tolist()))
